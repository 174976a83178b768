"""Evaluation on all ranks: detections of this rank's images, one gather, one AP.

`evaluate()` is the only evaluation path; training and validate.py both call it.
"""

import time
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from ultralytics.utils.ops import xyxy2ltwh

from train.config.options import EvalConfig
from train.data.loaders import as_images
from train.evaluation.coco import AT_BEST, Curves, coco_metrics
from train.evaluation.detections import Detections, prefix
from train.evaluation.truth import Truth
from train.model.inference import detect, in_original, validation_losses
from train.model.tasks import task_of
from train.processes.collectives import gathered_by_main, on_main
from train.processes.signals import Ended
from train.processes.stops import Stop

STAGES = ("data", "inference", "postprocess", "gather", "metric")


@dataclass
class Evaluation:
    """What was found. Every rank holds the same, but the detections: they are the main process's alone."""

    metrics: dict[str, float]  # by `metric_names`; -1 where there is nothing to measure
    per_class: dict[str, dict[str, float]]  # images, boxes, and by iou type MEASURED, by class name
    curves: dict[str, Curves]  # by iou type
    images: int
    boxes: int
    detections: Detections
    losses: dict[str, float] = field(default_factory=dict)  # mean over the images, where the model has a criterion
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)  # by STAGES: of the slowest rank, and mean

    @property
    def iou_types(self) -> tuple[str, ...]:
        """What was measured."""
        return tuple(self.curves)

    @property
    def fitness(self) -> float:
        """Ultralytics' measure of the best epoch: the AP of boxes, and that of masks or keypoints added to it."""
        return sum(self.metrics[f"{prefix(iou_type)}AP"] for iou_type in self.iou_types)


class _Laps:
    """Seconds by stage."""

    def __init__(self, device: torch.device):
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.waits = device.type != "cpu"
        self.last = time.perf_counter()

    def end(self, stage: str) -> None:
        """Everything since the end of the last stage was this one."""
        if self.waits and stage == "inference":  # costs nothing: the next thing on the host, NMS, waits anyway
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now


@torch.inference_mode()
def evaluate(
    model: Any,
    loader: Iterable[dict],
    truth: Truth,
    config: EvalConfig,
    accelerator: Accelerator,
    stop: Stop | None = None,
) -> Evaluation:
    """Detect on this rank's batches, gather, and measure once (collective).

    Args:
        model: an `inference_copy`; with a criterion, losses are measured too.
        loader: this rank's validation batches. Ranks may hold different numbers, so nothing in the loop is collective.
        truth: of the whole split; the main process alone makes more of it than ids.
        config: `mixed_precision` is the forward's.
        stop: of a training, whose validation is cut off on all ranks where one is told to end.

    Raises:
        Ended: on all ranks, where one was told to end.
        RuntimeError: on all ranks, where an image was evaluated twice or not at all, or the ranks' weights differ.
    """
    laps, task = _Laps(accelerator.device), task_of(model)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision or "no")
    ids: list[int] = []
    found: list[torch.Tensor] = []
    extras: list[Any] = []
    losses: list[tuple[int, int, torch.Tensor]] = []  # first image, images, mean losses
    for batch in loader:
        if stop is not None and stop.asked is not None:
            break
        laps.end("data")
        images = as_images(batch["img"], config.memory_format)
        with torch.autocast(accelerator.device.type, dtype, enabled=dtype is not None):
            raw = model(images)
        if model.criterion is not None:
            losses.append((batch["id"][0], len(images), validation_losses(raw, model, batch)))
        laps.end("inference")
        here = detect(raw, model, config.conf, config.iou, config.max_det)
        boxes, beside = in_original(here, raw, model, batch)
        ids += batch["id"]
        found += boxes
        extras += beside
        del here, beside
        del images, raw  # else they would live through the next forward
        laps.end("postprocess")
    if stop is not None:
        stop.agree()  # collective
    shard = {
        "ids": ids,
        "counts": [len(boxes) for boxes in found],
        "boxes": torch.cat(found).cpu().numpy() if found else np.zeros((0, 6), np.float32),  # the one copy to the host
        "extras": _joined(extras),
    }
    del found, extras
    about = {"ids": ids, "weights": model.digest, "losses": [(*batch, items.tolist()) for *batch, items in losses]}
    # Collective, and one element per rank: a flat list would be cut to the size of the last batch.
    every = accelerator.gather_for_metrics([about], use_gather_object=True)
    _check_ids([i for told in every for i in told["ids"]], truth.ids.tolist())
    if len({told["weights"] for told in every}) > 1:
        raise RuntimeError("The ranks evaluated different weights: " + ", ".join(told["weights"] for told in every))
    means = _mean_losses([batch for told in every for batch in told["losses"]])
    categories = np.array([*truth.names], dtype=np.float64)
    detections = as_detections(gathered_by_main(accelerator, shard), categories, task.iou_types)
    del shard
    laps.end("gather")
    result = measure(truth, detections, config, accelerator, stop)
    laps.end("metric")
    seconds = accelerator.gather(torch.tensor([list(laps.seconds.values())], device=accelerator.device))  # (ranks, 5)
    slowest, mean = seconds.amax(0).tolist(), seconds.mean(0).tolist()
    result.losses = dict(zip(model.criterion.loss_names, means, strict=True)) if model.criterion is not None else {}
    result.seconds = dict(zip(STAGES, zip(slowest, mean, strict=True), strict=True))
    return result


