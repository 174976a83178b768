"""What an annotation file says of all images of a split, as arrays: it is parsed once, and all ranks map what it says.

A table lies beside the indexes. It is of one state of the file: a file that has changed gets another. Images that are
inside such files are written out once, into a folder beside the table; the next state's takes its place.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

import train
from train.config.errors import InputError
from train.data.arrays import fault_of, open_arrays, remove_unused, write_arrays
from train.processes.holders import remove_unheld

VERSION = 3  # of the readers
ENDING = f".table{VERSION}"
INSIDE = f".inside{VERSION}"  # of a folder of images that were in the files themselves
OUTSIDE = 0.01  # of the image's side, by which coordinates may leave it, as in a label file


@dataclass
class Said:
    """What an annotation file says, by image in the order of their paths."""

    files: list[str]  # paths of the images, relative to a folder that is not in the file
    shapes: np.ndarray  # (n, 2) int32 height, width in pixels; 0 where the file does not say
    image: np.ndarray  # (m,) int64: place of each object's image, ascending
    category: np.ndarray  # (m,) int64 category id
    boxes: np.ndarray  # (m, 4) float64: left, top, width, height in pixels
    points: list[np.ndarray]  # of each object a polygon (k, 2), or keypoints (k, 3), in pixels; empty of boxes alone
    names: dict[int, str]  # of the categories, by id
    numbered: bool = True  # whether these ids are the file's own, and so the order of the classes
    keypoint_names: tuple[str, ...] = ()
    faults: dict[int, str] = field(default_factory=dict)  # by image why what is said of it cannot be used
    numbers: np.ndarray | None = None  # (m,) of each object where its image is said, from 1; unset of COCO
    places: list[tuple[str, str]] = field(default_factory=list)  # by image file and place in it; empty of COCO
    inside: bool = False  # whether the images were in the files, and are now in `images_of` the table


class Table:
    """What an annotation file says, mapped.

    Args:
        file: of the table.
        classes: pairs of a category id and its class index.
    """

    def __init__(self, file: str, classes: Iterable[tuple[int, int]] = ()):
        self.name = Path(file).name
        self.arrays, about = open_arrays(Path(file))
        self.source, self.dimensions = about["source"], int(about["dimensions"])
        self.numbered, self.images = bool(about["numbered"]), images_of(Path(file)) if about["inside"] else None
        self.names = {int(id_): name for id_, name in json.loads(about["names"])}
        self.keypoint_names = tuple(json.loads(about["keypoint_names"]))
        self.faults = {int(row): fault for row, fault in json.loads(about["faults"]).items()}
        # By image numbers of its objects without a size, and of those that are another again: they are left out
        self.left_out = {int(row): numbers for row, numbers in json.loads(about["left_out"]).items()}
        self.classes = dict(classes)

    @property
    def files(self) -> list[str]:
        """Paths of the images, sorted."""
        text = os.fsdecode(self.arrays["paths"].tobytes())
        return text.split("\0") if text else []

    @property
    def places(self) -> list[tuple[str, str]]:
        """By image the file, and the place in it, that says what is on it; empty where one file says all."""
        parts = iter(os.fsdecode(self.arrays["places"].tobytes()).split("\0") if len(self.arrays["places"]) else ())
        return [*zip(parts, parts, strict=True)]

    @property
    def keypoints(self) -> int:
        """Keypoints of an object."""
        ends = self.arrays["point_ends"]
        return int(ends[1]) // 3 if self.dimensions == 3 and len(ends) > 1 else len(self.keypoint_names)

    def labels(self, row: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """What `read_label` returns of a label file, of the image in this row.

        Args:
            row: of the table.
            shape: height and width of the image itself, in pixels.

        Raises:
            ValueError: the file is about another size, or an object leaves the image. It does where its line in a label
                file would: by its middle, its sides and its points, so that the same numbers are the same labels.
        """
        height, width = shape
        said = tuple(self.arrays["shapes"][row].tolist())
        if all(said) and said != shape:
            raise ValueError(f"it says {said[1]}x{said[0]} px of an image that has {width}x{height}")
        first, end = self.arrays["first"][row : row + 2].tolist()
        boxes, ends = self.arrays["boxes"][first:end], self.arrays["point_ends"]
        points: list[np.ndarray] = []
        if len(ends):
            scale = (width, height, 1)[: self.dimensions]
            bounds = (ends[first : end + 1] - ends[first]) // self.dimensions
            whole = self.arrays["points"][ends[first] : ends[end]].reshape(-1, self.dimensions) / scale
            points = [whole[a:b] for a, b in pairwise(bounds.tolist())]
            seen = whole[whole[:, 2] > 0] if self.dimensions == 3 else whole  # other keypoints may be anywhere
            if (lost := is_outside(seen[:, :2])).any():
                x, y = (seen[lost][0, :2] * (width, height)).tolist()
                raise ValueError(f"the point {x:g}, {y:g} leaves its image of {width}x{height} px")
        sides = np.array((width, height), np.float64)
        table = np.concatenate(((boxes[:, :2] + boxes[:, 2:] / 2) / sides, boxes[:, 2:] / sides), 1)
        if (outside := is_outside(table)).any():
            box = boxes[outside][0].tolist()
            numbers = self.arrays["numbers"]
            which = f"object {numbers[first + outside.argmax()]}: the" if len(numbers) else "the"
            raise ValueError(f"{which} bbox {box} (left, top, width, height) leaves its image of {width}x{height} px")
        cls = np.array([self.classes[id_] for id_ in self.arrays["category"][first:end].tolist()], np.float64)
        return cls, table, points

    def boxes(self, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """(m, 4) float64 boxes as the file gives them: left, top, width, height in pixels.

        Args:
            rows: of the images, one for each box.
            numbers: of each box within its image, from 0.
        """
        boxes: np.ndarray = self.arrays["boxes"][self.arrays["first"][rows] + numbers]
        return boxes


def is_outside(shares: np.ndarray) -> np.ndarray:
    """(n,) bool: whether one of the coordinates (n, k), shares of an image's sides, leaves it too far."""
    return np.asarray(((shares < -OUTSIDE) | (shares > 1 + OUTSIDE)).any(1))


