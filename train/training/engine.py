"""One epoch of training: forward, loss, backward, clip, step, EMA."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train.config.options import TrainConfig
from train.data.loaders import as_images
from train.model.build import frozen_norms, largest_stride
from train.processes.exits import End
from train.processes.stops import Stop
from train.processes.watch import Watch
from train.training.meter import Meter, Window
from train.training.optim import Schedule
from train.training.state import TrainState


@dataclass(frozen=True)
class Progress:
    """How far an epoch has come: told after each optimizer step."""

    step: int  # of the epoch, from 1
    steps: int  # in the epoch
    global_step: int  # since the start of the run
    lr: float
    window: Window | None  # what was measured since the last one, over all ranks; None where none is due
    end: End | None  # how the run ends here, as all ranks have agreed


def train_one_epoch(
    state: TrainState,
    batches: Iterable[dict[str, Any]],
    schedule: Schedule,
    meter: Meter,
    watch: Watch,
    stop: Stop,
) -> Iterator[Progress]:
    """Train the epoch after `state.epoch`, or what is left of it after `state.batches`, on this rank's share of every
    batch (collective, to the last batch).

    Gradients are summed over the batches of a step, as in Ultralytics, and every epoch ends with a step.

    Args:
        state: its model and optimizer as `accelerator.prepare` returned them.
        batches: as the loader gives them (see `train_loader`), through `meter.timed`.
        schedule: rates, and after which batches the optimizer steps.
        meter: notes losses, waits and times.
        watch: is told at which batch, and at what of it, this rank stands.
        stop: knows whether the run is to end early.

    Yields:
        after each optimizer step, how far the epoch has come.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    config, epoch = schedule.config, state.epoch + 1
    model, optimizer, accelerator = state.model, state.optimizer, state.accelerator
    model.train()
    for norm in frozen_norms(state.detector):
        norm.eval()
    stride = largest_stride(state.detector)
    step_ends = schedule.step_ends(epoch)
    interval = config.log_interval or min(50, math.ceil(len(step_ends) / 8))
    step = sum(end < state.batches for end in step_ends)
    profile, at = meter.profile, meter.profile.at
    profile.epoch_begins()
    with stop.steps(), kernels_by_trial(not (config.rect or config.multi_scale)):
        for i, batch in enumerate(batches, state.batches):
            ni = epoch * schedule.batches + i
            watch.at(ni, 1, f"forward of batch {i + 1}")
            at("copy")
            batch["img"] = rescale(as_images(batch["img"], config.memory_format), ni, config, stride)
            steps_now = i in step_ends
            at("forward")
            with nullcontext() if steps_now else accelerator.no_sync(model):
                # Not model(batch): it would call forward inside forward, and Accelerate's autocast does not nest; it
                # would stay on after the step. So the loss is computed in fp32, from predictions Accelerate made fp32.
                predictions = model(batch["img"])
                watch.at(ni, 2, f"loss and backward of batch {i + 1}")
                at("loss")
                losses, items = state.detector.loss(batch, predictions)
                if steps_now:
                    stop.announce(state.ema.updates + 1)
                at("backward")
                # Ultralytics' loss is a sum over the images; DDP takes the mean of the ranks' gradients.
                accelerator.backward(losses.sum() * accelerator.num_processes)
            at("measuring")
            del predictions, losses  # else they would live through the next forward
            meter.add(items, batch["im_file"])
            if steps_now:
                at("optimizer")
                schedule.apply(optimizer, epoch, ni)
                meter.step(accelerator.clip_grad_norm_(model.parameters(), max_norm=10.0))
                optimizer.step()
                optimizer.zero_grad()
                at("EMA")
                state.ema.update(model)
                at("measuring")
                state.batches, step = i + 1, step + 1
                due = step % interval == 0 or step == len(step_ends)
                window = meter.gather() if due else None  # collective
                if window is not None:
                    state.measured(window)
                updates = state.ema.updates
                lr, end = optimizer.param_groups[0]["lr"], stop.after(updates)
                at("report")
                yield Progress(step, len(step_ends), updates, lr, window, end)
                profile.stepped()
            at("data wait")
            watch.at(ni, 3, f"waiting for batch {i + 2}")
    profile.epoch_ends()


@contextmanager
def kernels_by_trial(of_one_size: bool) -> Iterator[None]:
    """On CUDA: where all batches are of one size, cuDNN tries its kernels for each layer once and keeps the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = of_one_size
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def rescale(images: Tensor, ni: int, config: TrainConfig, stride: int) -> Tensor:
    """Multi-scale training: the batch at a size drawn from the seed and the batch number, so that all ranks agree."""
    if not config.multi_scale:
        return images
    low = max(stride, int(config.imgsz * (1 - config.multi_scale)))
    high = int(config.imgsz * (1 + config.multi_scale) + stride)
    size = int(np.random.default_rng([config.seed, ni]).integers(low, high)) // stride * stride
    if size == max(images.shape[2:]):
        return images
    shape = [math.ceil(side * size / max(images.shape[2:]) / stride) * stride for side in images.shape[2:]]
    return nn.functional.interpolate(images, size=shape, mode="bilinear", align_corners=False)


def check_finite(model: nn.Module) -> None:
    """Raise FloatingPointError where a weight is not a finite number; call it where all ranks have the same weights."""
    floats = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    if not torch.stack([tensor.isfinite().all() for tensor in floats]).all():
        raise FloatingPointError(
            "The weights are no longer finite numbers after the last steps, which were not saved. "
            "Lower --lr0, or try --mixed_precision no."
        )
