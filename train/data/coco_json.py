"""COCO's annotation files: what one says, checked, and as a table of labels to train on."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from pydantic_core import from_json
from ultralytics.data.converter import merge_multi_segment

from train.config.errors import InputError
from train.config.objects import Carries
from train.config.plain import checked_name
from train.data.formats import FAR, check_regular
from train.data.runlengths import encoded, that_are_none
from train.data.tables import Said
from train.processes.allocator import no_collection

EXACT = 2**53  # ids below it are whole in a float64, which detections consist of
# How reading a JSON file fails that holds something else
UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError)

Found = TypeVar("Found")


class Odd(ValueError):
    """An entry that says what no annotation can."""


def read_json(file: str) -> Any:
    """The content of a JSON file; fails in one of the ways that are UNREADABLE."""
    check_regular(file)
    text = Path(file).read_text(encoding="utf-8-sig")
    with no_collection():
        try:
            return from_json(text)  # in half the time
        except ValueError:  # Python's takes half characters, and says where what is wrong
            return json.loads(text)


def json_fault(error: BaseException, where: str) -> str:
    """What is wrong with a JSON file, in words: Python's own would be of its types."""
    if isinstance(error, KeyError):
        return f"{where} has no {error}"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON: {error}"
    if isinstance(error, OverflowError):
        return f"{where}: {error}"
    if isinstance(error, Odd):
        return f"{where} {error}"
    return f"{where} is not what COCO has there"


@dataclass
class CocoFile:
    """What a COCO annotation file says, in the file's order."""

    ids: np.ndarray  # (n,) int64 image ids
    files: list[str]  # names of the images
    sizes: np.ndarray  # (n, 2) int64 height, width in pixels
    image: np.ndarray  # (m,) int64: place of each annotation's image
    category: np.ndarray  # (m,) int64 category id
    boxes: np.ndarray  # (m, 4) float64: left, top, width, height in pixels
    area: np.ndarray  # (m,) float64
    crowd: np.ndarray  # (m,) int64: 1 where it is a crowd
    beside: list[dict[str, Any]]  # of each annotation its `segmentation`, or its `keypoints` and their number; or empty
    categories: list[dict[str, Any]]


def read_coco(file: str, carries: Carries, source: str) -> CocoFile:
    """What a COCO annotation file says of images, annotations and categories, as far as this project uses it.

    Args:
        file: its name.
        carries: what is needed of the annotations beside their boxes.
        source: how messages name the file.

    Raises:
        InputError: it is not one.
    """
    try:
        content = read_json(file)
        images, annotations, categories = (content[kind] for kind in ("images", "annotations", "categories"))
    except UNREADABLE as error:
        raise InputError(_unreadable(source, error, "it")) from None
    ids, files, sizes = _of_each(images, "images", _images, source)
    image_id, category, boxes, area, crowd, beside = _of_each(
        annotations, "annotations", partial(_annotations, carries=carries), source
    )
    kinds = _of_each(categories, "categories", _categories, source)
    names: dict[str, int] = {}
    for one in kinds:
        name = checked_name(one["name"], f"{source}: category {one['id']}")
        if name in names:
            raise InputError(f"{source}: the categories {names[name]} and {one['id']} are both {name!r}.")
        names[name] = one["id"]
    known = np.array([one["id"] for one in kinds], np.int64)
    for kind, some in (("images", ids), ("categories", known)):
        if len(np.unique(some)) < len(some):
            raise InputError(f"{source} has an id twice among its {kind}.")
    unknown = ~np.isin(image_id, ids) | ~np.isin(category, known)
    if unknown.any():
        odd = int(np.flatnonzero(unknown)[0])
        raise InputError(
            f"{source}: annotation {odd + 1} is of image {image_id[odd]} and category {category[odd]}, which the file "
            "does not list."
        )
    by_id = np.argsort(ids)
    image = by_id[np.searchsorted(ids, image_id, sorter=by_id)]
    found = CocoFile(ids, files, sizes, image, category, boxes, area, crowd, beside, kinds)
    _check_beside(found, carries, source)
    return found


def _unreadable(source: str, error: BaseException, where: str) -> str:
    reason = json_fault(error, where)
    if isinstance(error, KeyError) and error.args[0] in ("segmentation", "keypoints"):
        reason += "; train/detect.py trains on boxes alone"
    return f"{source} is not a COCO annotation file that can be read: {reason}"


