"""Evaluation on all ranks: detections of this rank's images, one gather, one AP.

`evaluate()` is the only evaluation path; training and validate.py both call it. Detections are float64 rows
(image id, x, y, width, height, score, category id): x, y is the top left corner, in pixels of the original image.
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
from ultralytics.utils.ops import scale_boxes, xyxy2ltwh

from train.config.options import EvalConfig
from train.data.loaders import as_images
from train.evaluation.coco import AT_BEST, Curves, coco_metrics
from train.evaluation.truth import Truth
from train.model.inference import detect, validation_losses
from train.processes.collectives import on_main
from train.processes.signals import Ended
from train.processes.stops import Stop

STAGES = ("data", "inference", "postprocess", "gather", "metric")


@dataclass
class Evaluation:
    """What was found. Every rank holds the same, but the detections: they are the main process's alone."""

    metrics: dict[str, float]  # COCO's twelve, by METRICS; P, R, F1; -1 where there is nothing to measure
    per_class: dict[str, dict[str, float]]  # images, boxes, P, R, F1, AP50, AP75, AP by class name
    curves: Curves
    images: int
    boxes: int
    losses: dict[str, float] = field(default_factory=dict)  # mean over the images, where the model has a criterion
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)  # by STAGES: of the slowest rank, and mean
    detections: np.ndarray = field(default_factory=lambda: np.zeros((0, 7)))  # float64, by image id, NMS order within

    @property
    def fitness(self) -> float:
        """Ultralytics' measure of the best epoch."""
        return 0.1 * self.metrics["AP50"] + 0.9 * self.metrics["AP"]


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
    laps = _Laps(accelerator.device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision or "no")
    ids: list[int] = []
    found: list[torch.Tensor] = []
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
        boxes = detect(raw, model, config.conf, config.iou, config.max_det)
        for box, shape, ratio_pad in zip(boxes, batch["ori_shape"], batch["ratio_pad"], strict=True):
            scale_boxes(images.shape[2:], box[:, :4], shape, ratio_pad)  # in place
        ids += batch["id"]
        found += boxes
        del images, raw  # else they would live through the next forward
        laps.end("postprocess")
    if stop is not None:
        stop.agree()  # collective
    shard = {
        "weights": model.digest,
        "ids": ids,
        "counts": [len(boxes) for boxes in found],
        "boxes": torch.cat(found).cpu().numpy() if found else np.zeros((0, 6), np.float32),  # the one copy to the host
        "losses": [(first, images, items.tolist()) for first, images, items in losses],
    }
    del found
    # Collective, and one element per rank: a flat list would be cut to the size of the last batch.
    shards = accelerator.gather_for_metrics([shard], use_gather_object=True)
    _check_ids([i for shard in shards for i in shard["ids"]], truth.ids.tolist())
    if len({shard["weights"] for shard in shards}) > 1:
        raise RuntimeError("The ranks evaluated different weights: " + ", ".join(shard["weights"] for shard in shards))
    means = _mean_losses([batch for shard in shards for batch in shard["losses"]])
    categories = np.array([*truth.names], dtype=np.float64)
    main = accelerator.is_main_process  # nobody else needs them
    rows = _as_rows(shards, categories) if main else np.zeros((0, 7))
    del shard, shards
    laps.end("gather")
    result = measure(truth, rows, config, accelerator, stop)
    laps.end("metric")
    seconds = accelerator.gather(torch.tensor([list(laps.seconds.values())], device=accelerator.device))  # (ranks, 5)
    slowest, mean = seconds.amax(0).tolist(), seconds.mean(0).tolist()
    result.losses = dict(zip(model.criterion.loss_names, means, strict=True)) if model.criterion is not None else {}
    result.seconds = dict(zip(STAGES, zip(slowest, mean, strict=True), strict=True))
    return result


def measure(
    truth: Truth, rows: np.ndarray, config: EvalConfig, accelerator: Accelerator, stop: Stop | None = None
) -> Evaluation:
    """COCO's metric on the main process, for every rank (collective).

    Args:
        truth: of the split.
        rows: (n, 7) float64 detections, see the module's first lines, by image id.
        config: the evaluator and its --max-dets.
        accelerator: of the run.
        stop: of a training, as in `evaluate`.
    """

    def compute() -> tuple[dict[str, float], Curves, Counter, Counter] | Ended:
        marks = truth.marks()
        boxes = Counter(marks.category.tolist())
        images = Counter(np.unique(np.stack((marks.category, marks.image)), axis=1)[0].tolist())
        del marks
        try:
            with stop.cutting() if stop is not None else nullcontext():
                return *coco_metrics(truth, rows, config.coco_eval, config.max_dets), boxes, images
        except Ended as ended:
            return ended

    found = on_main(accelerator, compute)
    if isinstance(found, Ended):
        raise found
    metrics, curves, boxes, images = found
    best, by_confidence, per_class = curves.best, (curves.p, curves.r, curves.f1), {}
    for id_, name in truth.names.items():
        k = curves.category_ids.index(id_)
        ap = {metric: float(values[k]) for metric, values in curves.ap.items()}
        pr = {metric: float(values[k, best]) for metric, values in zip(AT_BEST, by_confidence, strict=True)}
        per_class[name] = {"images": images[id_], "boxes": boxes[id_]} | pr | ap
    return Evaluation(metrics, per_class, curves, len(truth), sum(boxes.values()), detections=rows)


def _mean_losses(batches: list[tuple[int, int, list[float]]]) -> list[float]:
    """Mean over the images of the batches' losses, summed in the order of the images, whichever rank had them."""
    images = sum(count for _, count, _ in batches)
    weighted = [np.array(items) * count for _, count, items in sorted(batches)]
    return (np.sum(weighted, 0) / images).tolist() if batches else []


def _as_rows(shards: list[dict[str, Any]], categories: np.ndarray) -> np.ndarray:
    """The ranks' boxes (n, 6), xyxy in original pixels, as COCO rows (m, 7) float64 by image id."""
    image = np.concatenate([np.repeat(np.array(shard["ids"], np.float64), shard["counts"]) for shard in shards])
    boxes = np.concatenate([shard["boxes"] for shard in shards])
    # Stable: an image's detections come from one rank, and their NMS order decides between tied scores.
    order = np.argsort(image, kind="stable")
    rows = np.empty((len(image), 7))
    rows[:, 0] = image[order]
    rows[:, 1:5] = xyxy2ltwh(boxes[order, :4].astype(np.float64))
    rows[:, 5] = boxes[order, 4]
    rows[:, 6] = categories[boxes[order, 5].astype(int)]
    return rows


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
