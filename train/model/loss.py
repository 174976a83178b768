"""Ultralytics' detection loss as the same function of the global batch for any number of processes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss


class DetectionLoss(v8DetectionLoss):
    """Ultralytics' loss, divided by the target-score sum of the global batch instead of by this rank's.

    Ultralytics divides each rank's loss by that rank's own sum, so the gradients of two processes differ from those of
    one process at the same global batch. Here the mean over ranks, which DDP takes, is what one process computes.

    A loss of one's own is one more name in `loss_names` and one more element of `get_assigned_targets_and_loss`: bars,
    lines, results.csv, its picture and the trackers then have it, for training and validation.

    Args:
        model: whose outputs are judged.
        sum_over_ranks: collective sum of a scalar; None divides by this rank's own sum, as Ultralytics does.
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
        self.rescale: Tensor | float = 1.0
        if sum_over_ranks is None:
            return
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


def build_criterion(
    model: DetectionModel, sum_over_ranks: Callable[[Tensor], Tensor] | None = None, ranks: int = 1
) -> DetectionLoss | E2ELoss:
    """The loss that fits the model's head, in both branches where it is end to end (see `DetectionLoss`).

    Give it to the model after ModelEMA has copied that.
    """

    def loss(model: nn.Module, **kwargs: Any) -> DetectionLoss:
        return DetectionLoss(model, sum_over_ranks, ranks, **kwargs)

    end_to_end = isinstance(model.init_criterion(), E2ELoss)
    return E2ELoss(model, loss_fn=loss) if end_to_end else loss(model)


def end_of_epoch(model: DetectionModel) -> None:
    """Move the weights of an end-to-end model's two losses on by one epoch; on every rank."""
    if hasattr(model.criterion, "update"):
        model.criterion.update()


def set_length(model: DetectionModel, epochs: int) -> None:
    """So many epochs are trained in all, by which an end-to-end model weighs its two losses; on every rank."""
    model.args.epochs = epochs
