"""How masks differ from those that Ultralytics' `yolo segment val save_json=True` writes, by size."""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from pycocotools import mask as coco_mask
from torch import Tensor
from ultralytics.utils.ops import process_mask_native, scale_masks

from tests.labels import to_validate_on
from train.config.options import ValConfig
from train.data.files import find_data
from train.data.sets import ValSet
from train.model.inference import detect, in_original, inference_copy
from train.model.outputs import Letterbox
from train.model.weights import load_detector
from train.processes.accelerator import resolved

WHY = "those are thresholded at the network's size and scaled after that, ours are scaled and thresholded after that"
SMALL, MEDIUM = 32**2, 96**2  # COCO's limits, pixels


def saved_by_ultralytics(proto: Tensor, coefficients: Tensor, boxes: Tensor, box: Letterbox) -> np.ndarray:
    """(n, height, width) uint8 masks of the original image, as `save_json` has them.

    Args:
        proto: (k, height, width) prototypes of the image.
        coefficients: (n, k) of its detections.
        boxes: (n, 4) xyxy in pixels of the padded image.
        box: how that was made.
    """
    masks = process_mask_native(proto, coefficients, boxes, box.padded)
    return scale_masks(masks[None], box.shape, box.ratio_pad)[0].byte().numpy()


def compare(ours: np.ndarray, theirs: np.ndarray, shown: dict[str, list[float]]) -> None:
    """Add the IoU of each mask of ours with its partner, by the size of ours; empty ones are left out."""
    for one, other in zip(ours.astype(bool), theirs.astype(bool), strict=True):
        size = "small" if one.sum() < SMALL else "medium" if one.sum() < MEDIUM else "large"
        if one.any():
            shown.setdefault(size, []).append(float((one & other).sum() / (one | other).sum()))


def in_words(shown: dict[str, list[float]]) -> str:
    """A line of what was compared, with the reason why it is not 1."""
    sizes = [size for size in ("small", "medium", "large") if size in shown]
    means = ", ".join(f"{size} {np.mean(shown[size]):.3f} (of {len(shown[size])})" for size in sizes)
    return f"IoU of masks with those of `yolo segment val save_json=True`: {means}; {WHY}"


@torch.inference_mode()
def overlaps(weights: str, data: str, imgsz: int, conf: float = 0.05, images: int = 64) -> dict[str, list[float]]:
    """IoU by size of the masks that a checkpoint finds on images of the split `val`, from a score on."""
    accelerator, files = Accelerator(cpu=True), find_data(data, carries="polygons")
    config = resolved(ValConfig(data=data, weights=weights, imgsz=imgsz, workers=0, val_limit=images), accelerator)
    labels = to_validate_on(files, config, accelerator, "polygons")
    samples = ValSet(labels, files, config, 32, judged=False)
    model = inference_copy(load_detector(weights)[0], torch.device("cpu"), torch.contiguous_format)
    shown: dict[str, list[float]] = {}
    for i in range(len(labels)):
        sample = samples[i]
        box = Letterbox(tuple(sample["img"].shape[1:]), sample["ori_shape"], sample["ratio_pad"])
        batch: dict[str, Any] = {"img": sample["img"][None], "ori_shape": [box.shape], "ratio_pad": [box.ratio_pad]}
        raw = model(batch["img"].float() / 255)
        (found,) = detect(raw, model, conf, config.iou, config.max_det)
        theirs = saved_by_ultralytics(proto_of(raw, model)[0], found[:, 6:].clone(), found[:, :4].clone(), box)
        _, (masks,) = in_original([found], raw, model, batch)
        compare(decoded(masks, box.shape), theirs, shown)
    return shown


def proto_of(raw: dict[str, Any], model: Any) -> Tensor:
    """(images, k, height, width) prototypes of the branch that is evaluated."""
    branch = raw["one2one" if model.model[-1].end2end else "one2many"] if "one2many" in raw else raw
    return branch["proto"][0] if isinstance(branch["proto"], tuple) else branch["proto"]


def decoded(masks: list[bytes], shape: tuple[int, int]) -> np.ndarray:
    """(n, height, width) uint8 of run lengths."""
    if not masks:
        return np.zeros((0, *shape), np.uint8)
    return coco_mask.decode([{"size": [*shape], "counts": counts} for counts in masks]).transpose(2, 0, 1)
