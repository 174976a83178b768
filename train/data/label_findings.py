"""What is wrong with labels, line by line or annotation by annotation, and which boxes are seldom meant."""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from train.data.coco_findings import lying_on_another, of_annotations
from train.data.findings import OVER, Finding
from train.data.formats import label_text, read_label
from train.data.index import Index
from train.data.listing import DataFiles, label_file
from train.data.scan import Counted, by_workers, spread
from train.data.tables import OUTSIDE, Table, over_edge

# What the readers say, and the kind that it is of; the first that fits
SAID = (
    ("has class", "class out of range"),
    ("negative", "negative size"),
    ("ends before it begins", "negative size"),
    ("outside 0 to 1", "coordinate outside the image"),
    ("leaves its image", "coordinate outside the image"),
    ("mixes boxes and polygons", "boxes and polygons mixed"),
    ("UTF-8", "not UTF-8"),
)
TINY = 2.0  # px of a box's shorter side, at the training's image size
BLOCK = 512  # label files that a worker reads at a time


def label_faults(text: str, classes: int, keypoints: tuple[int, ...]) -> list[tuple[str, str, str]]:
    """What is wrong with a label file, line by line: kind, place and words.

    Args:
        text: of the file.
        classes, keypoints: see `read_label`.
    """
    found: list[tuple[str, str, str]] = []
    good: dict[tuple[float, ...], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        place = f"line {number}"
        try:
            _, boxes, _ = read_label(line, classes, keypoints)
        except ValueError as error:
            what = str(error).removeprefix("line 1 ")
            found.append((_kind(what), place, what))
            continue
        if not len(boxes):
            continue
        row = tuple(map(float, line.split()))
        if row in good:
            found.append(("duplicate box", place, f"it is line {good[row]} again, and counts once"))
        elif not boxes[0, 2:].all():
            found.append(("box of no size", place, "its width or its height is 0"))
        elif (over := over_edge(boxes)[0]) > OUTSIDE:
            found.append(("box over the edge", place, OVER.format(over)))
        good.setdefault(row, number)
    columns = {number: len(row) for row, number in good.items()}
    if not keypoints and 5 in columns.values() and len(set(columns.values()) - {5}):
        boxes_at, others = ([n for n, width in columns.items() if (width == 5) is alone] for alone in (True, False))
        what = f"it mixes boxes and polygons: line {boxes_at[0]} is a box, line {others[0]} a polygon"
        found.append(("boxes and polygons mixed", "", what))
    return found


def _kind(what: str) -> str:
    return next((kind for phrase, kind in SAID if phrase in what), "labels that cannot be read")


class _Files(Sequence[dict[str, Any]]):
    """What is wrong with the label files of a split, when it is asked for, a block at a time."""

    def __init__(self, index: Index, data: DataFiles):
        self.images, self.classes, self.keypoints = index, len(data.names), data.keypoints

    def __len__(self) -> int:
        return -(-len(self.images) // BLOCK)

    def __getitem__(self, i: Any) -> Any:
        if i >= len(self):
            raise IndexError(i)
        rows = range(i * BLOCK, min((i + 1) * BLOCK, len(self.images)))
        return {"told": [self._told(label_file(self.images.file(row))) for row in rows]}

    def _told(self, file: str) -> list[tuple[str, str, str]]:
        try:
            return label_faults(label_text(file), self.classes, self.keypoints)
        except UnicodeDecodeError as error:
            return [("not UTF-8", "", f"it is not UTF-8 text: byte {error.object[error.start]:#x} at {error.start}")]
        except ValueError as error:
            return [("labels that cannot be read", "", str(error))]


def of_labels(split: str, index: Index, data: DataFiles, counted: Counted) -> Iterator[Finding]:
    """Images and labels that cannot be used, and what label files and annotation files say that is seldom meant."""
    table = Table(*data.tables[split]) if split in data.tables else None
    place = _Places(index, table)
    for row, text in index.faults().items():
        file = index.file(row)
        what = text.removeprefix(f"{file}: ")
        if what != text:
            yield Finding("image that cannot be read", split, file, "", what)
        elif table is not None:
            kind = _kind(what)
            if kind == "coordinate outside the image" and table.arrays["shapes"][row].all() and not place.places:
                continue  # it is told by annotation
            yield Finding(kind, split, *place.of_fault(row, text.removeprefix(f"{table.source}: "), table.source))
    if table is not None:
        coco = data.annotations(split)
        yield from of_annotations(split, coco) if coco else _of_left_out(split, table, place)
        return
    row = 0
    for block in spread(by_workers(_Files(index, data)), len(index), counted):
        for told in block["told"]:
            for kind, where, what in told:
                yield Finding(kind, split, label_file(index.file(row)), where, what)
            row += 1


class _Places:
    """Where it is said what is on an image; where that is no place of its own, the image itself."""

    def __init__(self, index: Index, table: Table | None):
        self.index, self.places = index, table.places if table is not None else []
        self.arrays = table.arrays if table is not None else {}

    def __call__(self, row: int, number: int | None = None) -> tuple[str, str]:
        """File and place of an image, or of an object of it by its number there."""
        if not self.places:
            return self.index.file(row), ""
        file, where = self.places[row]
        return file, ", ".join(filter(None, (where, f"object {number}" if number else "")))

    def of_fault(self, row: int, text: str, source: str) -> tuple[str, str, str]:
        """File, place and words of a fault that begins with its image, and says by itself which object it is of."""
        if not self.places:
            return source, "", text
        what = text.removeprefix(f"{self.index.file(row)}: ")
        file, where = self.places[row]
        for begin in (file, os.path.basename(file), where):  # as readers name them
            what = what.removeprefix(f"{begin}: ")
        number = re.match(r"object (\d+):? ", what)
        return *self(row, int(number[1]) if number else None), what.removeprefix(number[0] if number else "")

    def number(self, row: int, i: int) -> int:
        """Of the box that is the i-th of an image that is trained on, its number where it is said, from 1."""
        return int(self.arrays["numbers"][self.arrays["first"][row] + i]) if self.places else i + 1


def _of_left_out(split: str, table: Table, place: _Places) -> Iterator[Finding]:
    """Objects of an annotation file that its table is without."""
    for row, (sizeless, again) in table.left_out.items():
        for number in sizeless:
            what = "its width or its height is not above 0; it is left out"
            yield Finding("box of no size", split, *place(row, number), what)
        for number in again:
            yield Finding("duplicate box", split, *place(row, number), "it is an earlier one again, and counts once")


def of_boxes(split: str, index: Index, data: DataFiles, imgsz: int) -> Iterator[Finding]:
    """Boxes that are too small for the training, that leave their image, and that lie on each other."""
    counts = np.diff(index.first)
    image = np.repeat(np.arange(len(index)), counts)
    shapes = index.shapes[image].astype(np.float64)
    sides = index.boxes[:, 2:] * shapes[:, ::-1]
    shorter = sides.min(1) * imgsz / shapes.max(1).clip(1) if len(sides) else np.zeros(0)
    tiny = np.flatnonzero((shorter < TINY) & (shorter > 0))
    for row, first, number in zip(*np.unique(image[tiny], return_index=True, return_counts=True), strict=True):
        least = shorter[tiny[first : first + number]].min()
        what = f"{number} of its boxes are under {TINY:g} px at {imgsz} px, the least {least:.2g} px"
        yield Finding("tiny box", split, index.file(int(row)), "", what)
    far = over_edge(index.boxes)
    annotated = bool(data.annotations(split))  # then each annotation is looked at
    place = _Places(index, Table(*data.tables[split]) if split in data.tables and not annotated else None)
    for i in np.flatnonzero(far > OUTSIDE).tolist() if place.places else ():
        number = place.number(image[i], i - index.first[image[i]])
        yield Finding("box over the edge", split, *place(image[i], number), OVER.format(far[i]))
    if annotated:
        return
    corners = (index.boxes[:, :2] - index.boxes[:, 2:] / 2, index.boxes[:, 2:])
    lying = lying_on_another(image, index.cls, np.concatenate(corners, 1) * np.tile(shapes[:, ::-1], 2))
    keys = image[lying] * (len(data.names) + 1) + index.cls[lying].clip(0, len(data.names))
    for key in np.unique(keys).tolist():
        row, cls = divmod(key, len(data.names) + 1)
        name = data.names.get(cls, str(cls))
        numbers = [place.number(row, i) for i in (lying[keys == key] - index.first[row]).tolist()]
        what = f"its boxes {', '.join(map(str, numbers))} of {name} lie on each other (IoU above 0.95)"
        yield Finding("duplicate box", split, *place(row, numbers[-1]), what)
