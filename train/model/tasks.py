"""What differs between detection, segmentation and pose. Nothing else asks which task it is."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pycocotools.cocoeval import Params
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect, Pose, Pose26, Segment, Segment26, v10Detect
from ultralytics.nn.tasks import DetectionModel, PoseModel, SegmentationModel
from ultralytics.utils.loss import E2ELoss

from train.config.errors import InputError
from train.config.objects import Carries, Objects
from train.config.options import C
from train.model.loss import OfGlobalBatch, PoseFlowLoss, PoseLoss, SegmentationLoss, SegmentationLoss26
from train.model.outputs import Letterbox, encoded_masks, nothing, scaled_keypoints


@dataclass(frozen=True)
class Task:
    """A task, which train/<name>.py trains."""

    name: str  # as Ultralytics names it
    model: type[DetectionModel]
    losses: dict[type[Detect], type[OfGlobalBatch]]  # by the model's head, its last layer
    carries: Carries  # what its labels consist of
    iou_types: tuple[str, ...]  # of COCO, that it is measured by
    extra: Callable[[Tensor, Letterbox, Detect, dict[str, Any], int], Any]  # what a detection has beside its box


TASKS = {
    task.name: task
    for task in (
        Task("detect", DetectionModel, {Detect: OfGlobalBatch, v10Detect: OfGlobalBatch}, "boxes", ("bbox",), nothing),
        Task(
            "segment",
            SegmentationModel,
            {Segment: SegmentationLoss, Segment26: SegmentationLoss26},
            "polygons",
            ("bbox", "segm"),
            encoded_masks,
        ),
        Task(
            "pose",
            PoseModel,
            {Pose: PoseLoss, Pose26: PoseFlowLoss},
            "keypoints",
            ("bbox", "keypoints"),
            scaled_keypoints,
        ),
    )
}
HEADS = {head.__name__: task for task in TASKS.values() for head in task.losses}  # what trains a head


def task_of(model: DetectionModel) -> Task:
    """The task that a model is of, by its head."""
    return HEADS[type(model.model[-1]).__name__]


def check_head(head: str, source: str, task: Task | None) -> None:
    """Raise InputError where a model ends in a head that is not this task's, or, without a task, of none here.

    Args:
        head: name of the last layer's class.
        source: of the model, as a message begins.
        task: that is wanted.
    """
    if head not in HEADS:
        raise InputError(f"{source} ends in a {head[:40]} head; these scripts are for YOLO {_listed()} models.")
    if task is not None and HEADS[head] is not task:
        script = f"train/{HEADS[head].name}.py"
        raise InputError(f"{source} ends in a {head} head, of a {HEADS[head].name} model; {script} trains that.")


def _listed() -> str:
    *first, last = TASKS
    return f"{', '.join(first)} and {last}"


def build_criterion(
    model: DetectionModel, sum_over_ranks: Callable[[Tensor], Tensor] | None = None, ranks: int = 1
) -> OfGlobalBatch | E2ELoss:
    """The loss that fits the model's head, in both branches where it is end to end (see `OfGlobalBatch`).

    Give it to the model after ModelEMA has copied that.
    """
    kind = task_of(model).losses[type(model.model[-1])]

    def loss(model: nn.Module, **kwargs: Any) -> OfGlobalBatch:
        return kind(model, sum_over_ranks, ranks, **kwargs)

    end_to_end = isinstance(model.init_criterion(), E2ELoss)
    return E2ELoss(model, loss_fn=loss) if end_to_end else loss(model)


def with_sigmas(config: C, task: Task, objects: Objects) -> C:
    """The configuration with the OKS sigma of each keypoint filled in, where the task has keypoints: those of --sigmas,
    else the data set's, else COCO's for its 17, else 1/n.

    Raises:
        InputError: there are not as many as keypoints, or one is not above 0.
    """
    given = getattr(config, "sigmas", None)
    if task.carries != "keypoints":
        if given:
            raise InputError(f"--sigmas are of keypoints, and this is a {task.name} model.")
        return config
    count = objects.keypoints[0]
    if given is not None and (len(given) != count or not all(math.isfinite(sigma) and sigma > 0 for sigma in given)):
        raise InputError(f"--sigmas is {[*given]}; it must be {count} numbers above 0, one for each keypoint.")
    coco = Params(iouType="keypoints").kpt_oks_sigmas.tolist()
    own = coco if objects.keypoints == (17, 3) else [1 / count] * count
    filled: dict[str, Any] = {"sigmas": tuple(given or objects.sigmas or own)}
    return replace(config, **filled)
