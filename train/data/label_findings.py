"""What is wrong with labels, line by line or annotation by annotation, and which boxes are seldom meant."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from train.data.findings import Finding
from train.data.formats import label_text, read_label
from train.data.index import Index
from train.data.listing import DataFiles, label_file
from train.data.scan import Counted, by_workers, spread
from train.data.tables import OUTSIDE, Table

try:
    import hotcoco
except ImportError:  # then boxes that lie on each other are found where they are equal
    hotcoco = None  # type: ignore[assignment]

# What the readers say, and the kind that it is of; the first that fits
SAID = (
    ("has class", "class out of range"),
    ("negative", "negative size"),
    ("outside 0 to 1", "coordinate outside the image"),
    ("leaves its image", "coordinate outside the image"),
    ("mixes boxes and polygons", "boxes and polygons mixed"),
    ("UTF-8", "not UTF-8"),
)
# And what hotcoco's check of an annotation file says
COCO = {
    "duplicate_ann_id": ("annotation that cannot be placed", "its id is another's, too"),
    "orphan_image_id": ("annotation that cannot be placed", "the file does not list its image"),
    "orphan_category_id": ("annotation that cannot be placed", "the file does not list its category"),
    "degenerate_bbox": ("box of no size", "its box has no width or no height; it is left out"),
    "bbox_out_of_bounds": ("coordinate outside the image", "its box leaves its image"),
    "near_duplicate": ("duplicate box", "it lies on another of its class (IoU above 0.95)"),
}
OVER = "its box leaves the image by {:.0%} of a side, and is trained on, for its middle is inside"
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


def over_edge(boxes: np.ndarray) -> np.ndarray:
    """By which share of the image's side each of the boxes (n, 4), xywh normalised, leaves it; below 0 inside."""
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    over: np.ndarray = np.maximum(-low, high - 1).max(1)
    return over


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
    annotated = split in data.tables
    for row, text in index.faults().items():
        file = index.file(row)
        what = text.removeprefix(f"{file}: ")
        if what != text:
            yield Finding("image that cannot be read", split, file, "", what)
        elif annotated:
            source, _, what = text.partition(": ")
            yield Finding(_kind(what), split, source, "", what)
    if annotated:
        yield from of_annotations(split, data.annotations(split))
        yield from () if data.annotations(split) else _of_left_out(split, index, Table(*data.tables[split]))
        return
    row = 0
    for block in spread(by_workers(_Files(index, data)), len(index), counted):
        for told in block["told"]:
            for kind, where, what in told:
                yield Finding(kind, split, label_file(index.file(row)), where, what)
            row += 1


def _of_left_out(split: str, index: Index, table: Table) -> Iterator[Finding]:
    """Objects of an annotation file that its table is without."""
    for row, (sizeless, again) in table.left_out.items():
        file = index.file(row)
        if sizeless:
            yield Finding("box of no size", split, file, "", f"{sizeless} of its boxes have no size, and are left out")
        if again:
            yield Finding("duplicate box", split, file, "", f"{again} of its boxes are another again, and count once")


def of_annotations(split: str, file: str) -> Iterator[Finding]:
    """What is wrong with the annotations of a file in COCO's form, each by its id."""
    if not file or hotcoco is None:
        return
    try:
        said = hotcoco.COCO(file).healthcheck()
    except (OSError, ValueError, RuntimeError):  # no such file; the reader says why
        return
    for one in said["errors"] + said["warnings"]:
        kind, what = COCO.get(one["code"], ("", ""))
        for id_ in one["affected_ids"] if kind else ():
            yield Finding(kind, split, file, f"annotation {id_}", what)


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
    for i in np.flatnonzero(far > OUTSIDE).tolist() if split in data.tables else ():
        yield Finding("box over the edge", split, index.file(int(image[i])), "", OVER.format(far[i]))
    if hotcoco is None or data.annotations(split):
        return
    lying = _lying_on_another(index, image, shapes)
    keys = image[lying] * (len(data.names) + 1) + index.cls[lying].clip(0, len(data.names))
    for key in np.unique(keys).tolist():
        row, cls = divmod(key, len(data.names) + 1)
        name = data.names.get(cls, str(cls))
        places = (lying[keys == key] - index.first[row] + 1).tolist()
        what = f"its boxes {', '.join(map(str, places))} of {name} lie on each other (IoU above 0.95)"
        yield Finding("duplicate box", split, index.file(row), "", what)


def _lying_on_another(index: Index, image: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Rows of boxes that another of their image and class overlaps by more than 0.95, ascending."""
    if not len(image):
        return np.zeros(0, np.int64)
    sides = shapes[:, ::-1]
    boxes = np.concatenate((index.boxes[:, :2] - index.boxes[:, 2:] / 2, index.boxes[:, 2:]), 1) * np.tile(sides, 2)
    filled = np.unique(image)
    coco = hotcoco.COCO.from_arrays(
        [{"id": int(i), "width": int(index.shapes[i, 1]), "height": int(index.shapes[i, 0])} for i in filled],
        [{"id": int(k), "name": str(k)} for k in np.unique(index.cls)],
        image, index.cls.astype(np.int64), boxes, ids=np.arange(len(image)),
    )  # fmt: skip
    said = [one for one in coco.healthcheck()["warnings"] if one["code"] == "near_duplicate"]
    return np.array(sorted(said[0]["affected_ids"]) if said else [], np.int64)
