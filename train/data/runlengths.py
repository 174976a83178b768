"""COCO's `segmentation` of an object: polygons, or a mask as run lengths down the columns of its image."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from train.data.formats import FAR


def encoded(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """A `segmentation` of COCO's, polygons or run lengths, as compressed run lengths: what pycocotools makes of it."""
    if isinstance(segmentation, list):  # the polygons of one object
        return dict(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        return dict(coco_mask.frPyObjects(segmentation, height, width))
    return dict(segmentation)


def are_polygons(segmentation: Any) -> bool:
    """Whether it is the polygons of an object, as COCO has them: x and y of three points or more each."""
    return isinstance(segmentation, list) and bool(segmentation) and numbers_of(segmentation) is not None


def numbers_of(polygons: list[Any]) -> np.ndarray | None:
    """The coordinates of polygons, one after the other, in pixels; None where one is none."""
    if {*map(type, polygons)} - {list} or any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
        return None
    if {*map(type, chain.from_iterable(polygons))} - {int, float, bool}:
        return None
    try:
        numbers = np.fromiter(chain.from_iterable(polygons), np.float64, sum(map(len, polygons)))
    except OverflowError:
        return None
    return numbers if (np.abs(numbers) < FAR).all() else None


def that_are_none(masks: list[Any], sizes: list[Any]) -> Iterator[int]:
    """Places of what is neither polygons nor run lengths that fill an image.

    Args:
        masks: a `segmentation` of each object.
        sizes: height and width of its image.
    """
    lists = [mask for mask in masks if isinstance(mask, list)]
    right = all(lists) and numbers_of([*chain.from_iterable(lists)]) is not None  # all at once: one by one is slow
    for place, (mask, (height, width)) in enumerate(zip(masks, sizes, strict=True)):
        polygons = isinstance(mask, list)
        if not (right or are_polygons(mask) if polygons else is_mask(mask, (height, width))):
            yield place


def is_mask(mask: Any, size: tuple[int, int]) -> bool:
    """Whether it is run lengths that fill an image of this height and width: pycocotools would write past its end."""
    if not isinstance(mask, dict) or mask.get("size") != [*size]:
        return False
    counts = mask.get("counts")
    runs = _runs(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(count) is int and count >= 0 for count in runs):
        return False
    return sum(runs) == size[0] * size[1]


def _runs(text: str) -> list[int]:
    """COCO's compressed run lengths: groups of five bits and a flag that more follow, as differences to the last but
    one; nothing where it is cut off.
    """
    runs: list[int] = []
    value = shift = 0
    for code in text.encode():
        group = code - 48
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            if group & 16:  # negative
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return [] if shift else runs


def counts_of(mask: Any) -> bytes:
    """The compressed run lengths of a result's mask. Polygons, which nobody writes, have no size of their own."""
    height, width = map(int, mask["size"])
    if not is_mask(mask, (height, width)):
        raise ValueError
    counts = encoded(mask, height, width)["counts"]
    return counts.encode() if isinstance(counts, str) else bytes(counts)
