"""The index of a split: what its label files say, as plain arrays that all ranks and workers of a machine map.

What is asked of it with --classes, --single-cls, --fraction and --val-limit are views: see `train.data.labels`.
"""

import json
import os
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from train.data.arrays import open_arrays
from train.data.formats import ImageLabels
from train.data.tables import Table

MOST = 2**31 - 1  # the highest class that is kept apart from others
NO_POINTS = np.zeros(0, np.int64)


class Index:
    """The labels of all images of a split, in the order of their paths.

    Args:
        arrays: see `pack`; mapped from a file, or in memory.
        base: folder that the paths are relative to.
        keypoints: number and dimensions of an object's keypoints; without, its points are a polygon.
        file: that the arrays are mapped from, if they are.
        pictures: a hash of the images' names, sizes and times.
        table: that the labels were read from, of the same images in the same order; a worker does without.
    """

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        base: str,
        keypoints: tuple[int, ...] = (),
        file: str = "",
        pictures: str = "",
        table: Table | None = None,
    ):
        self.table = table
        self.arrays, self.base, self.keypoints, self.from_file, self.pictures = arrays, base, keypoints, file, pictures
        self.sizes, self.shapes, self.ids = arrays["sizes"], arrays["shapes"], arrays["ids"]
        self.first, self.cls, self.boxes = arrays["first"], arrays["cls"], arrays["boxes"]
        self.usable, self.top, self.numbers = arrays["usable"], arrays["top"], arrays["numbers"]
        self.listed = arrays["listed"]

    def __len__(self) -> int:
        return len(self.sizes)

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process goes where the arrays are, not what is in them."""
        if self.from_file:
            return open_index, (self.from_file, self.base)
        return Index, (self.arrays, self.base, self.keypoints)

    def file(self, row: int) -> str:
        """Path of an image."""
        first, end = self.arrays["path_ends"][row : row + 2]
        return os.path.join(self.base, os.fsdecode(self.arrays["paths"][first : end - 1].tobytes()))

    def points(self, first: int, end: int) -> list[np.ndarray]:
        """Of the boxes from `first` to `end` the points: polygons (k, 2) or keypoints; nothing where there are none."""
        ends = self.arrays["point_ends"]
        if not len(ends):
            return []
        shape = self.keypoints or (-1, 2)
        bounds = ends[first : end + 1].tolist()
        if bounds[0] == bounds[-1]:
            return []
        return [self.arrays["points"][a:b].reshape(shape) for a, b in pairwise(bounds)]

    def boxes_alone(self) -> np.ndarray:
        """(n,) bool: whether an image has boxes, and no polygon or keypoint of them."""
        ends, first = self.arrays["point_ends"], self.first
        filled: np.ndarray = first[1:] > first[:-1]
        return filled & (ends[first[1:]] == ends[first[:-1]]) if len(ends) else filled

    def faults(self) -> dict[int, str]:
        """Why images cannot be used, by row."""
        told = json.loads(self.arrays["faults"].tobytes() or b"[]")
        return {row: os.path.join(self.base, text) for row, text in told}


def open_index(file: str, base: str = "", table: Table | None = None) -> Index:
    """Map an index.

    Args:
        file: the index.
        base: folder that its paths are relative to; unset takes the one where it was read.
        table: see `Index`; of another state than the one that was read it is none of this index.
    """
    arrays, about = open_arrays(Path(file))
    if table is not None and table.name != about.get("table"):
        table = None
    return Index(arrays, base or about["base"], tuple(json.loads(about["keypoints"])), file, about["pictures"], table)


def pack(read: list[ImageLabels | str], base: str) -> dict[str, np.ndarray]:
    """What was read of some images, one after the other, as arrays.

    Args:
        read: labels of each image, or why it cannot be used.
        base: folder that paths are relative to.

    Returns:
        by image: `sizes` bytes; `shapes` height, width; `usable`; `top` the highest class, -1 without a box; `numbers`
        a hash of name, size and labels; `counts` boxes. By box: `cls`; `boxes` (m, 4) float64 as `ImageLabels` has
        them; `point_counts` numbers that its points consist of. And `points`, float64, of all of them, and `faults`,
        JSON: (row, sentence).
    """
    entries = [entry if isinstance(entry, ImageLabels) else None for entry in read]
    good = [entry for entry in entries if entry is not None]
    marks = [mark for entry in good for mark in (entry.segments or entry.keypoints or [NO_POINTS] * len(entry.cls))]
    inside = base.rstrip("/") + "/"
    faults = [[row, text.removeprefix(inside)] for row, text in enumerate(read) if isinstance(text, str)]
    return {
        "sizes": np.array([entry.size if entry else -1 for entry in entries], np.int64),
        "shapes": np.array([entry.shape if entry else (0, 0) for entry in entries], np.int32).reshape(-1, 2),
        "usable": np.array([entry is not None for entry in entries], bool),
        "top": np.array([_top(entry) for entry in entries], np.int32),
        "numbers": np.array([_number(entry, inside) if entry else 0 for entry in entries], np.uint32).view(np.int32),
        "counts": np.array([len(entry.cls) if entry else 0 for entry in entries], np.int64),
        "cls": _joined([np.minimum(entry.cls, MOST) for entry in good], np.int32),
        "boxes": _joined([entry.boxes for entry in good], np.float64).reshape(-1, 4),
        "point_counts": np.array([mark.size for mark in marks], np.int64),
        "points": _joined([mark.ravel() for mark in marks], np.float64),
        "faults": np.frombuffer(json.dumps(faults).encode(), np.uint8),
    }


def _joined(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


def _top(entry: ImageLabels | None) -> int:
    return int(min(entry.cls.max(), MOST)) if entry is not None and len(entry.cls) else -1


def _number(entry: ImageLabels, inside: str) -> int:
    """A hash of an image's name in the data set, its size and its labels."""
    name = entry.im_file.removeprefix(inside)
    number = zlib.crc32(f"{name} {entry.shape} {entry.size}".encode(errors="surrogateescape"))
    for array in (entry.cls, entry.boxes, *entry.segments, *entry.keypoints):
        number = zlib.crc32(np.ascontiguousarray(array).data, number)
    return number


