"""Ultralytics' losses as the same function of the global batch for any number of processes.

Ultralytics divides each rank's terms by that rank's own counts, so the gradients of two processes differ from those of
one process at the same global batch. Here the mean over ranks, which DDP takes, is what one process computes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.loss import (
    PoseLoss26,
    RLELoss,
    SegmentLoss26,
    v8DetectionLoss,
    v8PoseLoss,
    v8SegmentationLoss,
)

# What each term is divided by. A term that is not here is a mean over the images, of which each rank has as many.
TARGETS, FOREGROUND, KEYPOINTS = "target scores", "foreground anchors", "valid keypoints"
DIVISORS = {
    "box_loss": TARGETS,
    "cls_loss": TARGETS,
    "dfl_loss": TARGETS,
    "l1_loss": TARGETS,
    "seg_loss": FOREGROUND,
    "pose_loss": FOREGROUND,
    "kobj_loss": FOREGROUND,
    "rle_loss": KEYPOINTS,
}


class OfGlobalBatch(v8DetectionLoss):
    """Divides each term of the loss that it is mixed into by a sum over all ranks instead of by this rank's.

    A loss of one's own is one more name in `loss_names` and one more element of what `loss` returns, and, where it is
    divided by a count, a line in DIVISORS: bars, lines, results.csv, its picture and the trackers then have it, for
    training and validation.

    Args:
        model: whose outputs are judged.
        sum_over_ranks: collective sum of a vector; None divides by this rank's own sums, as Ultralytics does.
        ranks: number of processes.
        kwargs: of Ultralytics' assigner.
    """

    assigner: Any

    def __init__(
        self,
        model: nn.Module,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
        ranks: int = 1,
        **kwargs: Any,
    ):
        super().__init__(model, **kwargs)
        self.sum_over_ranks, self.ranks = sum_over_ranks, ranks
        self.sums: dict[str, Tensor] = {}  # of this rank's part of a batch
        if sum_over_ranks is None:
            return
        assign = self.assigner

        def assign_and_sum(*args: Any, **kwargs: Any) -> Any:
            assigned = assign(*args, **kwargs)
            self.sums = {TARGETS: assigned[2].sum().float(), FOREGROUND: assigned[3].sum().float()}
            return assigned

        self.assigner = assign_and_sum

    def loss(self, preds: dict[str, Tensor], batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Ultralytics' terms, times the images of this rank, and the same terms detached, by name; each with its
        denominator exchanged.
        """
        terms, items = super().loss(preds, batch)
        if self.sum_over_ranks is None:
            return terms, items
        terms, items = self.completed(terms, items, preds, batch)
        # Collective: every rank, once for each criterion and batch.
        total = dict(zip(self.sums, self.sum_over_ranks(torch.stack([*self.sums.values()])), strict=True))
        factors = torch.stack([self.factor(name, total) for name in self.loss_names])
        return terms * factors, dict(zip(self.loss_names, torch.stack([*items.values()]) * factors, strict=True))

    def completed(
        self, terms: Tensor, items: dict[str, Tensor], preds: dict[str, Tensor], batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms of this rank with what Ultralytics leaves out where a rank is alone, and the sums for that."""
        return terms, items

    def factor(self, name: str, total: dict[str, Tensor]) -> Tensor:
        """What a term of this rank is multiplied by, so that the mean over ranks is that of the global batch.

        Args:
            name: of the term.
            total: `sums` over all ranks.
        """
        if name not in DIVISORS:
            return torch.ones((), device=self.device)
        divisor = DIVISORS[name]
        return self.ranks * self.sums[divisor].clamp(min=1) / total[divisor].clamp(min=1)


class SegmentationLoss(OfGlobalBatch, v8SegmentationLoss):
    """Of boxes and masks."""

    def completed(
        self, terms: Tensor, items: dict[str, Tensor], preds: dict[str, Tensor], batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The semantic term is of all images wherever any rank has foreground; Ultralytics leaves it out on a rank that
        has none.
        """
        if isinstance(preds["proto"], tuple) and not self.sums[FOREGROUND]:
            semantic = self.semantic(preds["proto"][1], batch) * self.hyp.box
            terms = torch.cat((terms[:-1], terms[-1:] + semantic * len(preds["boxes"])))
            items = items | {"sem_loss": semantic.detach()}
        return terms, items

    def factor(self, name: str, total: dict[str, Tensor]) -> Tensor:
        """See `OfGlobalBatch`."""
        if name == "sem_loss":
            return (total[FOREGROUND] > 0).float()
        return super().factor(name, total)

    def semantic(self, predicted: Tensor, batch: dict[str, Any]) -> Tensor:
        """The semantic term as Ultralytics computes it within v8SegmentationLoss.loss.

        Args:
            predicted: (images, classes, height, width) logits.
            batch: with `masks` and `sem_masks`.
        """
        classes = batch["sem_masks"].to(self.device).long()[:, None]
        present = batch["masks"].to(self.device) != 0
        if not self.overlap:  # one an object
            image = batch["batch_idx"].to(self.device).long()
            present = torch.zeros(len(classes), *present.shape[1:], device=self.device).index_add_(
                0, image, present.float()
            )
            present = present > 0
        targets = torch.zeros(len(classes), self.nc, *classes.shape[2:], device=self.device)
        targets.scatter_(1, classes, present[:, None].float())
        loss: Tensor = self.bcedice_loss(predicted, targets)
        return loss


class SegmentationLoss26(SegmentationLoss, SegmentLoss26):
    """Of boxes and masks, by which an end-to-end head's targets are assigned, too."""


class PoseLoss(OfGlobalBatch, v8PoseLoss):
    """Of boxes and keypoints."""


class _KeptRLE(RLELoss):
    """Keeps what it has computed: Ultralytics clamps it to zero next."""

    value: Tensor | None = None  # mean over the valid keypoints
    keypoints = 0  # that are left after Ultralytics' filter

    def forward(self, sigma: Tensor, log_phi: Tensor, error: Tensor, target_weight: Tensor | None = None) -> Tensor:
        """See Ultralytics' class."""
        self.keypoints, self.value = len(error), super().forward(sigma, log_phi, error, target_weight)
        return self.value


class PoseFlowLoss(OfGlobalBatch, PoseLoss26):
    """Of boxes and keypoints, with the residual log-likelihood that 26 models have."""

    rle_loss: Any

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        if self.rle_loss is not None:
            self.rle_loss = _KeptRLE(use_target_weight=True).to(self.device)

    def loss(self, preds: dict[str, Tensor], batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `OfGlobalBatch`."""
        try:
            return super().loss(preds, batch)
        finally:
            if self.rle_loss is not None:
                self.rle_loss.value, self.rle_loss.keypoints = None, 0

    def completed(
        self, terms: Tensor, items: dict[str, Tensor], preds: dict[str, Tensor], batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The likelihood before it is clamped, which is done by its mean over all ranks."""
        if (rle := self.rle_loss) is None:
            return terms, items
        value = rle.value if rle.value is not None else terms.new_zeros(())
        self.sums[KEYPOINTS] = terms.new_full((), rle.keypoints)
        self.sums["likelihood"] = value.detach() * rle.keypoints
        if rle.value is not None:
            value = value * self.hyp.rle
            terms = torch.cat((terms[:-1], (value * len(preds["boxes"]))[None]))
            items = items | {"rle_loss": value.detach()}
        return terms, items

    def factor(self, name: str, total: dict[str, Tensor]) -> Tensor:
        """See `OfGlobalBatch`."""
        factor = super().factor(name, total)
        return factor * (total["likelihood"] > 0) if name == "rle_loss" else factor


def end_of_epoch(model: DetectionModel) -> None:
    """Move the weights of an end-to-end model's two losses on by one epoch; on every rank."""
    if hasattr(model.criterion, "update"):
        model.criterion.update()


def set_length(model: DetectionModel, epochs: int) -> None:
    """So many epochs are trained in all, by which an end-to-end model weighs its two losses; on every rank."""
    model.args.epochs = epochs
