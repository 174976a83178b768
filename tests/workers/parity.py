"""Train a few steps with the real engine and leave the images seen and the weights, for comparison over ranks.

usage: parity.py DATA.yaml OUT MODE …, one after the other, where MODE@MODEL.yaml is of another model and its task, with
batches of six, that three ranks can share, and without mosaic in the second epoch: `global` is the loss of the global
batch, `local` has --local-loss-norm, `ddp` is plain DDP over Ultralytics' unmodified loss, `sync` shares BatchNorm's
statistics, `fp16` is `global` in that precision (CUDA; by itself). `apart` is `global` with one mask an object, `flat`
with keypoints of two dimensions, those of flat.yaml beside DATA.yaml, `sure` with a model that is sure of its keypoints
on dark images. `leave` saves after the second of three steps of an epoch and takes five more; `enter=FOLDER` goes on
from what another number of processes has left in FOLDER, for as many. Results go to OUT/MODE.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from train.config.options import TrainConfig
from train.config.task_options import PoseConfig, SegmentConfig
from train.data.files import find_data
from train.data.labels import train_labels
from train.data.loaders import train_loader
from train.data.scan import read_index
from train.data.sets import TrainSet
from train.model.architecture import read_architecture
from train.model.build import ModelEMA, build_model
from train.model.tasks import HEADS, TASKS, build_criterion, with_sigmas
from train.processes.accelerator import start_processes
from train.processes.stops import Stop
from train.processes.watch import Watch
from train.training.engine import train_one_epoch
from train.training.meter import Meter
from train.training.optim import Schedule, build_optimizer
from train.training.saves import states, write_state
from train.training.state import TrainState


def freeze_batchnorm(model: nn.Module) -> None:
    """Statistics of the batch depend on the rank's share of it, so they are left out of the comparison."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True: None  # type: ignore[method-assign]


def be_sure_of_dark_images(model: nn.Module) -> None:
    """Have keypoints' likelihoods be negative on dark images, as they are where a model has learnt for long.

    There its outputs are as of a tiny deviation. Errors are then as large as Ultralytics lets them be, which the flow
    takes for less than the deviation gains.
    """
    for net in model.model[-1].flow_model.s:  # type: ignore[index, union-attr]
        nn.init.constant_(net[-2].bias, 3.0)

    def sure(_: nn.Module, inputs: tuple[Tensor], raw: dict[str, Any]) -> None:
        dark = (inputs[0].amax(1) < 0.1).float().mean((1, 2)) > 0.05
        for branch in raw.values():
            branch["kpts_sigma"] = branch["kpts_sigma"] - 69.0 * dark[:, None, None]

    model.register_forward_hook(sure)


