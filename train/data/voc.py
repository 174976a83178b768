"""Pascal VOC: a folder of images, one of an XML file for each, Annotations, and lists of images, ImageSets/Main."""

import math
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from train.config.errors import InputError
from train.config.plain import checked_name
from train.data.formats import FAR, LARGEST, check_regular
from train.data.tables import Said

FLAG = re.compile(r"\s+(-1|0|1)$")
# Of a split the first that is there
LISTS = {"train": ("train", "trainval"), "val": ("val", "test"), "test": ("test",)}


def voc_splits(folder: Path) -> dict[str, dict[str, str]]:
    """The splits of a folder in VOC's form; nothing where it has another."""
    if not (folder / "Annotations").is_dir():
        return {}
    splits = {}
    for split, names in LISTS.items():
        there = [name for name in names if (folder / "ImageSets" / "Main" / f"{name}.txt").is_file()]
        if there:
            splits[split] = {"images": "JPEGImages", "annotations": f"ImageSets/Main/{there[0]}.txt"}
    return splits


def xml_files(listed: str) -> list[str]:
    """The XML files of the images in a list, sorted, each once.

    Args:
        listed: ImageSets/Main/NAME.txt, of a name in each line, without its ending: its path below the folder, and
            behind it, in VOC's lists of a class, whether that is there: 1, 0 or -1.

    Raises:
        InputError: it cannot be read.
    """
    try:
        lines = Path(listed).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{listed} is not UTF-8 text; it must list the names of images.") from None
    except OSError as error:
        raise InputError(f"{listed} cannot be read: {error.strerror}.") from None
    folder = annotations_of(listed)
    names = {line.strip() for line in lines if line.strip()}
    flagged = {name for name in names if FLAG.search(name) and not os.path.exists(f"{folder}/{name}.xml")}
    return [f"{folder}/{name}.xml" for name in sorted(names - flagged | {FLAG.sub("", name) for name in flagged})]


def annotations_of(listed: str) -> str:
    """The folder of the XML files of a list."""
    return os.path.join(Path(listed).parents[2], "Annotations")


def said_by_voc(listed: str, images: str) -> Said:
    """What the XML files of a list's images say to be trained on: all but difficult objects, as Ultralytics has it.

    Boxes are taken as they are: left, top, right, bottom in pixels from 0.

    Args:
        listed: see `xml_files`.
        images: their folder.
    """
    xmls, begin = xml_files(listed), len(annotations_of(listed)) + 1
    stems = [file[begin : -len(".xml")] for file in xmls]
    endings: dict[str, str] = {}
    for folder in {os.path.dirname(stem) for stem in stems}:
        if os.path.isdir(place := os.path.join(images, folder)):
            there = (os.path.join(folder, name) for name in sorted(os.listdir(place), reverse=True))
            endings |= dict(map(os.path.splitext, there))  # type: ignore[arg-type]
    names: dict[str, int] = {}
    files, shapes, faults = [], [], {}
    image: list[int] = []
    category: list[int] = []
    boxes: list[list[float]] = []
    numbers: list[int] = []
    places = [(file, "") for file in xmls]
    for row, (file, stem) in enumerate(zip(xmls, stems, strict=True)):
        files.append(stem + endings.get(stem, ".jpg"))
        shape = (0, 0)
        try:
            shape, found = _read(file)
        except ValueError as error:
            faults[row], found = f"{file}: {error}", []
        shapes.append(shape)
        for name, box, number in found:
            numbers.append(number)
            image.append(row)
            category.append(names.setdefault(checked_name(name, f"{file}: an object's name"), len(names)))
            boxes.append(box)
    return Said(
        files=files,
        shapes=np.array(shapes, np.int32).reshape(-1, 2),
        image=np.array(image, np.int64),
        category=np.array(category, np.int64),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        points=[],
        names={number: name for name, number in names.items()},
        numbered=False,
        faults=faults,
        numbers=np.array(numbers, np.int64),
        places=places,
    )


def is_difficult(entry: ElementTree.Element) -> bool:
    """Whether an object is one that is not trained on."""
    return (entry.findtext("difficult") or "0").strip() == "1"


def _read(file: str) -> tuple[tuple[int, int], list[tuple[str, list[float], int]]]:
    """Height and width that an XML file gives, 0 where it gives none, and by object its name, its box (left, top,
    width, height in pixels) and its number.

    Raises:
        ValueError: what is wrong, with the object's number.
    """
    try:
        if check_regular(file) > LARGEST:
            raise ValueError(f"larger than {LARGEST // 1_000_000} MB")
        root = ElementTree.parse(file).getroot()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from None
    except (ElementTree.ParseError, LookupError) as error:  # LookupError: an encoding that nobody knows
        raise ValueError(f"no XML: {error}") from None
    shape = tuple(int(_number(root.findtext(f"size/{side}") or "0", side)) for side in ("height", "width"))
    found = []
    for number, entry in enumerate(root.iter("object"), 1):
        if is_difficult(entry):
            continue
        name = (entry.findtext("name") or "").strip()
        sides = [entry.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        if not name or None in sides:
            raise ValueError(f"object {number} has no {'name' if not name else 'whole bndbox'}")
        left, top, right, bottom = (_number(side or "", f"object {number}: bndbox") for side in sides)
        if right < left or bottom < top:
            raise ValueError(f"object {number} ends before it begins: {left:g}, {top:g} to {right:g}, {bottom:g}")
        found.append((name, [left, top, right - left, bottom - top], number))
    return (shape[0], shape[1]), found


def _number(text: str, what: str) -> float:
    """A number of pixels; ValueError where it is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < FAR:
        raise ValueError(f"{what} is {text[:40]!r}, not a number of pixels")
    return value
