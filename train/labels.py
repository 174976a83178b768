"""Where the images of a data set are, and what its labels say. Files are read; nothing in them is executed."""

import glob
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from ultralytics.data.utils import IMG_FORMATS, exif_size, img2label_paths
from ultralytics.utils import ROOT
from ultralytics.utils.ops import segments2boxes

from train.config import EvalConfig, InputError
from train.shapes import draw_shapes


# Where the files are --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DataFiles:
    """A data YAML, resolved: the images of each split it names, sorted, and the class names."""

    name: str
    root: Path
    names: dict[int, str]
    channels: int
    splits: dict[str, Any]  # train, val, test as the YAML gives them

    def images(self, split: str, fraction: float = 1.0, repeats: bool = False) -> list[str]:
        """Sorted image paths of a split, or the first of them: a share, or a number where `fraction` is above 1.

        With `repeats` an image that is listed twice counts twice, as people oversample rare classes for training.

        Raises:
            InputError: the YAML does not name the split, or what it names is not there or holds no image.
        """
        entries = self.splits.get(split)
        if not entries:
            raise InputError(f"{self.name} names no `{split}` images; add a line `{split}: folder-or-list.txt`.")
        files: list[str] = []
        for entry in _as_list(entries):
            path = _located(self.root, entry)
            if os.path.isdir(path):  # unlike pathlib's, these take any string
                files += glob.glob(str(Path(glob.escape(str(path))) / "**" / "*.*"), recursive=True)  # follows links
            elif os.path.isfile(path):
                try:
                    lines = path.read_text(encoding="utf-8-sig").split("\n")
                except ValueError:
                    raise InputError(
                        f"{self.name} says `{split}: {entry}`, but {path} is not a list in UTF-8."
                    ) from None
                files += (_listed(line.strip(), path.parent, self.root) for line in lines if line.strip())
            else:
                raise InputError(f"{self.name} says `{split}: {entry}`, but there is no {path}.")
        files = [file for file in files if file.rpartition(".")[2].lower() in IMG_FORMATS]
        files = sorted(files if repeats else set(files))
        if not files:
            raise InputError(f"{self.name}: no images in {', '.join(str(self.root / e) for e in _as_list(entries))}.")
        return files[: max(1, round(fraction * len(files)))] if fraction <= 1 else files[: round(fraction)]


def _located(root: Path, entry: str) -> Path:
    """The path of a split's entry; like Ultralytics, without a leading ../ where only that is there."""
    path = root / entry
    if entry.startswith("../") and not os.path.exists(path) and os.path.exists(root / entry[3:]):
        return root / entry[3:]
    return path


def _as_list(entries: Any) -> list:
    return entries if isinstance(entries, list) else [entries]


def _listed(line: str, beside: Path, root: Path) -> str:
    """A line of a .txt list: `./` is the list's folder; else absolute, from the working directory or from the root."""
    if line.startswith("./"):
        return str(beside / line[2:])
    if os.path.isabs(line) or os.path.exists(line) or not (root / line).exists():
        return line
    return str(root / line)


def find_data(data: str, single_cls: bool = False) -> DataFiles:
    """Resolve `--data`; nothing in the YAML is executed and nothing is downloaded. Call it on one process: it may draw.

    Raises:
        InputError: no such YAML, a YAML that is not a data set's, or a data set that is not on this machine.
    """
    if data == "shapes":
        try:
            data = str(draw_shapes(Path("datasets")))
        except OSError as error:
            raise InputError(
                f"--data shapes is drawn into {Path('datasets').absolute()}, and cannot be: {error}"
            ) from None
    path = Path(os.path.expanduser(data))
    if not os.path.isfile(path):
        packaged = ROOT / "cfg" / "datasets" / path.name
        if path.suffix not in (".yaml", ".yml") or str(path) != path.name or not packaged.is_file():
            raise InputError(f"--data is {data!r}, but there is no such file (looked for {path.absolute()}).")
        path = packaged
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} is not YAML that can be read: {error}") from None
    try:
        given = _DataYaml.model_validate(content if isinstance(content, dict) else {})
    except pydantic.ValidationError as error:
        faults = "; ".join(f"`{'.'.join(map(str, e['loc'][:1]))}`: {e['msg'].lower()}" for e in error.errors())
        raise InputError(f"{path} is not a data YAML, which lists train, val and names ({faults}).") from None
    if given.names is None:
        if given.nc is None:
            raise InputError(f"{path} has no `names`; a data YAML lists train, val and the class names.")
        given.names = [f"class_{index}" for index in range(given.nc)]
    pairs = given.names.items() if isinstance(given.names, dict) else enumerate(given.names)
    names = {index: str(name) for index, name in pairs}
    if not names or sorted(names) != list(range(len(names))):
        raise InputError(
            f"{path}: the class indices in `names` are {sorted(names)}; they must go from 0 up, one by one."
        )
    if given.nc is not None and given.nc != len(names):
        raise InputError(f"{path} says nc: {given.nc} but names {len(names)} classes.")
    splits = {name: entries for name in ("train", "val", "test") if (entries := getattr(given, name))}
    root = _root(path, given.path, splits)
    return DataFiles(str(path.absolute()), root, {0: "item"} if single_cls else names, given.channels, splits)


