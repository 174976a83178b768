"""Two steps of each model family on the ranks of a launch, of which only the first has an object to find.

Arguments: model YAMLs, of any task. Says for each `NAME: the same gradients, N of N parameters` where no rank hung,
each trainable parameter has a gradient and all ranks have the same.
"""

import sys
from functools import partial

import torch
from accelerate.utils import gather_object

from train.config.objects import Objects
from train.config.options import TrainConfig
from train.config.task_options import PoseConfig, SegmentConfig
from train.model.architecture import read_architecture
from train.model.build import build_model
from train.model.tasks import HEADS, build_criterion, with_sigmas
from train.processes.accelerator import start_processes, without_buffer_broadcast

accelerator, _ = start_processes("no", [])
first = accelerator.is_main_process
masks = torch.zeros(2, 16, 16)
masks[0, 5:11, 5:11] = first
points = torch.tensor([[[0.5, 0.3, 2], [0.7, 0.5, 2], [0.5, 0.7, 2], [0.3, 0.5, 0]]])[: int(first)]
BESIDE = {"boxes": {}, "polygons": {"masks": masks, "sem_masks": masks * 0}, "keypoints": {"keypoints": points}}
KINDS = {"detect": TrainConfig, "segment": SegmentConfig, "pose": PoseConfig}
for name in sys.argv[1:]:
    torch.manual_seed(0)
    task = HEADS[read_architecture(name)["head"][-1][2]]
    objects = Objects(names={0: "a", 1: "b"}, keypoints=(4, 3) if task.carries == "keypoints" else ())
    config = with_sigmas(KINDS[task.name](model=name), task, objects)
    detector, _ = build_model(config, name, objects)
    detector.train()
    detector.criterion = build_criterion(detector, partial(accelerator.reduce, reduction="sum"), 2)
    model = without_buffer_broadcast(accelerator.prepare(detector))
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4]])[: int(first)]
    batch = {"img": torch.rand(2, 3, 64, 64), "bboxes": boxes, "cls": torch.zeros(len(boxes), 1)}
    batch |= {"batch_idx": torch.zeros(len(boxes)), **BESIDE[task.carries]}
    for _ in range(2):  # in the second step DDP would miss what the first has not used
        model.zero_grad()
        losses, _ = detector.loss(batch, model(batch["img"]))
        accelerator.backward(losses.sum() * 2)
    wanted = [p for p in detector.parameters() if p.requires_grad]
    sums = [None if p.grad is None else p.grad.double().sum().item() for p in wanted]
    same = len(set(map(tuple, gather_object([sums])))) == 1
    having = sum(value is not None for value in sums)
    accelerator.print(
        f"{name}: {'the same' * same or 'other'} gradients, {having} of {len(wanted)} parameters", flush=True
    )
    if first:
        assert any(p.grad.abs().max() > 0 for p in wanted if p.grad is not None)
accelerator.end_training()
