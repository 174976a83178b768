"""Annotation files of a copy of a data set without what is wrong with it, each in the form that it had."""

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from ultralytics.data.utils import exif_size

from train.config.errors import InputError
from train.data.coco_json import read_json
from train.data.findings import Finding
from train.data.index import Index
from train.data.listing import DataFiles, located
from train.data.tables import Table
from train.data.voc import is_difficult

ALIKE = 0.95  # IoU above which of two boxes of one class the second goes
ROWS = 1000  # images in a parquet file
WORDS = {"train": "train", "val": "validation", "test": "test"}  # Hugging Face's
Written = tuple[int, int, dict[str, str]]  # images, annotation files or images whose objects have changed, and where


def write_coco(
    draft: Path, split: str, data: DataFiles, index: Index, rows: list[int], found: list[Finding]
) -> Written:
    """Images and annotation file of a split in COCO's form, with all that it says beside; how many images, how many
    files have changed, and where they are.
    """
    entries = _entries(data, split, {"images": f"images/{split}", "annotations": f"annotations/{split}.json"})
    source, folder = str(data.annotations(split)), located(data.root, data.splits[split]["images"])
    content = read_json(source)
    kept = {os.path.relpath(index.file(row), folder) for row in rows}
    for name in kept:
        copy_image(str(folder / name), draft, draft / entries["images"] / name)
    content["images"] = [i for i in content["images"] if os.path.normpath(i["file_name"]) in kept]
    # Ids are whole numbers to the reader, "0" like 0, and so they are here.
    sizes = {int(i["id"]): (int(i["width"]), int(i["height"])) for i in content["images"]}
    categories = {int(c["id"]) for c in content["categories"]}
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    seen: set[Any] = set()
    for one in content["annotations"]:
        image = int(one["image_id"])
        if image in sizes and int(one["category_id"]) in categories and one.get("id") not in seen:
            seen |= {one["id"]} if "id" in one else set()
            x, y, w, h = one["bbox"]
            width, height = sizes[image]
            left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
            if min(w, h) <= 0 or right <= left or bottom <= top:
                continue
            if (left, top, right, bottom) != (x, y, x + w, y + h):
                one["bbox"] = [left, top, right - left, bottom - top]
            by_image[image].append(one)
    annotations: list[dict[str, Any]] = []
    for some in by_image.values():
        plain = [one for one in some if not one.get("iscrowd")]
        gone = lying_on_earlier(np.array([one["bbox"] for one in plain]), [int(one["category_id"]) for one in plain])
        without = {id(plain[i]) for i in gone}
        annotations += [one for one in some if id(one) not in without]
    content["annotations"] = annotations
    target = draft / entries["annotations"]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return len(kept), int(any(one.file == source for one in found)), entries


def write_voc(draft: Path, split: str, data: DataFiles, index: Index, rows: list[int]) -> Written:
    """Images, XML files and list of a split in VOC's form; how many images, how many files have changed, and where they
    are.
    """
    entries = _entries(data, split, {"images": "JPEGImages", "annotations": f"ImageSets/Main/{split}.txt"})
    listed = located(data.root, data.splits[split]["annotations"])
    changed, stems = 0, []
    for row in rows:
        file = Path(index.file(row))
        source = listed.parents[2] / "Annotations" / f"{file.stem}.xml"
        try:
            tree = ElementTree.parse(source)
            with Image.open(file) as image:
                width, height = exif_size(image)
            changed += _mend_xml(tree.getroot(), height, width)
        except (ElementTree.ParseError, FileNotFoundError, TypeError, ValueError):  # no XML, or not of a whole box
            continue
        stems.append(file.stem)
        copy_image(str(file), draft, draft / entries["images"] / file.name)
        (draft / "Annotations").mkdir(exist_ok=True)
        tree.write(draft / "Annotations" / source.name, encoding="utf-8")
    target = draft / entries["annotations"]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")
    return len(stems), changed, entries


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
    """Images, boxes and categories of a split in Hugging Face's form; what else its rows have is left out."""
    import polars as pl  # here, for it takes long, and other forms do not need it

    table = Table(*data.tables[split])
    kept = [row for row in rows if index.usable[row]]
    box = pl.Struct({"bbox": pl.List(pl.List(pl.Float64)), "category": pl.List(pl.Int64)})
    kind = {"image": pl.Struct({"bytes": pl.Binary, "path": pl.String}), "objects": box}
    names = {"feature": {"names": [*data.names.values()], "_type": "ClassLabel"}, "_type": "Sequence"}
    features = {"image": {"_type": "Image"}, "objects": {"category": names}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    files, changed = -(-len(kept) // ROWS), 0
    (draft / "data").mkdir(exist_ok=True)
    for number in range(files):
        images, objects = [], []
        for row in kept[number * ROWS : (number + 1) * ROWS]:
            first, end = index.first[row : row + 2].tolist()
            boxes = table.boxes(np.full(end - first, row), np.arange(end - first))
            gone = lying_on_earlier(boxes, index.cls[first:end].tolist())
            stay = [i for i in range(end - first) if i not in gone]
            changed += bool(gone)
            file = index.file(row)
            images.append({"bytes": Path(file).read_bytes(), "path": os.path.basename(file)})
            objects.append({"bbox": boxes[stay].tolist(), "category": index.cls[first:end][stay].tolist()})
        frame = pl.DataFrame({"image": images, "objects": objects}, schema=kind)
        place = draft / "data" / f"{WORDS[split]}-{number:05}-of-{files:05}.parquet"
        frame.write_parquet(place, metadata=about)
    return len(kept), changed, data.splits[split]


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
    """Copy an image to this place in the copy, and to no other, whatever a file calls it."""
    target = os.path.normpath(place)
    if not target.startswith(f"{draft}{os.sep}"):
        raise InputError(f"{file} lies outside the folder of its split; --fix copies what lies in it.")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    shutil.copyfile(file, target)
