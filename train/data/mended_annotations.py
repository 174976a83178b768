"""Annotation files of a copy of a data set without what is wrong with it, each in the form that it had."""

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import cv2
import numpy as np
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from ultralytics.data.utils import exif_size

from train.config.errors import InputError
from train.data.coco_json import read_json
from train.data.findings import Finding
from train.data.huggingface import CROWD, named_frames, one_by_one, parquet_files, read_object
from train.data.huggingface_names import class_names
from train.data.index import Index
from train.data.listing import DataFiles, located
from train.data.runlengths import are_polygons, encoded
from train.data.tables import OUTSIDE, Table
from train.data.voc import annotations_of, is_difficult

ALIKE = 0.95  # IoU above which of two boxes of one class the second goes
WORDS = {"train": "train", "val": "validation", "test": "test"}  # Hugging Face's


class Written(NamedTuple):
    """What has been written of a split."""

    images: int
    changed: int  # annotation files, or images whose objects have changed
    entries: Any  # where they are, as a data YAML says it
    other: int = 0  # images that are left out, for what is said of them is of another size


def write_coco(
    draft: Path, split: str, data: DataFiles, index: Index, rows: list[int], found: list[Finding]
) -> Written:
    """Images and annotation file of a split in COCO's form, with all that it says beside."""
    entries = _entries(data, split, {"images": f"images/{split}", "annotations": f"annotations/{split}.json"})
    source, folder = str(data.annotations(split)), located(data.root, data.splits[split]["images"])
    content = read_json(source)
    names = [os.path.relpath(folder / str(i["file_name"]), folder) for i in content["images"]]
    said = {n: (int(i["height"]), int(i["width"])) for n, i in zip(names, content["images"], strict=True)}
    kept, other = {}, 0
    for row in rows:
        name, shape = os.path.relpath(index.file(row), folder), _shape_of(index, row)
        if all(said[name]) and said[name] != shape:  # whose boxes they are, nobody knows
            other += 1
        else:
            kept[name] = shape
    for name in kept:
        copy_image(str(folder / name), draft, draft / entries["images"] / name)
    # Ids are whole numbers to the reader, "0" like 0, and so they are here.
    there = [(n, i) for n, i in zip(names, content["images"], strict=True) if n in kept]
    content["images"] = [i for _, i in there]
    shapes = {int(i["id"]): kept[n] for n, i in there}
    categories = {int(c["id"]) for c in content["categories"]}
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for one in content["annotations"]:
        image = int(one["image_id"])
        if image in shapes and int(one["category_id"]) in categories and _ends_at_the_image(one, *shapes[image]):
            by_image[image].append(one)
    annotations: list[dict[str, Any]] = []
    for some in by_image.values():
        plain = [one for one in some if not int(one.get("iscrowd", 0))]
        gone = lying_on_earlier(np.array([one["bbox"] for one in plain]), [int(one["category_id"]) for one in plain])
        without = {id(plain[i]) for i in gone}
        annotations += [one for one in some if id(one) not in without]
    content["annotations"] = annotations
    changed = _give_ids(annotations) or any(one.file == source for one in found)
    target = draft / entries["annotations"]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return Written(len(kept), int(changed), entries, other)


def _give_ids(annotations: list[dict[str, Any]]) -> bool:
    """Give new ids to annotations that have none, or an earlier one's: they are trained on like the others, but other
    programs drop them. Whether there were any.
    """
    highest = max((one["id"] for one in annotations if type(one.get("id")) is int), default=0)
    seen: set[str] = set()
    given = 0
    for one in annotations:
        if one.get("id") is None or str(one["id"]) in seen:
            given += 1
            one["id"] = highest + given
        seen.add(str(one["id"]))
    return bool(given)


def _shape_of(index: Index, row: int) -> tuple[int, int]:
    """Height and width of an image itself, as it is shown; 0 where it cannot be read."""
    if index.usable[row]:
        height, width = index.shapes[row].tolist()
        return height, width
    try:
        with Image.open(index.file(row)) as image:
            width, height = exif_size(image)
    except (OSError, ValueError, SyntaxError, ImportError, Image.DecompressionBombError):
        return 0, 0
    return height, width