def measure(
    truth: Truth, detections: Detections, config: EvalConfig, accelerator: Accelerator, stop: Stop | None = None
) -> Evaluation:
    """COCO's metric on the main process, for every rank (collective).

    Args:
        truth: of the split.
        detections: the main process's, by which it is measured; the others have none.
        config: the evaluator and its --max-dets.
        accelerator: of the run.
        stop: of a training, as in `evaluate`.
    """

    def compute() -> tuple[dict[str, tuple[dict[str, float], Curves]], Counter, Counter] | Ended:
        marks = truth.marks()
        boxes = Counter(marks.category.tolist())
        images = Counter(np.unique(np.stack((marks.category, marks.image)), axis=1)[0].tolist())
        del marks
        try:
            with stop.cutting() if stop is not None else nullcontext():
                options = config.coco_eval, config.max_dets
                measured = {kind: coco_metrics(truth, detections, *options, kind) for kind in detections.iou_types}
                return measured, boxes, images
        except Ended as ended:
            return ended

    found = on_main(accelerator, compute)
    if isinstance(found, Ended):
        raise found
    measured, boxes, images = found
    per_class: dict[str, dict[str, float]] = {
        name: {"images": images[id_], "boxes": boxes[id_]} for id_, name in truth.names.items()
    }
    metrics: dict[str, float] = {}
    for kind, (values, curves) in measured.items():
        metrics |= {prefix(kind) + name: value for name, value in values.items()}
        by_confidence = dict(zip(AT_BEST, (curves.p, curves.r, curves.f1), strict=True))
        for id_, name in truth.names.items():
            k = curves.category_ids.index(id_)
            own = {metric: float(table[k, curves.best]) for metric, table in by_confidence.items()}
            own |= {metric: float(column[k]) for metric, column in curves.ap.items()}
            per_class[name] |= {prefix(kind) + metric: value for metric, value in own.items()}
    every = {kind: curves for kind, (_, curves) in measured.items()}
    return Evaluation(metrics, per_class, every, len(truth), sum(boxes.values()), detections)


def _mean_losses(batches: list[tuple[int, int, list[float]]]) -> list[float]:
    """Mean over the images of the batches' losses, summed in the order of the images, whichever rank had them."""
    images = sum(count for _, count, _ in batches)
    weighted = [np.array(items) * count for _, count, items in sorted(batches)]
    return (np.sum(weighted, 0) / images).tolist() if batches else []


def _joined(extras: list[Any]) -> list[bytes] | np.ndarray | None:
    """What the detections of all images have beside boxes: one list, or one array on the host."""
    if not extras or extras[0] is None:
        return None
    if torch.is_tensor(extras[0]):
        keypoints: np.ndarray = torch.cat(extras).cpu().numpy()
        return keypoints
    return [one for image in extras for one in image]


def as_detections(
    shards: list[dict[str, Any]], categories: np.ndarray, iou_types: tuple[str, ...] = ("bbox",)
) -> Detections:
    """The ranks' boxes (n, 6), xyxy in original pixels, and what is beside them, as COCO's rows by image id."""
    if not shards:
        return Detections(np.zeros((0, 7)))
    image = np.concatenate([np.repeat(np.array(shard["ids"], np.float64), shard["counts"]) for shard in shards])
    boxes = np.concatenate([shard["boxes"] for shard in shards])
    extras = [shard["extras"] for shard in shards if shard.get("extras") is not None]
    # Stable: an image's detections come from one rank, and their NMS order decides between tied scores.
    order = np.argsort(image, kind="stable")
    rows = np.empty((len(image), 7))
    rows[:, 0] = image[order]
    rows[:, 1:5] = xyxy2ltwh(boxes[order, :4].astype(np.float64))
    rows[:, 5] = boxes[order, 4]
    rows[:, 6] = categories[boxes[order, 5].astype(int)]
    found = Detections(rows)
    if "segm" in iou_types:
        masks = [mask for part in extras for mask in part]
        found.masks = [masks[i] for i in order]
    if "keypoints" in iou_types:
        shape = extras[0].shape[1:] if extras else (0, 3)
        found.keypoints = np.empty((len(order), *shape), np.float32)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        for part, where in zip(extras, np.split(place, np.cumsum([*map(len, extras)])), strict=False):
            found.keypoints[where] = part  # one copy of what takes most room
    return found


def _check_ids(evaluated: list[int], expected: list[int]) -> None:
    """Every image of the data set exactly once, or an error that names some."""
    counts = Counter(evaluated)
    counts.subtract(expected)
    wrong = {id_: n for id_, n in counts.items() if n}
    if wrong:
        missing = sorted(id_ for id_, n in wrong.items() if n < 0)[:5]
        twice = sorted(id_ for id_, n in wrong.items() if n > 0)[:5]
        raise RuntimeError(
            f"Validation saw {len(evaluated)} images of {len(expected)}: image ids missing {missing}, "
            f"unknown or more than once {twice} (at most five each)."
        )