def over_edge(boxes: np.ndarray) -> np.ndarray:
    """By which share of the image's side each of the boxes (n, 4), xywh normalised, leaves it; below 0 inside."""
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    over: np.ndarray = np.maximum(-low, high - 1).max(1)
    return over


def images_of(table: Path) -> Path:
    """The folder of the images that were in the files of this table."""
    return table.with_name(table.name.removesuffix(ENDING) + INSIDE)


def kept_at(files: list[str], folder: Path, what: str = "", also: str = "") -> Path:
    """Where the table of annotation files in their present state is, or belongs.

    Args:
        files: the annotation file, and those that it lists.
        folder: where tables are kept.
        what: is read of it, where that is not all: both tables are kept.
        also: what the content depends on beside the files: one table takes the other's place.
    """
    place = hashlib.sha256(os.fsencode(f"{os.path.abspath(files[0])} {what}")).hexdigest()[:8]
    states = [_state(file) for file in files]
    stamp = hashlib.sha256(f"{states}{also}".encode()).hexdigest()[:16]
    return folder / f"{place}-{stamp}{ENDING}"


def table_of(table: Path, files: list[str], read: Callable[[], Said], say: Callable[[str], None] | None) -> str:
    """The table of an annotation file: kept, or made now. Call it on one process of a machine.

    Args:
        table: see `kept_at`; where it cannot be written to, a temporary folder takes its place.
        files: the annotation file, and those that it lists.
        read: reads them; images inside are in `images_of` the table then.
        say: is given a line before it is read; None has it not read now.

    Raises:
        InputError: there is none, and it is not to be read now; what `read` raises; or it can be kept nowhere.
    """
    if _is_kept(table):
        return str(table)
    if say is None:
        raise InputError(f"{files[0]} has not been read yet.")
    size = sum(_state(file)[0] for file in files) / 1e6
    say(f"reading {files[0]}, {size:.1f} MB{f' in {len(files)} files' * (len(files) > 1)}")
    said = read()
    if odd := [name for name in said.files if not _is_path(name)]:
        raise InputError(f"{files[0]} names an image {odd[0][:60]!r}, which no file can be called. Mend it there.")
    place = table.name.partition("-")[0]
    for at in (table, Path(train.scratch.name) / table.name)[: 1 if said.inside else 2]:
        try:
            write_arrays(at, *_packed(said, files[0]))
        except OSError as error:
            reason = error.strerror or error
            continue
        remove_unused(at, f"{place}-*.table*")
        for other in at.parent.glob(f"{place}-*.inside*"):
            if other != images_of(at):
                remove_unheld(other)
        return str(at)
    raise InputError(
        f"What {files[0]} says cannot be kept in {table.parent}: {reason}. Name another place with --index-dir."
    )