def _ends_at_the_image(one: dict[str, Any], height: int, width: int) -> bool:
    """Have an object's box, its polygons and its area end at the image; whether anything of it is there."""
    x, y, w, h = (value if isinstance(value, int) else float(value) for value in one["bbox"])
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if min(w, h) <= 0 or right <= left or bottom <= top:
        return False
    if (left, top, right, bottom) == (x, y, x + w, y + h):
        return True
    one["bbox"] = [left, top, right - left, bottom - top]
    area = (right - left) * (bottom - top)
    if are_polygons(one.get("segmentation")):
        limits = np.array((width, height), np.float64)
        parts = [np.clip(np.array(part, np.float64).reshape(-1, 2), 0, limits) for part in one["segmentation"]]
        parts = [part for part in parts if cv2.contourArea(part.astype(np.float32)) > 0.001] or parts  # no line
        one["segmentation"] = [part.ravel().tolist() for part in parts]
        area = float(coco_mask.area(encoded(one["segmentation"], height, width)))
    elif one.get("area") is not None:
        area = min(float(one["area"]), area)
    if one.get("area") is not None:
        one["area"] = type(one["area"])(area)
    return True


def write_voc(draft: Path, split: str, data: DataFiles, index: Index, rows: list[int]) -> Written:
    """Images, XML files and list of a split in VOC's form."""
    entries = _entries(data, split, {"images": "JPEGImages", "annotations": f"ImageSets/Main/{split}.txt"})
    target, images = draft / entries["annotations"], located(data.root, data.splits[split]["images"])
    original = annotations_of(str(located(data.root, data.splits[split]["annotations"])))
    changed, stems, other = 0, [], 0
    for row in rows:
        name = os.path.relpath(index.file(row), images)
        stem = os.path.splitext(name)[0]
        try:
            tree = ElementTree.parse(f"{original}/{stem}.xml")
            height, width = _shape_of(index, row)
            resized = _mend_size(tree.getroot(), height, width)
            changed += _mend_xml(tree.getroot(), height, width) or resized
        except _Resized:
            other += 1
            continue
        except (ElementTree.ParseError, FileNotFoundError, TypeError, ValueError):  # no XML, or not of a whole box
            continue
        stems.append(stem)
        copy_image(index.file(row), draft, draft / entries["images"] / name)
        xml = place_in(draft, Path(annotations_of(str(target))) / f"{stem}.xml", index.file(row))
        tree.write(xml, encoding="utf-8")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")
    return Written(len(stems), changed, entries, other)


class _Resized(Exception):
    """Boxes are of another size than the image is."""


def _mend_size(root: ElementTree.Element, height: int, width: int) -> bool:
    """Have an XML file's size be the image's, where all boxes that are trained on lie in the image; whether it was not.

    Raises:
        _Resized: they do not: whose boxes they are, nobody knows.
    """
    places = [root.find(f"size/{side}") for side in ("height", "width")]
    said = [int(float(place.text or 0)) for place in places if place is not None]
    if len(said) < 2 or not all(said) or said == [height, width]:
        return False
    for one in root.iter("object"):
        right, bottom = (float(one.findtext(f"bndbox/{side}") or 0) for side in ("xmax", "ymax"))
        if not is_difficult(one) and (right > width * (1 + OUTSIDE) or bottom > height * (1 + OUTSIDE)):
            raise _Resized
    for place, value in zip(places, (height, width), strict=True):
        if place is not None:
            place.text = str(value)
    return True


