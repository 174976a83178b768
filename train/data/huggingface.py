"""Hugging Face's object detection on disk: parquet files of `image`, its bytes and its path, and `objects`, each with
`bbox` and `category`. The images are written out, for all that reads images takes files.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from train.config.errors import InputError
from train.config.plain import checked_name
from train.config.words import in_bytes
from train.data.formats import FAR, check_regular
from train.data.huggingface_names import class_names
from train.data.tables import Said
from train.processes import room
from train.processes.files import whole_folder

# Of a split the first word that is in its files' names, or their folder's, and where that is
WORDS = {"train": ("train", "training"), "val": ("validation", "valid", "val", "dev"), "test": ("test", "testing")}
PLACES = [f"{folder}{{}}{rest}.parquet" for folder in ("data/", "", "default/") for rest in ("-*", "", "/*")]
WHOLE = ("data/*.parquet", "*.parquet")  # without such a word all is to train on
CHUNK = 64_000_000  # bytes of a file that are in memory at a time, or a group of its rows where that is larger
QUIET = 5.0  # seconds after which it is said how far the images are
CROWD = ("iscrowd", "is_crowd")
# How a file of an image begins, and what it is called
KINDS = {
    rb"\xff\xd8\xff": ".jpg", rb"\x89PNG": ".png", rb"RIFF....WEBP": ".webp", rb"BM": ".bmp", rb"II\*\0|MM\0\*": ".tif",
    rb"....ftypavif": ".avif", rb"....ftyp(hei[cx]|mif1)": ".heic", rb"\0\0\0\x0cjP": ".jp2",
}  # fmt: skip


def parquet_splits(folder: Path) -> dict[str, dict[str, str]]:
    """The splits of a folder of parquet files; nothing where it has none."""
    places = {split: [place.format(word) for word in words for place in PLACES] for split, words in WORDS.items()}
    for patterns in (places, {"train": WHOLE}):
        found = {
            split: {"images": ".", "annotations": pattern}
            for split, names in patterns.items()
            if (pattern := next((name for name in names if parquet_files(str(folder / name))), ""))
        }
        if found:
            break
    return found


def parquet_below(folder: Path) -> Path | None:
    """A folder below that has such splits: some downloads hold several data sets."""
    below = (file for name in ("*/*.parquet", "*/*/*.parquet") for file in sorted(folder.glob(name)))
    places = (place for file in below for place in (file.parent.parent, file.parent))
    return next((place for place in places if parquet_splits(place)), None)


def parquet_files(pattern: str) -> list[str]:
    """The files of a split, sorted.

    Args:
        pattern: a folder, and what their names look like.
    """
    folder, _, name = pattern.rpartition("/")
    return sorted(str(file) for file in Path(folder).glob(name) if file.name[0] != "." and file.is_file())


@dataclass
class _Read:
    """What the rows say, one after the other."""

    names: dict[int, str]  # of the classes that numbers stand for; empty where the categories are names
    files: list[str] = field(default_factory=list)
    stems: set[str] = field(default_factory=set)  # of these, in lower case
    faults: dict[int, str] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)  # names that are categories, and their numbers
    image: list[int] = field(default_factory=list)
    category: list[int] = field(default_factory=list)
    boxes: list[list[float]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # of the objects in their rows
    places: list[tuple[str, str]] = field(default_factory=list)  # of the rows

    def add(self, file: str, objects: Any, fault: str, place: tuple[str, str]) -> None:
        """Add an image and its objects, or what is wrong with it or with one of them.

        Args:
            file: its name.
            objects: as its row has them.
            fault: why the image cannot be used.
            place: of the row, its file and where in it.
        """
        row = len(self.files)
        self.files.append(file)
        self.places.append(place)
        try:
            if fault:
                raise ValueError(fault)
            there = [entry or {} for entry in one_by_one(objects)]
            kept = [
                (number, *read_object(entry, number, self.names))
                for number, entry in enumerate(there, 1)
                if not any(entry.get(key) for key in CROWD)
            ]
        except ValueError as error:
            self.faults[row] = f"{os.path.basename(place[0])}: {place[1]}: {error}"
            return
        for number, category, box in kept:
            self.image.append(row)
            self.numbers.append(number)
            known = category if isinstance(category, int) else self.found.setdefault(category, len(self.found))
            self.category.append(known)
            self.boxes.append(box)

    def said(self) -> Said:
        """All of it, in the order of the images' names."""
        order = sorted(range(len(self.files)), key=self.files.__getitem__)
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        image = place[np.array(self.image, np.int64)]
        by_image = np.argsort(image, kind="stable")
        return Said(
            files=[self.files[row] for row in order],
            shapes=np.zeros((len(order), 2), np.int32),
            image=image[by_image],
            category=np.array(self.category, np.int64)[by_image],
            boxes=np.array(self.boxes, np.float64).reshape(-1, 4)[by_image],
            points=[],
            names=self.names or {number: name for name, number in self.found.items()},
            numbered=bool(self.names),
            faults={int(place[row]): fault for row, fault in self.faults.items()},
            numbers=np.array(self.numbers, np.int64)[by_image],
            places=[self.places[row] for row in order],
            inside=True,
        )