class _DataYaml(pydantic.BaseModel):
    """What is read of a data YAML; everything else in it is left alone."""

    path: str | None = None
    train: str | list[str] | None = None
    val: str | list[str] | None = pydantic.Field(
        default=None, validation_alias=pydantic.AliasChoices("val", "validation")
    )
    test: str | list[str] | None = None
    names: dict[int, Any] | list[Any] | None = None
    nc: int | None = pydantic.Field(default=None, ge=1, le=1_000_000)
    channels: int = pydantic.Field(default=3, ge=1)


def _root(path: Path, named: str | None, splits: dict[str, Any]) -> Path:
    """The folder that the splits are relative to: the first candidate that holds one of them."""
    base = Path(os.path.expanduser(named or "."))
    folders = [path.parent, Path.cwd(), Path.cwd() / "datasets", *_ultralytics_datasets()]
    candidates = [base] if base.is_absolute() else [(folder / base).resolve() for folder in folders]
    for candidate in candidates:
        if any(
            os.path.exists(_located(candidate, entry)) for entries in splits.values() for entry in _as_list(entries)
        ):
            return candidate
    looked = ", ".join(str(candidate) for candidate in dict.fromkeys(candidates))
    raise InputError(
        f"The images of {path} ({', '.join(f'{k}: {v}' for k, v in splits.items())}) are not on this machine. "
        f"Looked in {looked}. Put them in one of these folders or mend `path` in the YAML; nothing is downloaded."
    )


def _ultralytics_datasets() -> list[Path]:
    """The data-set folder in the user's Ultralytics settings, which are only read."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    try:
        return [Path(json.loads((Path(base) / "Ultralytics" / "settings.json").read_text())["datasets_dir"])]
    except (OSError, ValueError, KeyError, TypeError):
        return []


# What the labels say --------------------------------------------------------------------------------------------------
@dataclass
class Labels:
    """One image's ground truth as its label file gives it."""

    im_file: str
    image_id: int  # COCO image id
    shape: tuple[int, int]  # height, width in pixels, after EXIF rotation
    cls: np.ndarray  # (n,) class indices
    boxes: np.ndarray  # (n, 4) float64 xywh: centre and size, normalised to the image
    segments: list[np.ndarray]  # (k, 2) polygons, normalised; empty where the file holds boxes


