"""COCO's metric: the twelve numbers (of keypoints ten), the curves behind them, and what goes wrong."""

import contextlib
import sys
import threading
import warnings
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from train.config.errors import InputError
from train.evaluation.detections import Detections, prefix
from train.evaluation.truth import Truth
from train.processes.allocator import no_collection

try:
    import hotcoco
except ImportError as error:  # then pycocotools does what both can do
    hotcoco, missing = None, str(error)  # type: ignore[assignment]

# COCOeval.stats in its order
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KEYPOINT_METRICS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
KEYPOINT_DETS = 20  # detections in an image that COCO measures keypoints at
AT_BEST = ("P", "R", "F1")  # at the confidence with the highest mean F1
MEASURED = (*AT_BEST, "AP50", "AP75", "AP")  # of each class
COLUMNS = ("images", "boxes", *MEASURED)  # of the table by class
CHUNK = 256  # images that are matched at a time


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


class _Others:
    """The standard output without what this thread prints: others speak while it measures."""

    def __init__(self) -> None:
        self.out, self.thread = sys.stdout, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.thread else self.out.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.out, name)


def silenced() -> contextlib.AbstractContextManager:
    """What hotcoco and pycocotools print in here, on the main thread, is not seen; the caller decides what is shown."""
    return contextlib.redirect_stdout(_Others())  # type: ignore[type-var]


def metric_names(max_dets: tuple[int, int, int], iou_types: tuple[str, ...] = ("bbox",)) -> tuple[str, ...]:
    """The names of COCO's numbers by each of these, the AR named after the detections per image, and P, R and F1."""
    found: list[str] = []
    for iou_type in iou_types:
        names = (*METRICS[:6], *(f"AR{count}" for count in max_dets), *METRICS[9:])
        found += (prefix(iou_type) + name for name in (KEYPOINT_METRICS if iou_type == "keypoints" else names))
        found += (prefix(iou_type) + name for name in AT_BEST)
    return tuple(found)


def coco_metrics(
    truth: Truth,
    detections: Detections,
    evaluator: str = "hotcoco",
    max_dets: tuple[int, int, int] = (1, 10, 100),
    iou_type: str = "bbox",
) -> tuple[dict[str, float], Curves]:
    """COCO's numbers, with P, R and F1 at the confidence of the highest mean F1, and the curves behind them.

    Args:
        truth: of the split.
        detections: on it.
        evaluator: `hotcoco`, or `pycocotools` through that package alone; the numbers are the same, bit for bit.
        max_dets: detections per image that AR is measured at; AP is measured at the last. Keypoints have COCO's own.
        iou_type: COCO's `bbox`, `segm` or `keypoints`.
    """
    counts = [KEYPOINT_DETS] if iou_type == "keypoints" else list(max_dets)
    # Both print their table, and hotcoco warns of all that is not COCO's own.
    with silenced(), warnings.catch_warnings(), no_collection():
        warnings.filterwarnings("ignore", message="hotcoco")
        result = (_hotcoco if evaluator == "hotcoco" else _pycocotools)(truth, detections, counts, iou_type)
        result.accumulate()
        result.summarize()
    precision, scores = (result.eval[name][:, :, :, 0, -1] for name in ("precision", "scores"))  # (IoUs, recalls, K)
    names = KEYPOINT_METRICS if iou_type == "keypoints" else metric_names(max_dets)
    metrics = dict(zip(names, map(float, result.stats), strict=False))
    metrics["AP"] = _mean(precision)  # pycocotools' own is fixed to 100 detections; with 100 it is this
    categories = range(precision.shape[2])
    ap = {
        "AP50": np.array([_mean(precision[0, :, k]) for k in categories]),
        "AP75": np.array([_mean(precision[5, :, k]) for k in categories]),
        "AP": np.array([_mean(precision[:, :, k]) for k in categories]),
    }
    curves = Curves(sorted(truth.names), ap, *_by_confidence(precision[0], scores[0]))
    for name, values in zip(AT_BEST, (curves.p, curves.r, curves.f1), strict=True):
        metrics[name] = _mean(values[:, curves.best])
    return metrics, curves


def _hotcoco(truth: Truth, detections: Detections, max_dets: list[int], iou_type: str) -> Any:
    """hotcoco's evaluator after matching. Matched in chunks of images it needs half the memory, for the same bits."""
    if hotcoco is None:
        raise InputError(f"hotcoco cannot be imported: {missing}. Mend that, or say --coco-eval pycocotools.")
    params = hotcoco.Params(iou_type)
    params.maxDets = max_dets
    if iou_type == "keypoints":
        params.kpt_oks_sigmas = [*truth.sigmas]
    stream = hotcoco.StreamingEval(truth.categories, iou_type, params=params)
    order, before = np.argsort(truth.ids, kind="stable"), 0
    for start in range(0, len(order), CHUNK):
        places = order[start : start + CHUNK]
        part = detections.between(int(truth.ids[places[0]]), int(truth.ids[places[-1]]))
        annotations = truth.annotations(places, before + 1, iou_type)
        images, sizes = [truth.size_of(i) for i in places], truth.sizes_by_id(places)
        if iou_type == "keypoints":
            stream.update(images, annotations, _to_measure(part.surest(max_dets[-1]), annotations))
        elif iou_type == "segm":
            masks, rows = part.outlines(sizes), part.rows
            if not part.area_of_box:  # hotcoco takes a row's area from its box: this one has the mask's
                rows = rows.copy()
                rows[:, 1:5] = 0, 0, 0, 1
                rows[:, 3] = hotcoco.mask.area(masks) if masks else 0
            stream.update(images, annotations, rows, segmentation=masks)
        else:
            stream.update(images, annotations, part.rows)
        before += len(annotations)
    return stream.finalize()


