"""Ultralytics' training transforms, byte for byte, in less time.

Each class here is one of Ultralytics' with the method that costs replaced; what is drawn at random, and what becomes of
the labels, stays Ultralytics'. OpenCV warps four channels in a third of the time that it takes for three, with the same
bytes in each; it flips and reorders faster than NumPy; and of a mosaic's canvas only what the warp sees is painted.
"""

import math
import random
from typing import Any

import cv2
import numpy as np
import torch
from ultralytics.data.augment import (
    Compose,
    Format,
    Mosaic,
    RandomFlip,
    RandomHSV,
    RandomPerspective,
)

GREY = 114  # of what no image covers
MARGIN = 2  # px around what the warp sees, for what it interpolates between
VALUES = np.arange(256, dtype=np.uint8)[None]
DOWN = -0.5 + 3e-5  # OpenCV rounds to the nearest, a table of Ultralytics' down


def _kept(step: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Memory of a transform, uint8, that every image of this shape uses again: new memory is cold."""
    kept: np.ndarray | None = vars(step).get(name)
    if kept is None or kept.shape != shape:
        kept = vars(step)[name] = np.empty(shape, np.uint8)
    return kept


class Canvas:
    """A mosaic that is not painted yet: images, and where on a canvas of which shape they lie."""

    def __init__(self, layout: list[dict[str, Any]], shape: tuple[int, int, int]):
        # Taken here: the first patch's dict is that of the mosaic, whose image becomes this canvas.
        self.patches = [(item["labels_patch"]["img"], item) for item in layout]
        self.shape = shape

    def copy(self) -> np.ndarray:
        """The painted canvas, (height, width, 3) uint8 BGR."""
        painted = np.empty((*self.shape[:2], 4), np.uint8)
        self.paint(painted, (0, 0, self.shape[1], self.shape[0]))
        return cv2.cvtColor(painted, cv2.COLOR_BGRA2BGR)

    def paint(self, canvas: np.ndarray, window: tuple[int, int, int, int]) -> None:
        """Paint the part of the canvas (height, width, 4) uint8 BGRA that lies in a window x1, y1, x2, y2."""
        left, top, right, bottom = window
        canvas[top:bottom, left:right] = GREY
        for image, at in self.patches:
            x1, y1, x2, y2 = max(at["x1a"], left), max(at["y1a"], top), min(at["x2a"], right), min(at["y2a"], bottom)
            if x1 < x2 and y1 < y2:
                x, y = at["x1b"] - at["x1a"], at["y1b"] - at["y1a"]
                cv2.cvtColor(image[y1 + y : y2 + y, x1 + x : x2 + x], cv2.COLOR_BGR2BGRA, dst=canvas[y1:y2, x1:x2])


class LazyMosaic(Mosaic):
    """Leaves the painting to the warp."""

    def apply_image(self, labels: dict[str, Any], params: dict[str, Any] | None = None) -> dict[str, Any]:
        """The canvas in the place of the image."""
        assert params is not None
        side, channels = 2 * self.imgsz, labels["img"].shape[2]
        if self.n != 4 or channels != 3:
            return super().apply_image(labels, params)
        labels["img"] = Canvas(params["layout"], (side, side, channels))
        return labels


class FastPerspective(RandomPerspective):
    """Warps four channels where there are three."""

    def apply_image(self, labels: dict[str, Any], params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Warp an image (height, width, channels) uint8, or a canvas."""
        assert params is not None
        image, matrix, size = labels["img"], params["M"], params["size"]
        if isinstance(image, Canvas):
            canvas = _kept(self, "canvas", (*image.shape[:2], 4))
            image.paint(canvas, (0, 0, *image.shape[1::-1]) if self.perspective else _seen(matrix, size, image.shape))
        elif image.ndim == 3 and image.shape[2] == 3:
            canvas = cv2.cvtColor(image, cv2.COLOR_BGR2BGRA)
        else:
            return super().apply_image(labels, params)
        if self.perspective:
            warped = cv2.warpPerspective(canvas, matrix, dsize=size, borderValue=(GREY,) * 4)
        else:
            warped = cv2.warpAffine(canvas, matrix[:2], dsize=size, borderValue=(GREY,) * 4)
        labels["img"], labels["resized_shape"] = warped[..., :3], warped.shape[:2]  # a view; see `FastHSV`
        return labels


def _seen(matrix: np.ndarray, size: tuple[int, int], shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The window x1, y1, x2, y2 of a source of this shape that an affine warp into (width, height) px reads."""
    (a, b, c), (d, e, f) = matrix[:2].tolist()  # plain numbers: NumPy takes 0.1 ms for so few
    determinant = a * e - b * d
    corners = [(u - c, v - f) for u in (0, size[0]) for v in (0, size[1])]
    xs = [(e * u - b * v) / determinant for u, v in corners]
    ys = [(a * v - d * u) / determinant for u, v in corners]
    ranges = []
    for values, limit in ((xs, shape[1]), (ys, shape[0])):
        low, high = math.floor(min(values)) - MARGIN, math.ceil(max(values)) + MARGIN + 1
        ranges.append((min(max(low, 0), limit), min(max(high, 0), limit)))
    (x1, x2), (y1, y2) = ranges
    return x1, y1, x2, y2


class FastHSV(RandomHSV):
    """Looks each channel up by itself, in memory that every image uses again."""

    def apply_image(self, labels: dict[str, Any], params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Change the colours of an image (height, width, 3) uint8 BGR; others stay as they are."""
        image = labels["img"]
        if image.shape[-1] != 3 or not (self.hgain or self.sgain or self.vgain):
            return labels
        gains = np.random.uniform(-1, 1, 3) * [self.hgain, self.sgain, self.vgain]
        x = np.arange(0, 256, dtype=gains.dtype)
        hue = ((x + gains[0] * 180) % 180).astype(np.uint8)
        saturation = np.clip(x * (gains[1] + 1), 0, 255).astype(np.uint8)
        value = np.clip(x * (gains[2] + 1), 0, 255).astype(np.uint8)
        saturation[0] = 0  # white stays white
        hsv, planes = _kept(self, "hsv", image.shape), [*_kept(self, "planes", (3, *image.shape[:2]))]
        # Of a warped image the four channels: OpenCV would copy three of them first.
        whole = image.base if image.strides[1] == 4 else None
        cv2.cvtColor(image if whole is None else whole, cv2.COLOR_BGR2HSV, dst=hsv)
        cv2.split(hsv, planes)
        cv2.LUT(planes[0], hue, dst=planes[0])
        _scale(planes[1], gains[1] + 1, saturation)
        _scale(planes[2], gains[2] + 1, value)
        labels["img"] = cv2.cvtColor(cv2.merge(planes, dst=hsv), cv2.COLOR_HSV2BGR)
        return labels


def _scale(plane: np.ndarray, gain: float, table: np.ndarray) -> None:
    """Look a plane (height, width) up in place, by a product where that gives the same for each of the 256 values."""
    if np.array_equal(cv2.convertScaleAbs(VALUES, alpha=gain, beta=DOWN)[0], table):
        cv2.convertScaleAbs(plane, dst=plane, alpha=gain, beta=DOWN)
    else:
        cv2.LUT(plane, table, dst=plane)


class FastFlip(RandomFlip):
    """Leaves images whose rows go forward, which is what all that follows is fast on."""

    def apply_image(self, labels: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
        """Flip an image (height, width, 3) uint8, in its place: a warp gave it its own; others as Ultralytics does."""
        image = labels["img"]
        if image.shape[-1] != 3:
            return super().apply_image(labels, params)
        if params["flip"]:
            place = image if image.flags.c_contiguous else None
            labels["img"] = cv2.flip(image, {"vertical": 0, "horizontal": 1}[params["direction"]], dst=place)
        return labels


class FastFormat(Format):
    """Has OpenCV take the channels apart."""

    def _format_img(self, img: np.ndarray) -> torch.Tensor:
        """An image (height, width, 3) uint8 BGR as (3, height, width), RGB, or BGR where that is drawn."""
        if img.ndim != 3 or img.shape[2] != 3:
            return super()._format_img(img)
        planes = np.empty((3, *img.shape[:2]), np.uint8)
        order = planes[::-1] if random.uniform(0, 1) > self.bgr else planes
        cv2.split(img, [*order])
        return torch.from_numpy(planes)


FASTER = {
    Mosaic: LazyMosaic,
    RandomPerspective: FastPerspective,
    RandomHSV: FastHSV,
    RandomFlip: FastFlip,
    Format: FastFormat,
}


def faster(transforms: Compose) -> Compose:
    """The same transforms, with these classes in the places of Ultralytics'; their state stays."""
    for step in transforms.transforms:
        if isinstance(step, Compose):
            faster(step)
        elif type(step) in FASTER:
            step.__class__ = FASTER[type(step)]
        if isinstance(inner := getattr(step, "pre_transform", None), Compose):
            faster(inner)
    return transforms