def main(accelerator: Accelerator, data_yaml: str, mode: str, out: Path, left: str = "") -> None:
    mode, _, model_name = mode.partition("@")
    local, elastic = mode in ("local", "ddp"), mode in ("leave", "enter")
    whole = mode in ("global", "apart", "flat", "sure")
    task = HEADS[read_architecture(model_name)["head"][-1][2]] if model_name else TASKS["detect"]
    options: dict[str, Any] = {"model": model_name, "batch": 6} if model_name else {"batch": 8}
    options |= {"overlap_mask": False} if mode == "apart" else {}
    if mode == "flat":
        data_yaml = str(Path(data_yaml).with_name("flat.yaml"))
    kind = {"detect": TrainConfig, "segment": SegmentConfig, "pose": PoseConfig}[task.name]
    # 40 images are five batches; two make a step, so that accumulation and its remainder are inside: 3 steps an epoch.
    config = kind(
        data=data_yaml, imgsz=64, nbs=options["batch"] * (1 if local else 2),
        epochs=3 if elastic else 2 if whole else 1, close_mosaic=int(elastic or (whole and bool(model_name))),
        optimizer="SGD", lr0=0.01, warmup_epochs=0, workers=0, mixup=0.2, degrees=5.0, local_loss_norm=local, **options,
    )  # fmt: skip
    set_seed(1)
    data = find_data(config.data, carries=task.carries)
    config = with_sigmas(config, task, data)
    index = read_index(data, ("train",), config, accelerator)["train"]
    # With `sync` one step: with BatchNorm over 64 px, bits become 0.02 of a running variance in six.
    images = 16 if mode == "sync" else 5 * config.batch
    labels = train_labels(index, len(data.names), config, task.carries, images)
    model, _ = build_model(config, config.model, data)
    if mode != "sync":
        freeze_batchnorm(model)
    if mode == "sure":
        be_sure_of_dark_images(model)
    model = model.to(accelerator.device)
    ema = ModelEMA(model)
    if mode == "sync" and accelerator.num_processes > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    sums: list[list[float]] = []  # of this rank alone, that the loss is divided by, by batch and criterion

    def sum_over_ranks(own: Tensor) -> Tensor:
        sums.append(own.tolist())
        return accelerator.reduce(own, reduction="sum")

    if mode != "ddp":
        model.criterion = build_criterion(
            model, None if config.local_loss_norm else sum_over_ranks, accelerator.num_processes
        )
    detector = model
    start = {key: value.clone() for key, value in model.state_dict().items()}
    schedule = Schedule(config, images=len(labels), classes=3)
    optimizer = build_optimizer(model, schedule)
    model, optimizer = accelerator.prepare(model, optimizer)
    loader, positions = train_loader(TrainSet(labels, data, config), schedule.batches, accelerator)
    state = TrainState(detector, model, ema, optimizer, accelerator)
    stop, out_of = Stop(accelerator), states(Path(left)) if left else []
    meter, watch = Meter(accelerator, detector), Watch(accelerator.process_index, accelerator.num_processes, 0, print)

    seen: list[list[str]] = []  # digests of this rank's images, by batch

    def note(_: nn.Module, inputs: tuple) -> None:
        images = inputs[0]["img"] if isinstance(inputs[0], dict) else inputs[0]
        seen.append([hashlib.sha256(image.cpu().numpy().tobytes()).hexdigest() for image in images])

    handle = detector.register_forward_pre_hook(note)
    losses, steps = {}, []
    if mode == "ddp":
        model.train()
        for i, batch in enumerate(loader):
            batch["img"] = batch["img"].float() / 255
            loss, _ = model(batch)
            (loss.sum() * accelerator.num_processes).backward()
            schedule.apply(optimizer, 0, i)
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
    else:
        if out_of:
            state.load(torch.load(out_of[0], weights_only=True), meter)
        for epoch in range(state.epoch + 1, config.epochs):
            positions.set(epoch, state.batches, schedule.closed(epoch))
            state.begin()
            for progress in train_one_epoch(state, meter.timed(loader), schedule, meter, watch, stop):
                assert progress.window is not None  # an epoch of so few steps is measured after each
                steps.append(progress.window.means())
                if elastic and progress.global_step == 2 + 5:
                    break
                if mode == "leave" and progress.global_step == 2:
                    content = state.content(config, meter, {})  # collective
                    if accelerator.is_main_process:
                        out.mkdir(parents=True, exist_ok=True)
                        write_state(out, content)
            losses = state.whole.means() if state.whole is not None else {}
            if elastic and state.ema.updates == 2 + 5:
                break
            state.finish(epoch)
    watch.close()
    handle.remove()
    rank = accelerator.process_index
    out.mkdir(parents=True, exist_ok=True)
    weights = {"start": start, "model": detector.state_dict(), "ema": ema.ema.state_dict()}
    torch.save(weights | {"scaler": accelerator.scaler and accelerator.scaler.state_dict()}, out / f"rank{rank}.pt")
    told = {"seen": seen, "losses": losses, "steps": steps, "sums": sums, "updates": ema.updates, "gpus": gpus_in_use()}
    (out / f"rank{rank}.json").write_text(json.dumps(told))


def gpus_in_use() -> list[int]:
    """Indices of the GPUs that this process has a context on, by NVIDIA's driver."""
    if not torch.cuda.is_initialized():
        return []
    import pynvml

    pynvml.nvmlInit()
    every = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    return [i for i, gpu in enumerate(every)
            if os.getpid() in (p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu))]  # fmt: skip


accelerator, _ = start_processes("fp16" if "fp16" in sys.argv[3:] else "no", [])
for given in sys.argv[3:]:
    mode, _, left = given.partition("=")
    main(accelerator, sys.argv[1], mode, Path(sys.argv[2]) / mode, left)
accelerator.end_training()
