"""COCO's metric on all ranks: detections of this rank's images, one gather, one AP.

`evaluate()` is the only evaluation path; training and validate.py both call it. Detections are float64 rows
(image id, x, y, width, height, score, category id): x, y is the top left corner, in pixels of the original image.
"""

import contextlib
import hashlib
import io
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from ultralytics.utils.ops import scale_boxes, xyxy2ltwh

from train.config import EvalConfig
from train.data import as_images
from train.model import detect, validation_losses
from train.processes import on_main

# COCOeval.stats in its order
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
AT_BEST = ("P", "R", "F1")  # at the confidence with the highest mean F1
COLUMNS = ("images", "boxes", *AT_BEST, "AP50", "AP75", "AP")  # of the table by class
STAGES = ("data", "inference", "postprocess", "gather", "metric")
CHUNK = 256  # images that are matched at a time


# Evaluation -----------------------------------------------------------------------------------------------------------
@dataclass
class Evaluation:
    """What was found. Every rank holds the same."""

    metrics: dict[str, float]  # COCO's twelve, by METRICS; P, R, F1; -1 where there is nothing to measure
    per_class: dict[str, dict[str, float]]  # images, boxes, P, R, F1, AP50, AP75, AP by class name
    curves: "Curves"
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
        if self.waits:  # costs nothing: the next thing on the host, NMS or the gather, waits for the device anyway
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now


@torch.inference_mode()
def evaluate(
    model: Any, loader: Iterable[dict], truth: dict[str, Any], config: EvalConfig, accelerator: Accelerator
) -> Evaluation:
    """Detect on this rank's batches, gather, and measure once (collective).

    Args:
        model: an `inference_copy`; with a criterion, losses are measured too.
        loader: this rank's validation batches. Ranks may hold different numbers, so nothing in the loop is collective.
        truth: COCO ground truth of the whole split, categories in the order of the class indices.
        config: `mixed_precision` is the forward's.

    Raises:
        RuntimeError: on all ranks, where an image was evaluated twice or not at all, or the ranks' weights differ.
    """
    laps = _Laps(accelerator.device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision or "no")
    ids: list[int] = []
    found: list[torch.Tensor] = []
    losses: list[tuple[int, int, torch.Tensor]] = []  # first image, images, mean losses
    for batch in loader:
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
        laps.end("postprocess")
    shard = {
        "weights": _digest(model),
        "ids": ids,
        "counts": [len(boxes) for boxes in found],
        "boxes": torch.cat(found).cpu().numpy() if found else np.zeros((0, 6), np.float32),  # the one copy to the host
        "losses": [(first, images, items.tolist()) for first, images, items in losses],
    }
    del found
    # Collective, and one element per rank: a flat list would be cut to the size of the last batch.
    shards = accelerator.gather_for_metrics([shard], use_gather_object=True)
    _check_ids([i for shard in shards for i in shard["ids"]], [image["id"] for image in truth["images"]])
    if len({shard["weights"] for shard in shards}) > 1:
        raise RuntimeError("The ranks evaluated different weights: " + ", ".join(shard["weights"] for shard in shards))
    means = _mean_losses([batch for shard in shards for batch in shard["losses"]])
    categories = np.array([category["id"] for category in truth["categories"]], dtype=np.float64)
    rows = _as_rows(shards, categories)
    del shard, shards
    laps.end("gather")
    result = measure(truth, rows, config, accelerator)
    laps.end("metric")
    seconds = accelerator.gather(torch.tensor([list(laps.seconds.values())], device=accelerator.device))  # (ranks, 5)
    slowest, mean = seconds.amax(0).tolist(), seconds.mean(0).tolist()
    result.losses = dict(zip(model.criterion.loss_names, means, strict=True)) if model.criterion is not None else {}
    result.seconds = dict(zip(STAGES, zip(slowest, mean, strict=True), strict=True))
    return result


