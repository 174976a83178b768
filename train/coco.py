"""COCO's metric on all ranks: ground truth, detections of this rank's images, one gather, one AP.

`evaluate()` is the only evaluation path; training and validate.py both call it. Detections are float64 rows
(image id, x, y, width, height, score, category id): x, y is the top left corner, in pixels of the original image.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from ultralytics.utils.ops import scale_boxes, xywh2ltwh, xyxy2ltwh

from train.config import EvalConfig
from train.data import as_images
from train.labels import Labels
from train.model import detect
from train.processes import on_main

# COCOeval.stats in its order
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def ground_truth(labels: list[Labels], names: dict[int, str]) -> dict[str, Any]:
    """The labels of a split as a COCO annotation file: category ids are class indices, areas are box areas.

    Args:
        labels: the split's labels, boxes normalised.
        names: class names by class index.
    """
    images: list[dict] = []
    annotations: list[dict] = []
    for entry in labels:
        height, width = entry.shape
        images.append({"id": entry.image_id, "file_name": entry.im_file, "width": width, "height": height})
        for category, box in zip(entry.cls, xywh2ltwh(entry.boxes * (width, height, width, height)), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,  # pycocotools takes annotation 0 for none
                    "image_id": entry.image_id,
                    "category_id": int(category),
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3]),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": index, "name": name} for index, name in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


@dataclass
class Evaluation:
    """What `evaluate()` found. Every rank holds the metrics and the detections of all images."""

    metrics: dict[str, float]  # COCO's twelve, by METRICS; -1 where COCO has nothing to measure
    per_class: dict[str, dict[str, float]]  # AP and AP50 by class name
    images: int
    detections: np.ndarray  # (n, 7) float64, by image id, NMS order within an image

    @property
    def fitness(self) -> float:
        """Ultralytics' measure of the best epoch."""
        return 0.1 * self.metrics["AP50"] + 0.9 * self.metrics["AP"]


@torch.inference_mode()
def evaluate(
    model: Any, loader: Iterable[dict], truth: dict[str, Any], config: EvalConfig, accelerator: Accelerator
) -> Evaluation:
    """Detect on this rank's batches, gather, and measure once (collective).

    Args:
        model: an `inference_copy`.
        loader: this rank's validation batches. Ranks may hold different numbers, so nothing in the loop is collective.
        truth: COCO ground truth of the whole split.

    Raises:
        RuntimeError: on all ranks, where an image was evaluated twice or not at all.
    """
    ids: list[int] = []
    found: list[torch.Tensor] = []
    for batch in loader:
        images = as_images(batch["img"], config.memory_format)
        with accelerator.autocast():
            raw = model(images)
        boxes = detect(raw, model, config.conf, config.iou, config.max_det)
        for box, shape, ratio_pad in zip(boxes, batch["ori_shape"], batch["ratio_pad"], strict=True):
            scale_boxes(images.shape[2:], box[:, :4], shape, ratio_pad)  # in place
        ids += batch["id"]
        found += boxes
    # Collective, and one element per rank: a flat list would be cut to the size of the last batch.
    shards = accelerator.gather_for_metrics([(ids, _as_rows(ids, found))], use_gather_object=True)
    _check_ids([i for shard_ids, _ in shards for i in shard_ids], [image["id"] for image in truth["images"]])
    rows = np.concatenate([shard for _, shard in shards])
    # Stable: an image's detections come from one rank, and their NMS order decides between tied scores.
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    metrics, per_class = on_main(accelerator, lambda: coco_metrics(truth, rows, config.coco_eval))
    return Evaluation(metrics, per_class, len(truth["images"]), rows)


def _as_rows(ids: list[int], found: list[torch.Tensor]) -> np.ndarray:
    """Detections (n, 6) per image, xyxy in original pixels, as COCO rows (m, 7) float64: one copy to the host."""
    if not found:
        return np.zeros((0, 7))
    boxes = torch.cat(found).cpu().numpy().astype(np.float64)
    image = np.repeat(np.array(ids, dtype=np.float64), [len(part) for part in found])
    return np.concatenate([image[:, None], xyxy2ltwh(boxes[:, :4]), boxes[:, 4:]], 1)


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


def coco_metrics(
    truth: dict[str, Any], detections: np.ndarray, evaluator: str = "hotcoco"
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """COCO's twelve numbers, and AP and AP50 by class name.

    Args:
        truth: a COCO annotation dict.
        detections: (n, 7) float64 rows, see the module's first lines.
        evaluator: `hotcoco`, or `pycocotools` through that package alone; the numbers are the same, bit for bit.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # both print their table; the caller decides what is shown
        if evaluator == "hotcoco":
            import hotcoco

            coco = hotcoco.COCO(truth)
            result: Any = hotcoco.COCOeval(coco, coco.loadRes(detections), "bbox")
        else:
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
        result.evaluate()
        result.accumulate()
        result.summarize()
    precision = result.eval["precision"][..., 0, -1]  # (10 IoUs, 101 recalls, classes), all areas, 100 detections
    per_class = {
        category["name"]: {"AP": _mean(precision[:, :, k]), "AP50": _mean(precision[0, :, k])}
        for k, category in enumerate(sorted(truth["categories"], key=lambda category: category["id"]))
    }
    return dict(zip(METRICS, map(float, result.stats), strict=True)), per_class


def _mean(precision: np.ndarray) -> float:
    """COCO's mean: -1 entries have no ground truth; -1 where there is no other."""
    measured = precision[precision > -1]
    return float(measured.mean()) if len(measured) else -1.0