def _is_kept(table: Path) -> bool:
    """Whether a table is there, with all images that were in its files."""
    if fault_of(table):
        return False
    with contextlib.suppress(OSError):  # another user's
        os.utime(table)
    kept = Table(str(table))
    try:
        return kept.images is None or len(os.listdir(kept.images)) == len(kept.arrays["shapes"])
    except OSError:
        return False


def _state(file: str) -> tuple[int, int]:
    """Bytes and time of the last change (ns) of a file; nothing of one that is not there."""
    try:
        found = os.stat(file)
    except (OSError, ValueError):  # ValueError: a zero byte in a list
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _is_path(name: str) -> bool:
    """Whether a file could be called so: JSON can write a zero byte, and half a character."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _packed(said: Said, file: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    kept, left_out = _each_once(said)
    points = [said.points[i] for i in kept] if said.points else []
    counts = np.bincount(said.image[kept], minlength=len(said.files))
    sizes = np.array([one.size for one in points], np.int64)
    numbers = said.numbers[kept] if said.numbers is not None else ()
    arrays: dict[str, np.ndarray] = {
        "numbers": np.array(numbers, np.int32),
        "places": np.frombuffer(os.fsencode("\0".join(chain.from_iterable(said.places))), np.uint8),
        "paths": np.frombuffer(os.fsencode("\0".join(said.files)), np.uint8),
        "shapes": said.shapes.astype(np.int32),
        "first": np.append(0, np.cumsum(counts)).astype(np.int64),
        "category": said.category[kept].astype(np.int64),
        "boxes": said.boxes.astype(np.float64).reshape(-1, 4)[kept],
        "point_ends": np.append(0, np.cumsum(sizes)).astype(np.int64) if points else np.zeros(0, np.int64),
        "points": np.concatenate([one.ravel() for one in points]) if points else np.zeros(0),
    }
    dimensions = points[0].shape[1] if points else 2
    about = {"source": file, "names": json.dumps([*said.names.items()]), "dimensions": str(dimensions)}
    return arrays, about | {
        "keypoint_names": json.dumps(said.keypoint_names),
        "faults": json.dumps(said.faults),
        "left_out": json.dumps(left_out),
        "numbered": "yes" * said.numbered,
        "inside": "yes" * said.inside,
    }


def _each_once(said: Said) -> tuple[np.ndarray, dict[int, list[list[int]]]]:
    """Places of the objects that have a size, without those of an image that are there twice, which count once, as in a
    label file; and by image the numbers of those that have none, and of those that are another again.
    """
    kept: list[int] = []
    left_out: dict[int, list[list[int]]] = {}
    sized: list[bool] = np.min(said.boxes.reshape(-1, 4)[:, 2:] > 0, axis=1, initial=True).tolist()
    ends = np.searchsorted(said.image, np.arange(len(said.files) + 1))
    for row, (first, end) in enumerate(pairwise(ends.tolist())):
        rows: dict[bytes, int] = {}
        for i in range(first, end):
            if sized[i]:
                points = said.points[i].tobytes() if said.points else b""
                rows.setdefault(said.category[i].tobytes() + said.boxes[i].tobytes() + points, i)
        kept += rows.values()
        if len(rows) < end - first:
            there = {*rows.values()}
            gone = [i for i in range(first, end) if i not in there]
            left_out[row] = [[_number(said, i) for i in gone if sized[i] is kind] for kind in (False, True)]
    return np.array(kept, np.int64), left_out


def _number(said: Said, i: int) -> int:
    return int(said.numbers[i]) if said.numbers is not None else 0


def mirrored(names: Sequence[str]) -> tuple[int, ...]:
    """For keypoints of these names the one that each becomes in a mirror: the other side's; empty where no name has a
    side, or a side lacks the other.
    """
    swapped = [name.replace("left", "\0").replace("right", "left").replace("\0", "right") for name in names]
    if swapped == [*names] or len(set(names)) < len(names) or set(swapped) != set(names):
        return ()
    return tuple(names.index(name) for name in swapped)