def read_label(text: str, classes: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Parse a YOLO label file: rows of `class x y w h`, or of `class x1 y1 x2 y2 x3 y3 …`.

    Returns classes (n,), boxes (n, 4) float64 xywh normalised, and polygons. Ultralytics' rules are followed: values
    may leave 0 to 1 by 0.01, duplicate rows count once.

    Raises:
        ValueError: what is wrong, with the line number.
    """
    rows, seen = [], set()
    for number, line in enumerate(text.splitlines(), 1):
        if not (fields := line.split()):
            continue
        try:
            row = [float(field) for field in fields]
        except ValueError:
            raise ValueError(f"line {number} is not numbers: {line[:60]!r}") from None
        if len(row) < 5 or (len(row) > 5 and (len(row) < 7 or len(row) % 2 == 0)):
            raise ValueError(f"line {number} has {len(row)} columns; a box has 5, a polygon an odd number from 7")
        if not all(map(math.isfinite, row)):
            raise ValueError(f"line {number} holds a value that is not finite")
        if row[0] % 1 or not 0 <= row[0] < classes:
            raise ValueError(f"line {number} has class {row[0]:g}; there are the classes 0 to {classes - 1}")
        if min(row[1:]) < -0.01 or max(row[1:]) > 1.01 or (len(row) == 5 and min(row[3:]) < 0):
            raise ValueError(f"line {number} has a coordinate outside 0 to 1")
        if tuple(row) not in seen:
            seen.add(tuple(row))
            rows.append(row)
    if not rows:
        return np.zeros(0), np.zeros((0, 4)), []
    polygons = [len(row) > 5 for row in rows]
    if any(polygons) and not all(polygons):
        raise ValueError("the file mixes boxes and polygons")
    segments = [np.array(row[1:]).reshape(-1, 2) for row in rows] if any(polygons) else []
    boxes = segments2boxes(segments) if segments else np.array([row[1:] for row in rows])
    return np.array([row[0] for row in rows]), np.asarray(boxes, dtype=np.float64), segments


def _read_image(im_file: str, label_file: str, image_id: int, classes: int) -> Labels | str:
    """One image's labels, or why it cannot be used. The image is opened, not decoded."""
    try:
        with Image.open(im_file) as image:
            image.verify()
            width, height = exif_size(image)
            jpeg = image.format == "JPEG"
        if jpeg and not _ends_whole(im_file):
            with Image.open(im_file) as image:
                image.load()  # verify() does not see that a JPEG is cut off; bytes behind its end are no fault
        if min(width, height) < 10:
            return f"{im_file}: {width}x{height} px is too small; 10 px is the least"
        try:
            text = Path(label_file).read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            text = ""  # an image without a label file is background
        return Labels(im_file, image_id, (height, width), *read_label(text, classes))
    except UnicodeDecodeError:
        return f"{label_file}: not UTF-8 text"
    except ValueError as error:
        return f"{label_file}: {error}"
    except ImportError:  # Ultralytics' Image.open looks for a HEIC plugin where it knows no format
        return f"{im_file}: not an image of a known format"
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        return f"{im_file}: not a readable image ({error})"


def hash_of(files: list[str]) -> str:
    """A digest of the files' names."""
    return hashlib.sha256("\n".join(files).encode(errors="surrogateescape")).hexdigest()


def _ends_whole(jpeg: str) -> bool:
    """Whether the file ends with JPEG's end-of-image marker."""
    with open(jpeg, "rb") as file:
        file.seek(-2, os.SEEK_END)
        return file.read() == b"\xff\xd9"


def subset(images: int, fraction: float, limit: int | None) -> Sequence[int]:
    """Indices of a share of the images, or at most so many, evenly drawn from all."""
    wanted = min(max(1, round(images * fraction)), limit or images)
    return range(images) if wanted == images else [i * images // wanted for i in range(wanted)]


def scan(
    files: list[str],
    names: dict[int, str],
    config: EvalConfig,
    accelerator: Accelerator,
    chosen: Sequence[int] | None = None,
) -> tuple[list[Labels], list[str]]:
    """Read all labels of a split, or of the chosen images in it, each rank a share of them (collective).

    Returns the usable images in the order of `files`, and one sentence for each that is left out. Nothing is written
    to the data folder.
    """
    chosen = range(len(files)) if chosen is None else chosen
    classes = sys.maxsize if config.single_cls else len(names)
    share = chosen[accelerator.process_index :: accelerator.num_processes]
    if len(set(gather_object([hash_of(files)]))) > 1:
        raise InputError(f"The machines do not see the same files: here {len(files)} images, first {files[0]}.")
    label_files, ids = img2label_paths(files), image_ids(files)
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        mine = pool.map(lambda i: (i, _read_image(files[i], label_files[i], ids[i], classes)), share)
    found = [
        entry for _, entry in sorted((pair for part in gather_object([mine]) for pair in part), key=lambda p: p[0])
    ]
    usable = [_chosen(entry, config) for entry in found if isinstance(entry, Labels)]
    return usable, [entry for entry in found if isinstance(entry, str)]


def _chosen(entry: Labels, config: EvalConfig) -> Labels:
    """The labels of the chosen classes, as one class where that is asked for."""
    if config.classes is not None:
        keep = np.isin(entry.cls, config.classes)
        segments = [segment for segment, kept in zip(entry.segments, keep, strict=False) if kept]
        entry = replace(entry, cls=entry.cls[keep], boxes=entry.boxes[keep], segments=segments)
    return replace(entry, cls=np.zeros_like(entry.cls)) if config.single_cls else entry


def check_usable(
    name: str, train: list[Labels] | None, val: list[Labels], faults: list[str], strict: bool = False
) -> None:
    """Raise InputError where nothing is left to train on or to validate on, or, if strict, where a file is faulty."""
    if strict and faults:
        raise InputError("--strict, and these files are faulty:\n" + "\n".join(faults))
    reason = f" First of {len(faults)} faults: {faults[0]}" if faults else ""
    if train is not None and not any(len(entry.cls) for entry in train):
        raise InputError(f"{name}: no train image has a usable label.{reason}")
    if not val:
        raise InputError(f"{name}: no image to validate on can be used.{reason}")


def image_ids(files: list[str]) -> list[int]:
    """COCO image ids: the integer file stems where all stems of the split are distinct integers, else the positions.

    A stem that a float64 cannot hold exactly is no integer here: detections travel as rows of float64.
    """
    stems = [Path(file).stem for file in files]
    if all(stem.isdecimal() and stem.isascii() for stem in stems):
        ids = [int(stem) for stem in stems]
        if len(set(ids)) == len(ids) and max(ids) < 2**53:
            return ids
    return list(range(len(files)))