def measure(truth: dict[str, Any], rows: np.ndarray, config: EvalConfig, accelerator: Accelerator) -> Evaluation:
    """COCO's metric on the main process, for every rank (collective).

    Args:
        truth: COCO ground truth.
        rows: (n, 7) float64 detections, see the module's first lines, by image id.
        config: the evaluator and its --max-dets.
        accelerator: of the run.
    """
    metrics, curves = on_main(accelerator, lambda: coco_metrics(truth, rows, config.coco_eval, config.max_dets))
    boxes = Counter(a["category_id"] for a in truth["annotations"])
    images = Counter(c for _, c in {(a["image_id"], a["category_id"]) for a in truth["annotations"]})
    best, by_confidence, per_class = curves.best, (curves.p, curves.r, curves.f1), {}
    for category in truth["categories"]:
        k = curves.category_ids.index(category["id"])
        ap = {name: float(values[k]) for name, values in curves.ap.items()}
        pr = {name: float(values[k, best]) for name, values in zip(AT_BEST, by_confidence, strict=True)}
        per_class[category["name"]] = {"images": images[category["id"]], "boxes": boxes[category["id"]]} | pr | ap
    return Evaluation(metrics, per_class, curves, len(truth["images"]), len(truth["annotations"]), detections=rows)


def _digest(model: torch.nn.Module) -> str:
    """A hash of the weights and buffers that are evaluated."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().cpu().numpy().data)
    return digest.hexdigest()[:16]


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


# The metric -----------------------------------------------------------------------------------------------------------
@dataclass
class Curves:
    """What lies behind the numbers, by category in the order of `category_ids` and, at IoU 0.50, by confidence.

    They are read off COCO's own precision-recall curve, whose recalls are 0.01 apart and whose precision does not rise
    with recall. -1 stands for a category without truth.
    """

    category_ids: list[int]
    ap: dict[str, np.ndarray]  # AP50, AP75, AP: (categories,)
    pr: np.ndarray  # (categories, 101) precision at recall 0, 0.01, …, 1
    p: np.ndarray  # (categories, 1000) precision, and so on, at confidence 0 to 1
    r: np.ndarray
    f1: np.ndarray

    @property
    def best(self) -> int:
        """Index of the confidence with the highest mean F1."""
        measured = self.f1[self.f1[:, 0] >= 0]
        return int(measured.mean(0).argmax()) if len(measured) else 0


def metric_names(max_dets: tuple[int, int, int]) -> tuple[str, ...]:
    """COCO's twelve names, the AR named after the detections per image, and P, R and F1."""
    return (*METRICS[:6], *(f"AR{count}" for count in max_dets), *METRICS[9:], *AT_BEST)


