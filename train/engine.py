"""One epoch of training: forward, loss, backward, clip, step, EMA."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from train.config import TrainConfig
from train.data import as_images
from train.model import ModelEMA, frozen_norms, largest_stride
from train.optim import Schedule
from train.processes import memory_in_use
from train.report import Report, Window


class ForwardClock:
    """Seconds that the model's own forward takes on this rank, without what it waits for other ranks.

    The wrapping of DDP waits for the main process's buffers before it calls the model, so hooks on the model itself
    stop the time; on CUDA by events, which the host does not wait for.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []
        self.handles = [model.register_forward_pre_hook(self._starts), model.register_forward_hook(self._ends)]

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _starts(self, *_: Any) -> None:
        self.marks.append((self._mark(), None))

    def _ends(self, *_: Any) -> None:
        self.marks[-1] = (self.marks[-1][0], self._mark())

    def take(self) -> float:
        """Seconds since the last call; on CUDA call it where the device has been waited for."""
        if self.cuda:
            seconds = sum(start.elapsed_time(end) for start, end in self.marks) / 1000
        else:
            seconds = sum(end - start for start, end in self.marks)
        self.marks.clear()
        return seconds

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()


class Meter:
    """What has been measured since the last line: kept on the device, gathered over ranks when a line is due."""

    def __init__(self, accelerator: Accelerator, model: nn.Module):
        self.accelerator = accelerator
        self.forward = ForwardClock(model, accelerator.device)
        self.batches: list[tuple[Tensor, list[str]]] = []  # this rank's (loss items, image files)
        self.norms: list[Tensor] = []
        self.names: list[str] = []
        self.waited = 0.0
        self.started = time.perf_counter()

    def timed(self, loader: Iterable[dict]) -> Iterator[dict]:
        """The loader's batches; the time until each is there is data wait."""
        batches = iter(loader)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def add(self, items: dict[str, Tensor], files: list[str]) -> None:
        """Note the mean losses of one batch of this rank; no host sync."""
        self.names = list(items)
        self.batches.append((torch.stack(list(items.values())), files))

    def step(self, norm: Tensor) -> None:
        """Note the gradient norm of one step; no host sync."""
        self.norms.append(norm)

    def gather(self) -> Window:
        """Everything since the last call, over all ranks (collective).

        Raises:
            FloatingPointError: on all ranks, naming images, where a loss is not a finite number.
        """
        images = sum(len(files) for _, files in self.batches)
        losses = torch.stack([items * len(files) for items, files in self.batches]).sum(0)
        norms = torch.stack(self.norms).float()
        norm = norms[norms.isfinite()].mean()[None]  # fp16 may step over some
        measured: list[float] = torch.cat([losses, norm]).tolist()  # waits for the device
        now = time.perf_counter()
        own = [now - self.started, self.waited, self.forward.take(), float(memory_in_use(self.accelerator.device))]
        mine = torch.tensor([measured + own])
        ranks = self.accelerator.gather(mine.to(self.accelerator.device)).cpu()  # (ranks, losses + 5)
        total = ranks[:, : len(self.names)].sum(0)
        if not total.isfinite().all():  # the same on all ranks
            self._name_images()
        steps = len(self.norms)
        self.batches.clear()
        self.norms.clear()
        self.waited, self.started = 0.0, now
        seconds, waits, forwards, memory = ranks[:, -4:].T.tolist()
        return Window(
            losses=dict(zip(self.names, total.tolist(), strict=True)),
            images=images * self.accelerator.num_processes,  # each rank has an equal share of a batch
            steps=steps, grad_norm=ranks[0, -5].item(), seconds=seconds, waits=waits, forwards=forwards, memory=memory,
        )  # fmt: skip

    def _name_images(self) -> None:
        """Find the first batch whose loss is not finite on any rank, and end all ranks with its images (collective)."""
        bad = [i for i, (items, _) in enumerate(self.batches) if not items.isfinite().all()]
        first = min(gather_object([bad[0] if bad else len(self.batches)]))
        items, files = self.batches[first]
        images = gather_object([files if not items.isfinite().all() else []])
        named = [file for part in images for file in part]
        raise FloatingPointError(
            f"The loss is no longer a finite number; nothing was saved from this epoch. First in the batch of "
            f"{', '.join(named[:64])}. Look at these images and labels, lower --lr0, or try --mixed_precision no."
        )


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
            "The weights are no longer finite numbers after the last steps of this epoch, which was not saved. "
            "Lower --lr0, or try --mixed_precision no."
        )


def train_one_epoch(
    epoch: int,
    model: nn.Module,
    ema: ModelEMA,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    schedule: Schedule,
    accelerator: Accelerator,
    report: Report,
) -> None:
    """Train on this rank's share of every batch of the epoch (collective).

    Gradients are summed over the batches of a step, as in Ultralytics, and every epoch ends with a step.

    Args:
        model, optimizer, loader: as `accelerator.prepare` returned them.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    config = schedule.config
    detector = accelerator.unwrap_model(model)
    model.train()
    for norm in frozen_norms(detector):
        norm.eval()
    stride = largest_stride(detector)
    step_ends = schedule.step_ends(epoch)
    interval = config.log_interval or min(50, math.ceil(len(step_ends) / 8))
    meter = Meter(accelerator, detector)
    steps = 0
    for i, batch in enumerate(meter.timed(loader)):
        ni = epoch * schedule.batches + i
        report.watch.at(ni, 1, f"forward of batch {i + 1}")
        batch["img"] = rescale(as_images(batch["img"], config.memory_format), ni, config, stride)
        if epoch == 0 and i < 3:
            report.training_batch(i, batch)
        steps_now = i in step_ends
        with nullcontext() if steps_now else accelerator.no_sync(model):
            # Not model(batch): it would call forward inside forward, and Accelerate's autocast does not nest; it would
            # stay on after the step. So the loss is computed in fp32, from predictions that Accelerate made fp32.
            predictions = model(batch["img"])
            report.watch.at(ni, 2, f"loss and backward of batch {i + 1}")
            losses, items = detector.loss(batch, predictions)
            # Ultralytics' loss is a sum over the images; DDP takes the mean of the ranks' gradients.
            accelerator.backward(losses.sum() * accelerator.num_processes)
        meter.add(items, batch["im_file"])
        if steps_now:
            schedule.apply(optimizer, epoch, ni)
            meter.step(accelerator.clip_grad_norm_(model.parameters(), max_norm=10.0))
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model)
            steps += 1
            report.step_done()
            if steps % interval == 0 or steps == len(step_ends):
                report.measured(steps, meter.gather(), optimizer.param_groups[0]["lr"], ema.updates)  # collective
        report.watch.at(ni, 3, f"waiting for batch {i + 2}")
    meter.forward.close()
