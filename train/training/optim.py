"""Ultralytics' recipe as plain functions: parameter groups, and rates as pure functions of the batch number.

Source of the numbers: `ultralytics.engine.trainer.BaseTrainer` (8.4). One difference is on purpose: every epoch ends
with an optimizer step, where Ultralytics carries half-summed gradients into the next epoch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import nn
from ultralytics.optim import MuSGD

from train.config.options import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Rates of one training run. `ni` counts batches (micro-batches) from the start of the run, as in Ultralytics."""

    config: TrainConfig
    images: int  # in the training split
    classes: int
    picked: str = ""  # the optimizer of a run that is gone on with

    @property
    def batches(self) -> int:
        """Batches in one epoch: a remainder is dropped; a set smaller than the batch is repeated to fill one."""
        return max(self.images // self.config.batch, 1)

    @cached_property
    def optimizer(self) -> str:
        """Name of the optimizer; `auto` decides by the number of steps in the run, when it begins."""
        if self.picked or self.config.optimizer != "auto":
            return self.picked or self.config.optimizer
        steps = math.ceil(self.images / max(self.config.batch, self.config.nbs))
        return "MuSGD" if steps * self.config.epochs > 10_000 else "AdamW"

    @property
    def lr0(self) -> float:
        """Learning rate after the warm-up."""
        if self.config.optimizer != "auto":
            return self.config.lr0
        return 0.01 if self.optimizer == "MuSGD" else round(0.002 * 5 / (4 + self.classes), 6)

    @property
    def full_momentum(self) -> float:
        """Momentum after the warm-up."""
        return self.config.momentum if self.config.optimizer != "auto" else 0.9

    @property
    def warmup_bias_lr(self) -> float:
        """Learning rate of the biases at the start."""
        return self.config.warmup_bias_lr if self.config.optimizer != "auto" else 0.0

    @property
    def warmup_batches(self) -> int:
        """Batches in the warm-up, which leaves at least the last epoch for regular training."""
        return round(min(self.config.warmup_epochs, max(self.config.epochs - 1, 0)) * self.batches)

    @property
    def full_accumulation(self) -> int:
        """Batches in one step after the warm-up."""
        wanted = max(round(self.config.nbs / self.config.batch), 1)
        return min(wanted, self.batches * self.config.epochs)

    @property
    def weight_decay(self) -> float:
        """Weight decay for the images that one step really sees."""
        return self.config.weight_decay * self.config.batch * self.full_accumulation / self.config.nbs

    def _warm(self, ni: int, start: float, end: float) -> float:
        """Linear from `start` at batch 0 to `end` at the end of the warm-up; `end` from there on."""
        if ni > self.warmup_batches or self.warmup_batches == 0:
            return end
        return float(np.interp(ni, [0, self.warmup_batches], [start, end]))

    def accumulation(self, ni: int) -> int:
        """How many batches a step that ends at batch `ni` sums up."""
        return max(1, round(self._warm(ni, 1, self.full_accumulation)))

    def step_ends(self, epoch: int) -> frozenset[int]:
        """Batches of this epoch (0-based) after which the optimizer steps; the last one is always among them."""
        ends, summed = [], 0
        for i in range(self.batches):
            summed += 1
            if summed >= self.accumulation(epoch * self.batches + i) or i == self.batches - 1:
                ends.append(i)
                summed = 0
        return frozenset(ends)

    def decay(self, epoch: int) -> float:
        """Share of the learning rate that is left in this epoch: linear or cosine from 1 to lrf."""
        x, lrf = epoch / self.config.epochs, self.config.lrf
        if self.config.cos_lr:
            return max((1 - math.cos(x * math.pi)) / 2, 0) * (lrf - 1) + 1
        return max(1 - x, 0) * (1 - lrf) + lrf

    def lr(self, epoch: int, ni: int, initial_lr: float, bias: bool) -> float:
        """Learning rate of a group: in the warm-up biases fall from warmup_bias_lr and all others rise from 0."""
        return self._warm(ni, self.warmup_bias_lr if bias else 0.0, initial_lr * self.decay(epoch))

    def momentum(self, ni: int) -> float:
        """Momentum of SGD and MuSGD."""
        return self._warm(ni, self.config.warmup_momentum, self.full_momentum)

    def closed(self, epoch: int) -> bool:
        """Whether an epoch (0-based) is one of the last, without mosaic."""
        return epoch >= self.config.epochs - self.config.close_mosaic

    def over(self, epochs: int) -> "Schedule":
        """The same over so many epochs."""
        return replace(self, config=replace(self.config, epochs=epochs), picked=self.optimizer)

    def apply(self, optimizer: torch.optim.Optimizer, epoch: int, ni: int) -> None:
        """Set the rates of the step that ends at batch `ni`."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr(epoch, ni, group["initial_lr"], group["param_group"] == "bias")
            if "momentum" in group:
                group["momentum"] = self.momentum(ni)


def epochs_within(hours: float, used: float, each: float) -> int:
    """How many epochs fit into so many hours, the first one among them.

    Args:
        hours: from the start of the run.
        used: seconds of them that are over, with the first epoch.
        each: seconds of an epoch.
    """
    return 1 + max(int((hours * 3600 - used) / each), 0)


def _kinds(model: nn.Module, muon: bool) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(kind, name, parameter) for each parameter: muon, bias, bn (normalisation) or weight."""
    norms = tuple(kind for name, kind in vars(nn).items() if "Norm" in name)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if muon and parameter.ndim in (2, 4):
                yield "muon", name, parameter
            elif "bias" in name:
                yield "bias", name, parameter
            elif isinstance(module, norms) or "logit_scale" in name:
                yield "bn", name, parameter
            else:
                yield "weight", name, parameter


def build_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """The optimizer over Ultralytics' groups, in its order (weight, bn, bias, muon), so that states can be compared.

    Only weights decay. MuSGD orthogonalises matrices and filters, and trains the class branch of the head, and what a
    segmentation model's semantic loss is computed from, at three times the learning rate.
    """
    name, lr, momentum = schedule.optimizer, schedule.lr0, schedule.full_momentum
    muon = name == "MuSGD"
    head = model.model[-1]  # type: ignore[index]
    branches = [getattr(head, branch, None) for branch in ("cv3", "one2one_cv3")]
    boosted = {id(p) for branch in branches if branch is not None for p in branch.parameters()} if muon else set()
    boosted |= {id(p) for name, p in model.named_parameters() if muon and "proto.semseg" in name}
    groups: list[dict] = []
    for kind in ("weight", "bn", "bias", "muon") if muon else ("weight", "bn", "bias"):
        decay = schedule.weight_decay if kind in ("weight", "muon") else 0.0
        shared = {"param_group": kind, "weight_decay": decay} | ({"use_muon": True} if kind == "muon" else {})
        members = [p for k, _, p in _kinds(model, muon) if k == kind and p.requires_grad]
        if muon:
            fast = [p for p in members if id(p) in boosted]
            groups.append({"params": fast, **shared, "lr": 3 * lr})
            members = [p for p in members if id(p) not in boosted]
        groups.append({"params": members, **shared, "lr": lr})
    for group in groups:
        group["initial_lr"] = group["lr"]
    if muon:
        return MuSGD(groups, lr=lr, momentum=momentum, nesterov=True, muon=0.2, sgd=1.0)
    # fused, where torch has it: one kernel, and the gradient scaler skips a step without a host sync. Not SGD in fp16:
    # a first step that is skipped would leave its momentum as it was found in memory. What is not fused says nothing of
    # it, for torch takes False for a wish to step tensor by tensor.
    fusable = ("Adam", "AdamW") if schedule.config.mixed_precision == "fp16" else ("Adam", "AdamW", "SGD")
    fused = {"fused": next(model.parameters()).is_cuda} if name in fusable else {}
    if name == "SGD":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=True, **fused)
    if name == "RMSprop":
        return torch.optim.RMSprop(groups, lr=lr, momentum=momentum)
    return getattr(torch.optim, name)(groups, lr=lr, betas=(momentum, 0.999), weight_decay=0.0, **fused)
