"""DDP over this rank's process group, by hand: whether gradients are those without it. Arguments: model YAMLs.

As in a training: channels-last, views into buckets, two micro-batches of which the first is not synchronised; with
layers that are frozen, too.
"""

import sys
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from train.config.objects import Objects
from train.config.options import TrainConfig
from train.model.build import build_model
from train.model.tasks import build_criterion
from train.processes.accelerator import start_processes


def gradients(wrapped: torch.nn.Module, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The sum over two micro-batches."""
    wrapped.zero_grad(set_to_none=True)
    for synchronised in (False, True):
        with nullcontext() if synchronised or wrapped is model else wrapped.no_sync():
            model.loss(batch, wrapped(batch["img"]))[0].sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


accelerator, _ = start_processes("no", [])
device = accelerator.device
if not torch.distributed.is_initialized():
    raise SystemExit("no process group")
print(f"backend {torch.distributed.get_backend()}")
torch.backends.cudnn.deterministic = True
for name in sys.argv[1:]:
    for freeze in (None, 2):
        torch.manual_seed(0)
        model, _ = build_model(TrainConfig(model=name, freeze=freeze), name, Objects(names={0: "a", 1: "b"}))
        model = model.to(device, memory_format=torch.channels_last).train()
        model.criterion = build_criterion(model)
        boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2]])
        batch = {
            "img": torch.rand(2, 3, 96, 96),
            "bboxes": boxes,
            "cls": torch.ones(2, 1),
            "batch_idx": torch.arange(2.0),
        }
        batch = {key: value.to(device) for key, value in batch.items()}
        batch["img"] = batch["img"].contiguous(memory_format=torch.channels_last)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        alone = gradients(model, model, batch)
        wrapped = DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
        model.load_state_dict(state)
        with_ddp = gradients(wrapped, model, batch)
        apart = max((a - b).norm().item() / max(a.norm().item(), 1e-6) for a, b in zip(alone, with_ddp, strict=True))
        print(f"{name}, freeze {freeze}: {'the same' if apart < 1e-3 else 'other'} gradients ({apart:.2g})", flush=True)
accelerator.end_training()
