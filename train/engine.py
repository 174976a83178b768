"""One epoch of training: forward, loss, backward, clip, step, EMA."""

import math
from contextlib import nullcontext

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
from train.report import Report


class LossWindow:
    """Losses since the last line: kept on the device, reduced over ranks and images when a line is due."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.batches: list[tuple[Tensor, list[str]]] = []  # this rank's (loss items, image files)

    def add(self, items: Tensor, files: list[str]) -> None:
        """Note the mean losses of one batch of this rank; no host sync."""
        self.batches.append((items, files))

    def reduce(self) -> tuple[Tensor, int]:
        """Sum of the losses over all ranks and images since the last call, and the number of images (collective).

        Raises:
            FloatingPointError: on all ranks, naming images, where a loss is not a finite number.
        """
        images = sum(len(files) for _, files in self.batches)
        total = torch.stack([items * len(files) for items, files in self.batches]).sum(0)
        total = self.accelerator.reduce(total, "sum").cpu()
        if not total.isfinite().all():  # the same on all ranks
            self._name_images()
        self.batches.clear()
        return total, images * self.accelerator.num_processes  # each rank has an equal share of a batch

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
) -> dict[str, float]:
    """Train on this rank's share of every batch of the epoch (collective).

    Gradients are summed over the batches of a step, as in Ultralytics, and every epoch ends with a step.

    Args:
        model, optimizer, loader: as `accelerator.prepare` returned them.

    Returns:
        mean losses of the epoch over all images of all ranks, by name.

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
    window = LossWindow(accelerator)
    epoch_total, epoch_images, steps = torch.zeros(()), 0, 0
    names: list[str] = []
    for i, batch in enumerate(loader):
        ni = epoch * schedule.batches + i
        batch["img"] = rescale(as_images(batch["img"], config.memory_format), ni, config, stride)
        steps_now = i in step_ends
        with nullcontext() if steps_now else accelerator.no_sync(model):
            # Not model(batch): it would call forward inside forward, and Accelerate's autocast does not nest; it would
            # stay on after the step. So the loss is computed in fp32, from predictions that Accelerate made fp32.
            predictions = model(batch["img"])
            losses, items = detector.loss(batch, predictions)
            # Ultralytics' loss is a sum over the images; DDP takes the mean of the ranks' gradients.
            accelerator.backward(losses.sum() * accelerator.num_processes)
        names = list(items)
        window.add(torch.stack(list(items.values())), batch["im_file"])
        if not steps_now:
            continue
        schedule.apply(optimizer, epoch, ni)
        accelerator.clip_grad_norm_(model.parameters(), max_norm=10.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        steps += 1
        report.step_done()
        if steps % config.log_interval == 0 or steps == len(step_ends):
            total, images = window.reduce()  # collective: all ranks are at the same step
            epoch_total, epoch_images = epoch_total + total, epoch_images + images
            means = dict(zip(names, (total / images).tolist(), strict=True))
            report.losses(steps, means, optimizer.param_groups[0]["lr"], images, ema.updates)
    return dict(zip(names, (epoch_total / epoch_images).tolist(), strict=True))
