"""A copy of a data set without what is wrong with it, in the same format. Nothing of the original is touched."""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from ultralytics.data.utils import exif_size

from train.config.errors import InputError
from train.data.coco_json import read_json
from train.data.findings import Finding
from train.data.formats import label_text, read_label
from train.data.index import Index
from train.data.listing import DataFiles, label_file, located
from train.data.looks import ENDINGS, FORMATS, Looks
from train.processes.files import draft_of

LEFT_OUT = ("image that cannot be read", "duplicate image", "image in two splits")
ALIKE = 0.95  # IoU above which of two boxes of one class the second goes
Row = tuple[float, ...]


def check_place(place: Path, data: DataFiles) -> None:
    """Raise InputError where a copy would lie over something, in the data set or around it."""
    here, root = place.absolute().resolve(), data.root.resolve()
    if os.path.lexists(place):
        raise InputError(f"--fix is {str(place)!r}, which is there already; name a folder that is not.")
    if root == here or root in here.parents or here in root.parents:
        raise InputError(f"--fix is {str(place)!r}, in the data set {root} or around it; name a folder beside it.")


def mend(
    data: DataFiles, indexes: dict[str, Index], looks: dict[str, Looks], found: list[Finding], place: Path
) -> Iterable[str]:
    """Write a cleaned copy; lines on what was left out and changed. It is there whole or not at all.

    Left out are images that cannot be read, copies within a split, and those that an earlier split has, too. Of what is
    left boxes end at the image, and no object is there twice, without a size or of no class.

    Args:
        data: the data set.
        indexes: of its splits.
        looks: of their images.
        found: what is wrong with it.
        place: where the copy goes; see `check_place`.

    Raises:
        InputError: there is no room for it, or its format is not written.
    """
    draft = draft_of(place.absolute())
    told = []
    try:
        draft.mkdir(parents=True)
        splits: dict[str, Any] = {}
        for split, index in indexes.items():
            gone = {one.file for one in found if one.split == split and one.kind in LEFT_OUT}
            rows = [row for row in range(len(index)) if index.file(row) not in gone]
            entries = data.splits[split]
            if not isinstance(entries, dict):
                number, changed = _write_texts(draft, split, data, index, looks[split], rows)
                splits[split] = f"images/{split}"
            elif entries["annotations"].endswith(".json"):
                number, changed, splits[split] = _write_coco(draft, split, data, index, rows, found)
            else:
                number, changed, splits[split] = _write_voc(draft, split, data, index, rows)
            told.append(f"{split}: {number} of {len(index)} images, {changed} label files changed")
        if not os.path.isdir(data.name):
            (draft / "data.yaml").write_text(_as_yaml(data, splits), encoding="utf-8")
        os.rename(draft, place)
    except OSError as error:
        raise InputError(
            f"The copy {place} cannot be written: {error.strerror or error}. --fix names another."
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return [*told, f"a cleaned copy is in {place}"]


def _as_yaml(data: DataFiles, splits: dict[str, Any]) -> str:
    content: dict[str, Any] = {"path": ".", **splits, "names": data.names}
    if data.keypoints:
        content |= {"kpt_shape": [*data.keypoints], "flip_idx": [*data.flip_idx], "kpt_oks_sigmas": [*data.sigmas]}
        content |= {"kpt_names": {k: [*data.keypoint_names] for k in data.names}}
    return yaml.safe_dump({key: value for key, value in content.items() if value}, sort_keys=False, allow_unicode=True)


# Label files ----------------------------------------------------------------------------------------------------------
def _write_texts(
    draft: Path, split: str, data: DataFiles, index: Index, looks: Looks, rows: list[int]
) -> tuple[int, int]:
    """Images and label files of a split; how many, and how many of the latter have changed."""
    changed, taken = 0, set()
    for row in rows:
        file, kind = index.file(row), FORMATS[looks.formats[row]]
        inside = file.rpartition("/images/")[2] if "/images/" in file else os.path.relpath(file, index.base)
        name, ending = os.path.splitext(inside.removeprefix(f"{split}/"))
        endings = ENDINGS.get(kind, ())
        if endings and ending[1:].lower() not in endings:
            ending = f".{endings[0]}"
        while f"{name}.txt" in taken:  # a.jpg beside a.png
            name += "_"
        taken.add(f"{name}.txt")
        target = draft / "images" / split / (name + ending)
        _copy(file, draft, target)
        if not os.path.exists(label_file(file)):
            continue
        text = _text(label_file(file))
        clean = mended_text(text, len(data.names), data.keypoints)
        changed += clean != text
        label = Path(label_file(str(target)))
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(clean, encoding="utf-8")
    return len(taken), changed


def _text(file: str) -> str:
    """A label file, in UTF-8 or as Windows saves it."""
    try:
        return label_text(file)
    except UnicodeDecodeError as error:
        kind = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1"
        return error.object.decode(kind, errors="replace")
    except ValueError:  # it cannot be read at all
        return ""


def mended_text(text: str, classes: int, keypoints: tuple[int, ...] = ()) -> str:
    """A label file without the lines that cannot be used, as it is where all can.

    Args:
        text: of the file.
        classes, keypoints: see `read_label`.
    """
    kept: dict[Row, str] = {}
    for line in text.splitlines():
        fields = line.split()
        if not fields:
            continue
        if not _is_label(line, classes, keypoints):
            line = _ending_at_the_image(fields, keypoints)
            if not line or not _is_label(line, classes, keypoints):
                continue
        row = tuple(map(float, line.split()))
        if (len(row) == 5 or keypoints) and not (row[3] and row[4]):
            continue
        kept.setdefault(row, line)
    if not keypoints and len({len(row) == 5 for row in kept}) == 2:
        kept = {row: line if len(row) > 5 else _as_polygon(row) for row, line in kept.items()}
    elif len(boxes := [row for row in kept if len(row) == 5]) == len(kept):
        gone = _lying_on_earlier(np.array([row[1:] for row in boxes]), [row[0] for row in boxes], centred=True)
        kept = {row: line for i, (row, line) in enumerate(kept.items()) if i not in gone}
    lines = [*kept.values()]
    return text if lines == text.splitlines() else "".join(f"{line}\n" for line in lines)


def _is_label(line: str, classes: int, keypoints: tuple[int, ...]) -> bool:
    try:
        read_label(line, classes, keypoints)
    except ValueError:
        return False
    return True


def _ending_at_the_image(fields: list[str], keypoints: tuple[int, ...]) -> str:
    """A box or a polygon as far as it lies on its image; nothing where it does not, or is no such line."""
    try:
        row = [*map(float, fields)]
    except ValueError:
        return ""
    if keypoints or not np.isfinite(row).all() or len(row) < 5:
        return ""
    if len(row) == 5:
        x, y, w, h = row[1:]
        (left, right), (top, bottom) = (np.clip((c - s / 2, c + s / 2), 0, 1) for c, s in ((x, w), (y, h)))
        if min(w, h) <= 0 or right <= left or bottom <= top:
            return ""
        numbers = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    else:
        numbers = np.clip(row[1:], 0, 1).tolist()
    return " ".join([fields[0], *(f"{number:.6g}" for number in numbers)])


def _as_polygon(row: Row) -> str:
    """A box as its corners, for a file of polygons."""
    x, y, w, h = row[1:]
    corners = [x - w / 2, y - h / 2, x + w / 2, y - h / 2, x + w / 2, y + h / 2, x - w / 2, y + h / 2]
    return " ".join([f"{row[0]:g}", *(f"{value:.6g}" for value in np.clip(corners, 0, 1))])


def _lying_on_earlier(boxes: np.ndarray, classes: list[Any], centred: bool = False) -> set[int]:
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


# Annotation files -----------------------------------------------------------------------------------------------------
def _write_coco(
    draft: Path, split: str, data: DataFiles, index: Index, rows: list[int], found: list[Finding]
) -> tuple[int, int, dict[str, str]]:
    """Images and annotation file of a split in COCO's form, with all that it says beside; how many images, how many
    files have changed, and where they are.
    """
    entries = _entries(data, split, {"images": f"images/{split}", "annotations": f"annotations/{split}.json"})
    source, folder = str(data.annotations(split)), located(data.root, data.splits[split]["images"])
    content = read_json(source)
    kept = {os.path.relpath(index.file(row), folder) for row in rows}
    for name in kept:
        _copy(str(folder / name), draft, draft / entries["images"] / name)
    content["images"] = [i for i in content["images"] if os.path.normpath(i["file_name"]) in kept]
    sizes = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
    categories = {c["id"] for c in content["categories"]}
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    seen: set[Any] = set()
    for one in content["annotations"]:
        if one["image_id"] in sizes and one["category_id"] in categories and one.get("id") not in seen:
            seen |= {one["id"]} if "id" in one else set()
            x, y, w, h = one["bbox"]
            width, height = sizes[one["image_id"]]
            left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
            if min(w, h) <= 0 or right <= left or bottom <= top:
                continue
            if (left, top, right, bottom) != (x, y, x + w, y + h):
                one["bbox"] = [left, top, right - left, bottom - top]
            by_image[one["image_id"]].append(one)
    annotations: list[dict[str, Any]] = []
    for some in by_image.values():
        plain = [one for one in some if not one.get("iscrowd")]
        gone = _lying_on_earlier(np.array([one["bbox"] for one in plain]), [one["category_id"] for one in plain])
        without = {id(plain[i]) for i in gone}
        annotations += [one for one in some if id(one) not in without]
    content["annotations"] = annotations
    target = draft / entries["annotations"]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return len(kept), int(any(one.file == source for one in found)), entries


def _write_voc(
    draft: Path, split: str, data: DataFiles, index: Index, rows: list[int]
) -> tuple[int, int, dict[str, str]]:
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
        _copy(str(file), draft, draft / entries["images"] / file.name)
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
    for i in _lying_on_earlier(np.array(boxes).reshape(-1, 4), names):
        root.remove(kept[i])
        changed = True
    return changed


def _entries(data: DataFiles, split: str, otherwise: dict[str, str]) -> dict[str, str]:
    """Where images and annotations of a split lie in the copy: as in the original, where that is below one folder."""
    given = data.splits[split]
    inside = all(not os.path.isabs(path) and ".." not in Path(path).parts for path in given.values())
    return dict(given) if inside else otherwise


def _copy(file: str, draft: Path, place: Path) -> None:
    """Copy an image to this place in the copy, and to no other, whatever a file calls it."""
    target = os.path.normpath(place)
    if not target.startswith(f"{draft}{os.sep}"):
        raise InputError(f"{file} lies outside the folder of its split; --fix copies what lies in it.")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    shutil.copyfile(file, target)