def _of_each(entries: Any, kind: str, read: Callable[[list[Any]], Found], source: str) -> Found:
    """What `read` makes of all entries of this kind; where it cannot, InputError says of which. Columns of all are read
    at once, which takes a third of the time.
    """
    try:
        return read(entries)
    except UNREADABLE as error:
        found = error
        for number, entry in enumerate(entries if isinstance(entries, list) else (), 1):
            try:
                read([entry])
            except UNREADABLE as error:
                raise InputError(_unreadable(source, error, f"entry {number} of `{kind}`")) from None
        raise InputError(_unreadable(source, found, f"`{kind}`")) from None


def _images(entries: list[Any]) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Ids, names, and heights and widths."""
    sides = (_whole([entry[side] for entry in entries], side, FAR) for side in ("height", "width"))
    ids = _whole([entry["id"] for entry in entries], "id")
    return ids, [str(entry["file_name"]) for entry in entries], np.stack([*sides], 1)


def _annotations(
    entries: list[Any], carries: Carries
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Image ids, category ids, boxes, areas, crowds, and what is beside."""
    image, category = (_whole([entry[key] for entry in entries], key) for key in ("image_id", "category_id"))
    given = [entry["bbox"] for entry in entries]
    boxes = np.array(given, np.float64)
    areas = [entry["area"] if "area" in entry else entry["bbox"][2] * entry["bbox"][3] for entry in entries]
    area = np.array(areas, np.float64)
    crowd = _whole([entry.get("iscrowd", 0) for entry in entries], "iscrowd")
    if entries and (boxes.shape != (len(entries), 4) or not np.isfinite(boxes).all()):
        raise Odd(f"has the bbox {given[0]}, not four numbers")
    if area.ndim != 1 or not np.isfinite(area).all():
        raise Odd(f"has the area {areas[0]}, not a number")
    return image, category, boxes.reshape(-1, 4), area, crowd, _beside(entries, carries)


def _categories(entries: list[Any]) -> list[dict[str, Any]]:
    ids = _whole([entry["id"] for entry in entries], "id").tolist()
    return [
        {"id": id_, "name": str(entry["name"])}
        | {key: entry[key] for key in ("supercategory", "keypoints") if entry.get(key)}
        for id_, entry in zip(ids, entries, strict=True)
    ]


def _whole(values: list[Any], key: str, beyond: int = EXACT) -> np.ndarray:
    """Whole numbers; OverflowError where one is too large, Odd where the only one is none."""
    try:
        numbers = np.array(values, np.int64)
        large = (numbers >= beyond) | (numbers <= -beyond)
    except OverflowError:
        large = np.ones(1, bool)
    except (ValueError, TypeError):
        raise Odd(f"has {str(values[0])[:60]!r} as `{key}`, not a whole number") from None
    if large.any():
        number = max((int(value) for value in values), key=abs)
        raise OverflowError(f"`{key}` is {str(number)[:40]}, and must be below {beyond}")
    if numbers.ndim != 1:
        raise Odd(f"has {str(values[0])[:60]!r} as `{key}`, not a whole number")
    return numbers


def _beside(entries: list[Any], carries: Carries) -> list[dict[str, Any]]:
    """What annotations have beside their boxes; nothing where it is not needed."""
    if carries == "polygons":
        return [{"segmentation": entry["segmentation"]} for entry in entries]
    if carries == "keypoints":
        found = [[float(value) for value in entry["keypoints"]] for entry in entries]
        seen = (sum(v > 0 for v in points[2::3]) for points in found)
        return [
            {"keypoints": points, "num_keypoints": int(entry.get("num_keypoints", number))}
            for entry, points, number in zip(entries, found, seen, strict=True)
        ]
    return []


def _check_beside(found: CocoFile, carries: Carries, source: str) -> None:
    """Raise InputError where a mask or keypoints are not what COCO has there."""
    if carries == "keypoints":
        numbers = {len(one["keypoints"]) for one in found.beside}
        if len(numbers) > 1 or any(number == 0 or number % 3 for number in numbers):
            raise InputError(
                f"{source}: its keypoints are lists of {', '.join(map(str, sorted(numbers)))} numbers; each must have "
                "x, y and visibility of equally many."
            )
        for number, one in enumerate(found.beside, 1):
            if odd := [value for value in one["keypoints"] if not abs(value) < FAR]:
                raise InputError(
                    f"{source}: annotation {number} has {odd[0]} in its keypoints, not a number of pixels."
                )
    if carries == "polygons":
        masks, sizes = [one["segmentation"] for one in found.beside], found.sizes[found.image].tolist()
        for place in that_are_none(masks, sizes):
            raise InputError(
                f"{source}: the segmentation of annotation {place + 1} is neither polygons, lists of 6 or more "
                "numbers, nor run lengths (size, counts) of its image."
            )