def _to_measure(detections: Detections, annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results as `_with_areas` has them, with keypoints where there is truth of their image and category: of the others
    only score and area are asked for, and most of the time went into lists of points.
    """
    rows, keypoints = detections.rows, detections.keypoints
    assert keypoints is not None
    if not len(rows):
        return []
    images, categories = rows[:, 0].astype(int).tolist(), rows[:, 6].astype(int).tolist()
    there = {(one["image_id"], one["category_id"]) for one in annotations}
    compared = [pair in there for pair in zip(images, categories, strict=True)]
    if detections.area_of_box:
        areas = rows[:, 3] * rows[:, 4]
    else:  # the same differences as pycocotools', in double precision; numpy takes five times as long along an axis
        places = keypoints[:, :, :2].swapaxes(0, 1)
        areas = (reduce(np.maximum, places).astype(np.float64) - reduce(np.minimum, places)).prod(1)
    points = iter(keypoints[compared].reshape(-1, keypoints.shape[1] * 3).tolist())
    return [
        {"image_id": image, "category_id": category, "score": score, "bbox": (0.0, 0.0, area, 1.0)}
        | ({"keypoints": next(points)} if looked_at else {})
        for image, category, score, area, looked_at in zip(
            images, categories, rows[:, 5].tolist(), areas.tolist(), compared, strict=True
        )
    ]


def _with_areas(detections: Detections, sizes: dict[int, tuple[int, int]], iou_type: str) -> list[dict[str, Any]]:
    """Results as pycocotools' `loadRes` completes them: where a file has boxes, their areas are the detections'."""
    found = [*detections.results(iou_type, sizes)]
    if detections.area_of_box:
        for one, row in zip(found, detections.rows.tolist(), strict=True):
            one |= {"bbox": row[1:5], "area": row[3] * row[4]}
    return found


def _pycocotools(truth: Truth, detections: Detections, max_dets: list[int], iou_type: str) -> Any:
    """pycocotools' evaluator after matching."""
    coco = COCO()
    coco.dataset = truth.dataset()
    coco.createIndex()
    if len(detections):
        sizes = truth.sizes_by_id(np.arange(len(truth)))
        whole = detections.rows if iou_type == "bbox" else _with_areas(detections, sizes, iou_type)
        found = coco.loadRes(whole)
    else:  # loadRes fails on none at all
        found = COCO()
        found.dataset = coco.dataset | {"annotations": []}
        found.createIndex()
    result = COCOeval(coco, found, iou_type)
    result.params.maxDets = max_dets
    if iou_type == "keypoints":
        result.params.kpt_oks_sigmas = np.array(truth.sigmas)
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


def diagnose(truth: Truth, detections: Detections, confidence: float = 0.25) -> dict[str, Any] | None:
    """What goes wrong, from hotcoco, on the detections from that confidence on; None where hotcoco is not installed.

    It is by masks where there are such, else by boxes: of keypoints hotcoco's confusion is empty.

    Returns:
        `confusion`: (K+1, K+1) counts, rows truth, columns detections, the last for background, in the order of the
        category ids; `tide`: AP50 lost by kind of error, over all detections; `images`: true and false positives,
        misses and F1 by image id.
    """
    if hotcoco is None:
        return None
    with silenced():
        marks, images = truth.marks(), [truth.size_of(i) for i in range(len(truth))]
        places, masked = range(len(truth)), detections.masks is not None
        sizes = truth.sizes_by_id(np.array(places))
        coco = hotcoco.COCO.from_arrays(
            images, truth.categories, truth.ids[marks.image], marks.category, marks.boxes,
            area=marks.area, iscrowd=marks.crowd,
            segmentation=[mask for place in places for mask in truth.masks(place)] if masked else None,
        )  # fmt: skip

        def matched(found: Detections) -> Any:
            outlines = found.outlines(sizes) if masked else None
            result = hotcoco.COCOeval(
                coco, coco.loadRes(found.rows, segmentation=outlines), "segm" if masked else "bbox"
            )
            result.evaluate()
            return result

        tide = matched(detections).tide_errors()["delta_ap"]
        sure = matched(detections.sure(confidence))
        return {
            "confusion": sure.confusion_matrix()["matrix"],
            "tide": {kind: tide[kind] for kind in ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")},
            "images": sure.image_diagnostics()["img_summary"],
        }
