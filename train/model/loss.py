"""Ultralytics' detection loss as the same function of the global batch for any number of processes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss

from train.config.errors import InputError


class GlobalLoss(v8DetectionLoss):
    """Ultralytics' loss, divided by the target-score sum of the global batch instead of by this rank's.

    Ultralytics divides each rank's loss by that rank's own sum, so the gradients of two processes differ from those of
    one process at the same global batch. Here the mean over ranks, which DDP takes, is what one process computes.
    """

    assigner: Any

    def __init__(self, model: nn.Module, sum_over_ranks: Callable[[Tensor], Tensor], ranks: int, **kwargs: Any):
        super().__init__(model, **kwargs)
        assign = self.assigner

        def assign_and_sum(*args: Any, **kwargs: Any) -> Any:
            assigned = assign(*args, **kwargs)
            local = assigned[2].sum()  # target scores, (images, anchors, classes)
            total = sum_over_ranks(local.float())  # collective: every rank, once for each criterion and batch
            self.rescale = ranks * local.clamp(min=1).float() / total.clamp(min=1)
            return assigned

        self.assigner = assign_and_sum

    def get_assigned_targets_and_loss(self, preds: dict[str, Tensor], batch: dict[str, Any], **kwargs: Any) -> tuple:
        """Ultralytics' assigned targets and (box, cls, dfl) loss, with its denominator exchanged."""
        assigned, loss, _ = super().get_assigned_targets_and_loss(preds, batch, **kwargs)
        loss = loss * self.rescale
        return assigned, loss, dict(zip(self.loss_names, loss.detach(), strict=True))


def use_global_loss(model: DetectionModel, sum_over_ranks: Callable[[Tensor], Tensor], ranks: int) -> None:
    """Give the model the global loss, in both branches where it is end to end. Call it after ModelEMA has copied it."""

    def loss(model: nn.Module, **kwargs: Any) -> GlobalLoss:
        return GlobalLoss(model, sum_over_ranks, ranks, **kwargs)

    plain = model.init_criterion()
    if isinstance(plain, E2ELoss):
        model.criterion = E2ELoss(model, loss_fn=loss)
    elif type(plain) is v8DetectionLoss:
        model.criterion = loss(model)
    else:
        raise InputError(f"{type(plain).__name__} has no global normaliser here; add --local-loss-norm.")


def end_of_epoch(model: DetectionModel) -> None:
    """Move the weights of an end-to-end model's two losses on by one epoch; on every rank."""
    if hasattr(model.criterion, "update"):
        model.criterion.update()
