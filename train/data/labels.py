"""The labels that a run counts: a view on a split's index, which holds no label itself."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import overload

import numpy as np
from ultralytics.utils.ops import xywh2ltwh

from train.config.errors import InputError
from train.config.objects import Carries
from train.config.options import Data, EvalConfig
from train.config.words import printable
from train.data.formats import ImageLabels, label_text, read_label
from train.data.index import Index
from train.data.listing import label_file

BLOCK = 65536  # images that are looked at together
LONGEST = 1000  # characters of what is said of one file
NAMED = 1000  # images with a class out of range whose files are read again for the line


class Labels(Sequence[ImageLabels]):
    """The usable ones of some images of an index, in order, with the classes that count.

    Args:
        index: of the split.
        chosen: rows of the index; one may be there twice.
        classes: number of classes of the data set.
        config: the classes that count.
        carries: what is needed of the labels; an image whose labels are boxes alone is none of polygons.
    """

    def __init__(self, index: Index, chosen: np.ndarray, classes: int, config: Data, carries: Carries = "boxes"):
        self.source, self.chosen, self.classes, self.carries = index, chosen, classes, carries
        self.only, self.single_cls = config.classes, config.single_cls
        usable = index.usable[chosen]
        if not config.single_cls:
            usable &= index.top[chosen] < classes
        self.unfit = index.boxes_alone() if carries == "polygons" else np.zeros(0, bool)  # by row of the index
        if len(self.unfit):
            usable &= ~self.unfit[chosen]
        self.rows = (chosen if usable.all() else chosen[usable]).astype(np.int32, copy=False)
        self.own_ids: np.ndarray | None = None  # an annotation file's, where the truth is that

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> ImageLabels: ...
    @overload
    def __getitem__(self, place: slice) -> list[ImageLabels]: ...
    def __getitem__(self, place: int | slice) -> ImageLabels | list[ImageLabels]:
        """The labels of one image; its arrays are copies."""
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        index, row = self.source, int(self.rows[place])
        first, end = index.first[row : row + 2].tolist()
        cls, boxes, points = index.cls[first:end].copy(), index.boxes[first:end].copy(), index.points(first, end)
        if self.only is not None:
            keep = np.isin(cls, self.only)
            cls, boxes, points = cls[keep], boxes[keep], [p for p, kept in zip(points, keep, strict=False) if kept]
        if self.single_cls:
            cls[:] = 0
        segments, keypoints = ([], tuple(points)) if index.keypoints else (points, ())
        height, width = index.shapes[row].tolist()
        id_ = int(index.ids[row] if self.own_ids is None else self.own_ids[place])
        size = int(index.sizes[row])
        return ImageLabels(self.file(place), id_, (height, width), cls, boxes, segments, size, keypoints)

    def __iter__(self) -> Iterator[ImageLabels]:
        return (self[i] for i in range(len(self)))

    def file(self, place: int) -> str:
        """Path of an image."""
        return self.source.file(int(self.rows[place]))

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64 COCO image ids."""
        return self.source.ids[self.rows] if self.own_ids is None else self.own_ids

    @property
    def shapes(self) -> np.ndarray:
        """(n, 2) int32 height, width in pixels."""
        return self.source.shapes[self.rows]

    @property
    def numbers(self) -> np.ndarray:
        """(n,) int32: a hash of each image's name in the data set, its size and its labels, of all classes."""
        return self.source.numbers[self.rows]

    def boxes(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the images at these places all boxes: the place of each one's image, its class, and the box xywh
        normalised, float64 as the files give it.
        """
        place, cls, each = self._classes(places)
        return place, cls, self.source.boxes[each]

    def boxes_in_pixels(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same with each box as left, top, width and height in pixels: an annotation file's own numbers, where the
        labels are one's.
        """
        place, cls, each = self._classes(places)
        if (table := self.source.table) is not None:
            rows = self.rows[place]
            return place, cls, table.boxes(rows, each - self.source.first[rows])
        heights, widths = self.shapes[place].T
        return place, cls, xywh2ltwh(self.source.boxes[each] * np.stack((widths, heights, widths, heights), 1))

    def _classes(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same without the boxes, which need not be in memory for it: for each where it is in the index."""
        rows = self.rows[places]
        first, counts = self.source.first[rows], self.source.first[rows + 1] - self.source.first[rows]
        each, place = ragged(first, counts), np.repeat(places, counts)
        cls = self.source.cls[each]
        if self.only is not None:
            keep = np.isin(cls, self.only)
            place, cls, each = place[keep], cls[keep], each[keep]
        return place, np.zeros_like(cls) if self.single_cls else cls, each

    @cached_property
    def counts(self) -> tuple[np.ndarray, int]:
        """Boxes by class, and images without a box."""
        by_class, filled = np.zeros(self.classes, np.int64), 0
        for start in range(0, len(self), BLOCK):
            place, cls, _ = self._classes(np.arange(start, min(start + BLOCK, len(self))))
            by_class += np.bincount(cls, minlength=self.classes)
            filled += len(np.unique(place))
        return by_class, len(self) - filled

    @cached_property
    def faults(self) -> list[str]:
        """A sentence for each of the chosen images that is left out."""
        told = self.source.faults()
        chosen = np.unique(self.chosen)
        beyond = self.source.usable[chosen] & (self.source.top[chosen] >= self.classes) & (not self.single_cls)
        for number, row in enumerate(chosen[beyond].tolist()):
            told[row] = self._out_of_range(row, number < NAMED)
        for row in chosen[self.unfit[chosen]].tolist() if len(self.unfit) else ():
            told.setdefault(
                row, f"{label_file(self.source.file(row))}: boxes, without polygons; train/detect.py trains on boxes"
            )
        wanted = set(chosen.tolist()) if len(chosen) < len(self.source) else None
        return [printable(text)[:LONGEST] for row, text in sorted(told.items()) if wanted is None or row in wanted]

    @property
    def dropped(self) -> int:
        """Objects of the split that an annotation file lists and its table leaves out; of label files nobody knows."""
        table = self.source.table
        return sum(len(some) for parts in table.left_out.values() for some in parts) if table is not None else 0

    def _out_of_range(self, row: int, look: bool) -> str:
        """What is wrong with a label file that has a class too high."""
        file = label_file(self.source.file(row))
        if look:
            try:
                read_label(label_text(file), self.classes, self.source.keypoints)
            except ValueError as error:
                return f"{file}: {error}"
        return f"{file}: it has class {self.source.top[row]}; there are the classes 0 to {self.classes - 1}"


def ragged(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Indices of ranges that begin at `first` and are `counts` long, one range after the other."""
    return np.repeat(first - np.append(0, np.cumsum(counts)[:-1]), counts) + np.arange(counts.sum())


def share(images: int, fraction: float) -> int:
    """How many images a share of them is, or that number where it is above 1."""
    return min(max(1, round(fraction * images)) if fraction <= 1 else round(fraction), images)


def train_labels(
    index: Index, classes: int, config: EvalConfig, carries: Carries = "boxes", fraction: float = 1.0
) -> Labels:
    """The labels to train on: of the first images that the split lists, as often as it lists them."""
    return Labels(index, index.listed[: share(len(index.listed), fraction)], classes, config, carries)


def val_labels(index: Index, classes: int, config: EvalConfig, carries: Carries = "boxes") -> Labels:
    """The labels to validate on: each image once, or a share of them, evenly drawn."""
    images = len(index)
    wanted = min(max(1, round(images * config.val_fraction)), config.val_limit or images)
    chosen: np.ndarray = np.arange(images, dtype=np.int32)
    if wanted < images:
        chosen = np.arange(wanted) * images // wanted
    return Labels(index, chosen, classes, config, carries)


def check_usable(name: str, train: Labels | None, val: Labels, config: EvalConfig) -> None:
    """Check that something is left of the data set. Call it on the main process: there may be many faults.

    Args:
        name: of the data set.
        train: labels of the images to train on; None where nothing is trained.
        val: labels of the images to validate on.
        config: the classes that count, and whether it is strict.

    Raises:
        InputError: nothing is left to train on or to validate on, or, with --strict, a file is faulty.
    """
    faults = (train.faults if train is not None else []) + val.faults
    if getattr(config, "strict", False) and faults:
        raise InputError("--strict, and these files are faulty:\n" + "\n".join(faults))
    reason = f" First of {len(faults)} faults: {faults[0]}" if faults else ""
    if train is not None and not train.counts[0].any():
        only = "" if config.classes is None else f" of --classes {' '.join(map(str, config.classes))}"
        raise InputError(f"{name}: no train image has a usable label{only}.{reason}")
    if not len(val):
        raise InputError(f"{name}: no image to validate on can be used.{reason}")