def join(blocks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Several of `pack`, as if it had been one."""
    joined = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0] if name != "faults"}
    faults, first = [], 0
    for block in blocks:
        faults += [[first + row, text] for row, text in json.loads(block["faults"].tobytes())]
        first += len(block["sizes"])
    return joined | {"faults": np.frombuffer(json.dumps(faults).encode(), np.uint8)}


def finished(packed: dict[str, np.ndarray], paths: np.ndarray, listed: np.ndarray, files: list[str]) -> dict:
    """The arrays of an index.

    Args:
        packed: of all images.
        paths: of the images, relative, as bytes with a zero between two.
        listed: rows in the order in which the images are listed; some may be there twice.
        files: paths of the images.
    """
    arrays = {name: array for name, array in packed.items() if name not in ("counts", "point_counts")}
    arrays["first"] = _ends(packed["counts"])
    arrays["point_ends"] = _ends(packed["point_counts"]) if packed["points"].size else NO_POINTS
    ends = np.append(np.flatnonzero(paths == 0) + 1, len(paths) + 1)
    arrays |= {"paths": paths, "path_ends": np.append(0, ends), "listed": listed}
    return arrays | {"ids": np.array(image_ids(files), np.int64)}


def _ends(counts: np.ndarray) -> np.ndarray:
    return np.append(0, np.cumsum(counts))


def image_ids(files: list[str]) -> list[int]:
    """COCO image ids: the integer file stems where all stems of the split are distinct integers, else the positions.

    A stem that a float64 cannot hold exactly is no integer here: detections travel as rows of float64.
    """
    stems = [os.path.splitext(os.path.basename(file))[0] for file in files]
    if all(stem.isdecimal() and stem.isascii() for stem in stems):
        ids = [int(stem) for stem in stems]
        if len(set(ids)) == len(ids) and max(ids) < 2**53:
            return ids
    return list(range(len(files)))