def coco_metrics(
    truth: dict[str, Any],
    detections: np.ndarray,
    evaluator: str = "hotcoco",
    max_dets: tuple[int, int, int] = (1, 10, 100),
) -> tuple[dict[str, float], Curves]:
    """COCO's twelve numbers, with P, R and F1 at the confidence of the highest mean F1, and the curves behind them.

    Args:
        truth: a COCO annotation dict.
        detections: (n, 7) float64 rows by image id, see the module's first lines.
        evaluator: `hotcoco`, or `pycocotools` through that package alone; the numbers are the same, bit for bit.
        max_dets: detections per image that AR is measured at; AP is measured at the last.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # both print their table; the caller decides what is shown
        result = (_hotcoco if evaluator == "hotcoco" else _pycocotools)(truth, detections, list(max_dets))
        result.accumulate()
        result.summarize()
    precision, scores = (result.eval[name][:, :, :, 0, -1] for name in ("precision", "scores"))  # (IoUs, recalls, K)
    metrics = dict(zip(metric_names(max_dets), map(float, result.stats), strict=False))
    metrics["AP"] = _mean(precision)  # pycocotools' own is fixed to 100 detections; with 100 it is this
    categories = range(precision.shape[2])
    ap = {
        "AP50": np.array([_mean(precision[0, :, k]) for k in categories]),
        "AP75": np.array([_mean(precision[5, :, k]) for k in categories]),
        "AP": np.array([_mean(precision[:, :, k]) for k in categories]),
    }
    curves = Curves(sorted(c["id"] for c in truth["categories"]), ap, *_by_confidence(precision[0], scores[0]))
    for name, values in zip(AT_BEST, (curves.p, curves.r, curves.f1), strict=True):
        metrics[name] = _mean(values[:, curves.best])
    return metrics, curves


def _hotcoco(truth: dict[str, Any], detections: np.ndarray, max_dets: list[int]) -> Any:
    """hotcoco's evaluator after matching. Matched in chunks of images it needs half the memory, for the same bits."""
    import hotcoco

    params = hotcoco.Params("bbox")
    params.maxDets = max_dets
    stream = hotcoco.StreamingEval(truth["categories"], "bbox", params=params)
    annotations = defaultdict(list)
    for annotation in truth["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    images = sorted(truth["images"], key=lambda image: image["id"])
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        first, last = np.searchsorted(detections[:, 0], (chunk[0]["id"], chunk[-1]["id"] + 1))
        stream.update(chunk, [a for image in chunk for a in annotations[image["id"]]], detections[first:last])
    return stream.finalize()


def _pycocotools(truth: dict[str, Any], detections: np.ndarray, max_dets: list[int]) -> Any:
    """pycocotools' evaluator after matching."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco = COCO()
    # its index and results write into the annotations
    coco.dataset = truth | {"annotations": [dict(annotation) for annotation in truth["annotations"]]}
    coco.createIndex()
    if len(detections):
        found = coco.loadRes(detections)
    else:  # loadRes fails on none at all
        found = COCO()
        found.dataset = truth | {"annotations": []}
        found.createIndex()
    result = COCOeval(coco, found, "bbox")
    result.params.maxDets = max_dets
    result.evaluate()
    return result


def _mean(values: np.ndarray) -> float:
    """COCO's mean: -1 entries have no ground truth; -1 where there is no other."""
    measured = values[values > -1]
    return float(measured.mean()) if len(measured) else -1.0


def _by_confidence(precision: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Precision by recall (categories, 101), and precision, recall and F1 by confidence (categories, 1000).

    Args:
        precision: (101, categories) at one IoU; 0 where the recall is not reached, -1 without truth.
        scores: (101, categories) confidence at that recall; falls with recall.
    """
    confidence = np.linspace(0, 1, 1000)
    p, r, f1 = (np.full((precision.shape[1], len(confidence)), -1.0) for _ in range(3))
    for k in range(precision.shape[1]):
        if precision[0, k] < 0:
            continue
        reached = int((precision[:, k] > 0).sum())
        # how many recalls are reached with at least that confidence
        last = np.searchsorted(-scores[:reached, k], -confidence, side="right") - 1
        p[k] = np.where(last < 0, float(reached > 0), precision[last, k])
        r[k] = np.where(last < 0, 0.0, last / (len(precision) - 1))
        f1[k] = 2 * p[k] * r[k] / np.maximum(p[k] + r[k], 1e-16)
    return precision.T, p, r, f1


def diagnose(truth: dict[str, Any], detections: np.ndarray, confidence: float = 0.25) -> dict[str, Any] | None:
    """What goes wrong, from hotcoco, on the detections from that confidence on; None where hotcoco is not installed.

    Returns:
        `confusion`: (K+1, K+1) counts, rows truth, columns detections, the last for background, in the order of the
        category ids; `tide`: AP50 lost by kind of error, over all detections; `images`: true and false positives,
        misses and F1 by image id.
    """
    try:
        import hotcoco
    except ImportError:
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        coco = hotcoco.COCO(truth)
        everything = hotcoco.COCOeval(coco, coco.loadRes(detections), "bbox")
        everything.evaluate()
        tide = everything.tide_errors()["delta_ap"]
        sure = hotcoco.COCOeval(coco, coco.loadRes(detections[detections[:, 5] >= confidence]), "bbox")
        sure.evaluate()
        return {
            "confusion": sure.confusion_matrix()["matrix"],
            "tide": {kind: tide[kind] for kind in ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")},
            "images": sure.image_diagnostics()["img_summary"],
        }