def said_by_coco(file: str, carries: Carries, source: str) -> Said:
    """What a COCO annotation file says to be trained on: all but crowds and, for keypoints, objects with none labelled.

    An object of several polygons is one polygon, joined as Ultralytics joins them, and a mask is its outlines.

    Args:
        file, carries, source: see `read_coco`.

    Raises:
        InputError: it is not a COCO annotation file, or it lists an image twice.
    """
    with no_collection():
        content = read_coco(file, carries, source)
        order = sorted(range(len(content.files)), key=content.files.__getitem__)
        files = [content.files[i] for i in order]
        if len(set(files)) < len(files):
            twice = next(a for a, b in pairwise(files) if a == b)
            raise InputError(f"{source} lists the image {twice} twice; give it one entry.")
        place = np.empty(len(files), np.int64)
        place[order] = np.arange(len(files))
        wanted = content.crowd == 0
        if carries == "keypoints":
            wanted &= np.array([one["num_keypoints"] for one in content.beside], bool)
        kept = np.flatnonzero(wanted)
        kept = kept[np.argsort(place[content.image[kept]], kind="stable")]
        named: list[list[Any]] = []
        points: list[np.ndarray] = []
        if carries == "keypoints":
            named = [category["keypoints"] for category in content.categories if "keypoints" in category]
            points = [np.array(content.beside[i]["keypoints"]).reshape(-1, 3) for i in kept]
        if carries == "polygons":
            points = _outlines(content, kept)
        return Said(
            files=files,
            shapes=content.sizes[order].astype(np.int32),
            image=place[content.image[kept]],
            category=content.category[kept],
            boxes=content.boxes[kept],
            points=points,
            names={category["id"]: category["name"] for category in _kinds(content)},
            keypoint_names=tuple(map(str, named[0])) if named else (),
        )


def _kinds(content: CocoFile) -> list[dict[str, Any]]:
    """The categories that objects may be of: Roboflow's exports have one above all others, which no object is of."""
    used = set(content.category.tolist())
    above = {c.get("supercategory") for c in content.categories}
    return [
        c for c in content.categories if c["id"] in used or c.get("supercategory") != "none" or c["name"] not in above
    ]


def _outlines(content: CocoFile, kept: np.ndarray) -> list[np.ndarray]:
    """One polygon (k, 2) in pixels around each of these objects."""
    masks, boxes = [content.beside[i]["segmentation"] for i in kept.tolist()], content.boxes[kept].tolist()
    plain = [mask[0] for mask in masks if isinstance(mask, list) and len(mask) == 1]
    points = np.fromiter(chain.from_iterable(plain), np.float64).reshape(-1, 2)  # together, which is faster
    parts = (points[a:b] for a, b in pairwise([0, *np.cumsum([len(one) // 2 for one in plain]).tolist()]))
    return [
        next(parts) if isinstance(mask, list) and len(mask) == 1 else _outline(mask, box, size)
        for mask, box, size in zip(masks, boxes, content.sizes[content.image[kept]].tolist(), strict=True)
    ]


def _outline(segmentation: Any, bbox: list[float], size: list[int]) -> np.ndarray:
    """One polygon (k, 2) in pixels around an object; of an empty mask its box, as Ultralytics' converter has it."""
    parts = segmentation
    if not isinstance(segmentation, list):
        mask = coco_mask.decode(encoded(segmentation, *size))
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        parts = [contour.ravel().tolist() for contour in contours if len(contour) > 2]
    if not parts:
        left, top, width, height = bbox
        right, bottom = left + width, top + height
        parts = [[left, top, right, top, right, bottom, left, bottom]]
    outline = np.concatenate(merge_multi_segment(parts)) if len(parts) > 1 else np.array(parts[0]).reshape(-1, 2)
    return outline.astype(np.float64)
