"""What a task's outputs hold beside boxes, brought to the pixels of the original image."""

import math
from typing import Any, NamedTuple

import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect
from ultralytics.utils.ops import crop_mask, scale_coords, scale_masks

PIXELS = 16_000_000  # of masks that are held as floats at a time


class Letterbox(NamedTuple):
    """How an original image has become the one that a model sees."""

    padded: tuple[int, int]  # height, width in pixels of the image that the model sees
    shape: tuple[int, int]  # of the original one
    ratio_pad: tuple[tuple[float, float], tuple[float, float]]  # (gain y, gain x), (padding left, top)


def nothing(found: Tensor, box: Letterbox, head: Detect, raw: dict[str, Any], i: int) -> None:
    """Boxes are all there is."""


def encoded_masks(found: Tensor, box: Letterbox, head: Detect, raw: dict[str, Any], i: int) -> list[bytes]:
    """The masks of one image's detections as COCO's run-length encoding, compressed.

    Logits are interpolated to the padded image, cut and scaled to the original one as that was letterboxed, thresholded
    there, and cut off at the boxes: by Ultralytics' own functions, but with the letterbox that was used, which its
    `process_mask_native` guesses from the shapes. A few masks are held at a time.

    Args:
        found: (n, 6 + k) detections, xyxy in pixels of the original image, and k mask coefficients.
        box: of the image.
        head: the model's last layer.
        raw: its outputs, with prototypes (images, k, height, width).
        i: place of the image in its batch.
    """
    proto = (raw["proto"][0] if isinstance(raw["proto"], tuple) else raw["proto"])[i].float()
    logits = (found[:, 6:] @ proto.flatten(1)).view(1, -1, *proto.shape[1:])
    at_once = max(1, PIXELS // (math.prod(box.shape) + math.prod(box.padded)))
    encoded: list[bytes] = []
    for first in range(0, len(found), at_once):
        part = nn.functional.interpolate(logits[:, first : first + at_once], box.padded, mode="bilinear")
        part = scale_masks(part, box.shape, box.ratio_pad)[0] > 0
        part = crop_mask(part.byte(), found[first : first + at_once, :4])
        columns = part.transpose(1, 2).contiguous().cpu().numpy()  # COCO counts down the columns
        encoded += [mask["counts"] for mask in coco_mask.encode(columns.transpose(2, 1, 0))]
    return encoded


def scaled_keypoints(found: Tensor, box: Letterbox, head: Detect, raw: dict[str, Any], i: int) -> Tensor:
    """The keypoints of one image's detections, (n, keypoints, 3): x, y in pixels of the original image, within it, and
    the score that the keypoint is visible, 1 where the model does not tell.

    Args:
        found: (n, 6 + keypoints · 2 or 3) detections, whose keypoints are in pixels of the padded image.
        box, head, raw, i: see `encoded_masks`.
    """
    keypoints: Tensor = found[:, 6:].reshape(-1, *head.kpt_shape).clone()
    keypoints = scale_coords(box.padded, keypoints, box.shape, box.ratio_pad)
    if keypoints.shape[-1] == 2:
        keypoints = torch.cat((keypoints, torch.ones_like(keypoints[..., :1])), -1)
    return keypoints