def _mend_xml(root: ElementTree.Element, height: int, width: int) -> bool:
    """Take objects without a size, and such that are there twice, out of an XML file, and let boxes end at the image;
    whether any has changed."""
    objects, boxes, names, changed = root.findall("object"), [], [], False
    kept = []
    for one in objects:
        if is_difficult(one):  # it stays as it is, and takes no other's place: nobody trains on it
            continue
        places = [one.find(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        box = [float(place.text or "") for place in places if place is not None]
        clipped = [min(max(value, 0.0), most) for value, most in zip(box, (width, height) * 2, strict=True)]
        if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            root.remove(one)
            changed = True
            continue
        for place, value, was in zip(places, clipped, box, strict=True):
            if place is not None and value != was:
                place.text, changed = f"{value:g}", True
        kept.append(one)
        names.append((one.findtext("name") or "").strip())
        boxes.append([*clipped[:2], clipped[2] - clipped[0], clipped[3] - clipped[1]])
    for i in lying_on_earlier(np.array(boxes).reshape(-1, 4), names):
        root.remove(kept[i])
        changed = True
    return changed


def _entries(data: DataFiles, split: str, otherwise: dict[str, str]) -> dict[str, str]:
    """Where images and annotations of a split lie in the copy: as in the original, where that is below one folder."""
    given = data.splits[split]
    inside = all(not os.path.isabs(path) and ".." not in Path(path).parts for path in given.values())
    return dict(given) if inside else otherwise


def write_parquet(draft: Path, split: str, data: DataFiles, index: Index, rows: list[int]) -> Written:
    """Images and objects of a split in Hugging Face's form, with all other columns and all that objects have beside."""
    import polars as pl  # here, for it takes long, and other forms do not need it

    place = {os.path.basename(index.file(row)): row for row in rows}
    table = Table(*data.tables[split])
    images, pattern = (located(data.root, data.splits[split][part]) for part in ("images", "annotations"))
    (draft / "data").mkdir(exist_ok=True)
    number = changed = files = 0
    for names, frame, about in named_frames(parquet_files(str(pattern)), images):
        if table.numbered and not class_names(about):  # then a data YAML beside it has
            (draft / "data.yaml").write_text(
                yaml.safe_dump({"names": data.names}, allow_unicode=True), encoding="utf-8"
            )
        kept: list[int] = []
        objects = []
        for i, (name, there) in enumerate(zip(names, frame["objects"].to_list(), strict=True)):
            shape = _shape_of(index, place[name]) if name in place else (0, 0)
            try:
                clean = _mended_objects(there, shape, table.names if table.numbered else {})
            except ValueError:  # which box has which category, nobody knows
                continue
            if all(shape):
                kept.append(i)
                objects.append(clean)
                changed += clean != there
        if not kept:
            continue
        frame = frame[kept].with_columns(pl.Series("objects", objects, dtype=frame.schema["objects"]))
        kind = frame.schema["image"]
        if kind != pl.Binary and (kind != pl.Struct or not all((one or {}).get("bytes") for one in frame["image"])):
            inside = [Path(index.file(place[names[i]])).read_bytes() for i in kept]
            parts = [{"bytes": one, "path": names[i]} for i, one in zip(kept, inside, strict=True)]
            kind = pl.Struct({"bytes": pl.Binary, "path": pl.String})
            frame = frame.with_columns(pl.Series("image", parts, dtype=kind))
        target = draft / "data" / f"{WORDS[split]}-{files:05}.parquet"
        frame.write_parquet(target, metadata={"huggingface": about} if about else None)
        number, files = number + len(kept), files + 1
    return Written(number, changed, {"images": ".", "annotations": f"data/{WORDS[split]}-*.parquet"})


def _mended_objects(objects: Any, shape: tuple[int, int], names: dict[int, str]) -> Any:
    """An image's objects in the layout that they have: boxes end at the image; those that are none, or have no size, no
    category, or lie on an earlier one are not there. ValueError where their lists are of several lengths.

    Args:
        objects: see `one_by_one`.
        shape: height and width of the image.
        names: of the categories, where they have numbers.
    """
    there = [dict(one) for one in one_by_one(objects) if one]
    length = len(there)
    there = [one for one in there if _is_object(one, names) and _ends_at_the_image(one, *shape)]
    plain = [one for one in there if not any(one.get(key) for key in CROWD)]
    gone = lying_on_earlier(np.array([one["bbox"] for one in plain]), [one["category"] for one in plain])
    without = {id(plain[i]) for i in gone}
    there = [one for one in there if id(one) not in without]
    if not isinstance(objects, dict):
        return there if objects else objects
    lists = {key for key, values in objects.items() if isinstance(values, list) and len(values) == length}
    return objects | {key: [one[key] for one in there] for key in lists}


def _is_object(one: dict[str, Any], names: dict[int, str]) -> bool:
    try:
        read_object(one, 1, names)
    except ValueError:
        return False
    return True


def lying_on_earlier(boxes: np.ndarray, classes: list[Any], centred: bool = False) -> set[int]:
    """Places of boxes that lie on an earlier one of their class.

    Args:
        boxes: (n, 4) left or, if `centred`, middle, then top or middle, width, height.
        classes: of each.
        centred: whether they are given by their middle.
    """
    gone: set[int] = set()
    if len(boxes) < 2:
        return gone
    corners = boxes.astype(np.float64).copy()
    if centred:
        corners[:, :2] -= corners[:, 2:] / 2
    overlaps = coco_mask.iou(corners, corners, [0] * len(corners))
    for i, j in zip(*np.nonzero(np.tril(overlaps > ALIKE, -1)), strict=True):
        if classes[i] == classes[j] and int(j) not in gone:
            gone.add(int(i))
    return gone


def copy_image(file: str, draft: Path, place: Path) -> None:
    """Copy an image to this place in the copy."""
    shutil.copyfile(file, place_in(draft, place, file))


def place_in(draft: Path, place: Path, file: str) -> str:
    """A place in the copy, whose folder is there then; InputError where it is in no copy, whatever a file is called."""
    target = os.path.normpath(place)
    if not target.startswith(f"{os.path.normpath(draft)}{os.sep}"):
        raise InputError(f"{file} lies outside the folder of its split; --fix copies what lies in it.")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    return target