def read_object(entry: dict[str, Any], number: int, names: dict[int, str]) -> tuple[int | str, list[float]]:
    """Category and box of an object; ValueError says what is wrong with it.

    Args:
        entry, number: the object.
        names: see `_Read`.
    """
    box, category = entry.get("bbox"), entry.get("category")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise ValueError(f"object {number} has the bbox {str(box)[:80]}, not left, top, width, height in pixels")
    if isinstance(category, str):
        checked_name(category, f"the category of object {number}")
    elif not isinstance(category, int) or category not in names:
        known = f"there are 0 to {len(names) - 1}" if names else "it must be a name"
        raise ValueError(f"object {number} has the category {category}; {known}")
    return category, [float(value) for value in box]


def said_by_parquet(
    files: list[str], names: dict[int, str], beside: Path, images: Path, say: Callable[[str], None]
) -> Said:
    """What parquet files say to be trained on: all but crowds. Their images are in a folder then, whole or not at all.

    Args:
        files: of the split.
        names: of the classes, where the files have numbers as categories and do not name them.
        beside: where images are of which a row has the path alone.
        images: the folder that is made; an image is called as its path ends, or by the number of its row.
        say: is given a line now and then on how far it is.

    Raises:
        InputError: a file is none of object detection, nobody names the classes, or there is no room for the images.
    """
    opened = [_open(file) for file in files]
    read, total, spoken = _Read(_names(opened, names)), sum(one.rows for one in opened), time.monotonic()
    mend = "Name another place with --index-dir."
    try:
        size, free = sum(map(os.path.getsize, files)), room.disk(images.parent)
        if free < size:
            raise InputError(
                f"The images in {files[0]} and the others of its split take {in_bytes(size)} in {images.parent}, where "
                f"{in_bytes(free)} are free. {mend}"
            )
        with whole_folder(images) as draft:
            for one in opened:
                for number, (image, objects) in enumerate(_rows(one), 1):
                    data, path, fault = _image(image, beside)
                    name = _stem(path, len(read.files), read.stems) + _ending(data)
                    (draft / name).write_bytes(data)
                    read.add(name, objects, fault, (one.file, f"row {number}"))
                    if not len(read.files) % -(-total // 10) and time.monotonic() - spoken > QUIET:
                        spoken = time.monotonic()
                        say(f"{len(read.files)} of {total} images written to {images.parent}")
    except OSError as error:
        raise InputError(
            f"The images in {files[0]} cannot be written to {images.parent}: {error.strerror or error}. {mend}"
        ) from None
    return read.said()


@dataclass
class _File:
    """A parquet file of object detection."""

    file: str
    rows: int
    names: list[str]  # of the classes, as its metadata gives them; empty where it does not
    numbers: bool  # whether the categories are numbers


def _open(file: str) -> _File:
    """Look at a file; InputError where it cannot be read, or has not the columns that it must have."""
    import polars as pl  # here, for it takes long, and a data set that has been read does not need it

    try:
        frame = pl.scan_parquet(file, glob=False)
        schema, rows = frame.collect_schema(), frame.select(pl.len()).collect().item()
        metadata = pl.read_parquet_metadata(file).get("huggingface", "")
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise _unreadable(file, error) from None

    def element(kind: Any) -> Any:
        return kind.inner if isinstance(kind, pl.List) else kind

    def fields(kind: Any) -> dict[str, Any]:
        return {one.name: one.dtype for one in kind.fields} if isinstance(kind, pl.Struct) else {}

    image, objects = schema.get("image"), fields(element(schema.get("objects")))
    known = {"bytes": pl.Binary, "path": pl.String}
    parts = {name: kind for name, kind in fields(image).items() if name in known}
    listed = isinstance(schema.get("objects"), pl.Struct)  # of each property a list
    category = element(objects.get("category"))
    numbers = category is not None and category.is_integer()
    if not (
        isinstance(objects.get("bbox"), (pl.List, pl.Array))
        and isinstance(objects.get("category"), pl.List) == listed
        and (numbers or category in (pl.String, pl.Categorical, pl.Enum))
        and (image == pl.Binary or parts)
        and all(kind in (known[name], pl.Null) for name, kind in parts.items())
    ):
        columns = ", ".join(f"{name} ({kind})" for name, kind in schema.items())
        raise InputError(
            f"{file} has the columns {columns[:400]}; Hugging Face's object detection has the columns `image` (bytes, "
            "path) and `objects`, and in these `bbox` and `category`, a number or a name."
        )
    return _File(file, int(rows), class_names(metadata), numbers)


def _rows(one: _File) -> Iterator[tuple[Any, Any]]:
    """Image and objects of each row of a file."""
    for frame in _frames(one, "image", "objects"):
        yield from frame.iter_rows()


def _frames(one: _File, *columns: str) -> Iterator[Any]:
    """Rows of a file, of which some are in memory at a time."""
    import polars as pl

    step = max(1, CHUNK * one.rows // max(os.path.getsize(one.file), 1))
    try:
        frame = pl.scan_parquet(one.file, glob=False).select(*(columns or ["*"]))
        for first in range(0, one.rows, step):
            yield frame.slice(first, step).collect()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise _unreadable(one.file, error) from None


def named_frames(files: list[str], beside: Path) -> Iterator[tuple[list[str], Any, str]]:
    """All rows of some files with all their columns: what their images are called in the folder that
    `said_by_parquet` makes, the rows, and what their file's metadata say for `datasets`.

    Args:
        files, beside: see `said_by_parquet`.
    """
    import polars as pl

    stems: set[str] = set()
    for file in files:
        about = pl.read_parquet_metadata(file).get("huggingface", "")
        for frame in _frames(_open(file)):
            names = []
            for value in frame["image"].to_list():
                data, path, _ = _image(value, beside)
                names.append(_stem(path, len(stems), stems) + _ending(data))
            yield names, frame, about


def _unreadable(file: str, error: BaseException) -> InputError:
    return InputError(f"{file} is not a parquet file that can be read: {str(error)[:200]}. Download it anew.")


def _names(opened: list[_File], given: dict[int, str]) -> dict[int, str]:
    """The classes that numbers stand for, by number; empty where the categories are names.

    Raises:
        InputError: nobody names them, or the files do it differently.
    """
    first = opened[0]
    if other := [one.file for one in opened if (one.names, one.numbers) != (first.names, first.numbers)]:
        raise InputError(f"{other[0]} has other classes in its metadata than {first.file}; they are of two data sets.")
    if not first.numbers:
        return {}
    if len(set(first.names)) < len(first.names):
        twice = next(name for name in first.names if first.names.count(name) > 1)
        raise InputError(f"{first.file} names two classes {twice!r} in its metadata.")
    if not first.names and not given:
        raise InputError(
            f"{first.file} has numbers as categories, and neither it nor README.md says what they are called. Write "
            "that into a file data.yaml in the folder that --data names, as a line such as `names: [person, car]`, in "
            "their order."
        )
    declared = {i: checked_name(name, f"{first.file}: class {i}") for i, name in enumerate(first.names)}
    return declared or given


def _image(value: Any, beside: Path) -> tuple[bytes, str, str]:
    """The bytes of a row's image, its path, and what is wrong with it."""
    parts: dict[str, Any] = {"bytes": value} if isinstance(value, bytes) else value or {}
    data, path = parts.get("bytes"), parts.get("path") or ""
    if data is None and path:
        data = _found(path, beside)
        if not data:
            return b"", path, f"it has no image but the path {path[:200]!r}, where no file is in {beside}"
    if not data:
        return b"", path, "it has no image"
    return data, path, "" if _ending(data) else f"its image is in no known form: it begins with {data[:8].hex()}"


def _found(path: str, beside: Path) -> bytes:
    """The file at a path in this folder or below it; nothing where there is none, or the path leads out of it."""
    file = os.path.normpath(beside / path)
    if not file.startswith(f"{os.path.normpath(beside)}/"):
        return b""
    try:
        check_regular(file)
        return Path(file).read_bytes()
    except (OSError, ValueError):  # ValueError: a zero byte
        return b""


def _ending(data: bytes) -> str:
    return next((ending for kind, ending in KINDS.items() if re.match(kind, data, re.DOTALL)), "")


def _stem(path: str, row: int, taken: set[str]) -> str:
    """A name for an image, without an ending: its path's last part, where that is plain, and no other image has it."""
    stem = os.path.splitext(re.split(r"[/\\]", path)[-1])[0]
    if not re.fullmatch(r"\w[\w .()+=@-]*", stem) or len(os.fsencode(stem)) > 200:
        stem = f"{row:08}"
    while stem.lower() in taken:
        stem += f"_{row}"
    taken.add(stem.lower())
    return stem


def one_by_one(objects: Any) -> list[Any]:
    """An image's objects, of a list of them, or of a list of each of their properties."""
    if not isinstance(objects, dict):
        return objects or []
    needed = {key: objects[key] for key in ("bbox", "category", *CROWD) if isinstance(objects.get(key), list)}
    lengths = {len(values) for values in needed.values()}
    if len(lengths) > 1:
        raise ValueError("it has " + ", ".join(f"{len(values)} {key}" for key, values in needed.items()))
    lists = {key: values for key, values in objects.items() if isinstance(values, list) and {len(values)} == lengths}
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < FAR
