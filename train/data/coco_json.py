"""COCO's annotation files: what one says, checked, and as a table of labels to train on."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from pydantic_core import from_json
from ultralytics.data.converter import merge_multi_segment

from train.config.errors import InputError
from train.config.objects import Carries
from train.config.plain import checked_name
from train.data.formats import FAR, check_regular
from train.data.runlengths import are_polygons, encoded, is_mask
from train.data.tables import Said
from train.processes.allocator import no_collection

EXACT = 2**53  # ids below it are whole in a float64, which detections consist of
# How reading a JSON file fails that holds something else
UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError)


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
    return f"{where} is not what COCO has there"


def read_coco(file: str, carries: Carries, source: str) -> dict[str, list[dict[str, Any]]]:
    """What a COCO annotation file says of images, annotations and categories, as far as this project uses it.

    Args:
        file: its name.
        carries: what is needed of the annotations beside their boxes; it is under `beside`.
        source: how messages name the file.

    Raises:
        InputError: it is not one.
    """
    place = "it"

    def each(kind: str) -> Iterator[dict[str, Any]]:
        nonlocal place
        for number, entry in enumerate(content[kind], 1):
            place = f"entry {number} of `{kind}`"
            yield entry
        place = "it"

    try:
        content = read_json(file)
        truth: dict[str, list[dict[str, Any]]] = {
            "images": [
                {
                    "id": _whole(i["id"], "id"),
                    "file_name": str(i["file_name"]),
                    "width": _whole(i["width"], "width", FAR),
                    "height": _whole(i["height"], "height", FAR),
                }
                for i in each("images")
            ],
            "annotations": [
                {
                    "id": number,
                    "image_id": _whole(a["image_id"], "image_id"),
                    "category_id": _whole(a["category_id"], "category_id"),
                    "bbox": [float(x) for x in a["bbox"]],
                    "area": float(a["area"] if "area" in a else a["bbox"][2] * a["bbox"][3]),
                    "iscrowd": _whole(a.get("iscrowd", 0), "iscrowd"),
                    "beside": _beside(a, carries),
                }
                for number, a in enumerate(each("annotations"), 1)
            ],
            "categories": [
                {"id": _whole(c["id"], "id"), "name": str(c["name"])}
                | {key: c[key] for key in ("supercategory", "keypoints") if c.get(key)}
                for c in each("categories")
            ],
        }
    except UNREADABLE as error:
        reason = json_fault(error, place)
        if isinstance(error, KeyError) and error.args[0] in ("segmentation", "keypoints"):
            reason += "; train/detect.py trains on boxes alone"
        raise InputError(f"{source} is not a COCO annotation file that can be read: {reason}") from None
    names: dict[str, int] = {}
    for category in truth["categories"]:
        name = checked_name(category["name"], f"{source}: category {category['id']}")
        if name in names:
            raise InputError(f"{source}: the categories {names[name]} and {category['id']} are both {name!r}.")
        names[name] = category["id"]
    known = {kind: {entry["id"] for entry in truth[kind]} for kind in ("images", "categories")}
    for kind, ids in known.items():
        if len(ids) < len(truth[kind]):
            raise InputError(f"{source} has an id twice among its {kind}.")
    for a in truth["annotations"]:
        if len(a["bbox"]) != 4 or not all(map(math.isfinite, (*a["bbox"], a["area"]))):
            raise InputError(f"{source}: annotation {a['id']} has the bbox {a['bbox']}, not four numbers.")
        if a["image_id"] not in known["images"] or a["category_id"] not in known["categories"]:
            raise InputError(
                f"{source}: annotation {a['id']} is of image {a['image_id']} and category "
                f"{a['category_id']}, which the file does not list."
            )
    _check_beside(truth, carries, source)
    return truth


def _whole(value: Any, key: str, beyond: int = EXACT) -> int:
    """A whole number; OverflowError where it is too large, ValueError or TypeError where it is none."""
    number = int(value)
    if abs(number) >= beyond:
        raise OverflowError(f"`{key}` is {str(number)[:40]}, and must be below {beyond}")
    return number


def _beside(annotation: dict[str, Any], carries: Carries) -> dict[str, Any] | None:
    """What an annotation has beside its box; None where it is not needed."""
    if carries == "polygons":
        return {"segmentation": annotation["segmentation"]}
    if carries == "keypoints":
        points = [float(value) for value in annotation["keypoints"]]
        seen = annotation.get("num_keypoints", sum(v > 0 for v in points[2::3]))
        return {"keypoints": points, "num_keypoints": int(seen)}
    return None


def _check_beside(truth: dict[str, list[dict[str, Any]]], carries: Carries, source: str) -> None:
    """Raise InputError where a mask or keypoints are not what COCO has there."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    numbers = {len(a["beside"]["keypoints"]) for a in truth["annotations"]} if carries == "keypoints" else set()
    if len(numbers) > 1 or any(number == 0 or number % 3 for number in numbers):
        raise InputError(
            f"{source}: its keypoints are lists of {', '.join(map(str, sorted(numbers)))} numbers; each must have x, y "
            "and visibility of equally many."
        )
    for a in truth["annotations"] if carries == "keypoints" else ():
        if odd := [value for value in a["beside"]["keypoints"] if not abs(value) < FAR]:
            raise InputError(f"{source}: annotation {a['id']} has {odd[0]} in its keypoints, not a number of pixels.")
    for a in truth["annotations"] if carries == "polygons" else ():
        mask, size = a["beside"]["segmentation"], sizes[a["image_id"]]
        if not are_polygons(mask) and not is_mask(mask, size):
            raise InputError(
                f"{source}: the segmentation of annotation {a['id']} is neither polygons, lists of 6 or more numbers, "
                "nor run lengths (size, counts) of its image."
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
        images = sorted(content["images"], key=lambda image: image["file_name"])
        files = [image["file_name"] for image in images]
        if len(set(files)) < len(files):
            twice = next(a for a, b in pairwise(files) if a == b)
            raise InputError(f"{source} lists the image {twice} twice; give it one entry.")
        place = {image["id"]: i for i, image in enumerate(images)}
        kept = [a for a in content["annotations"] if not a["iscrowd"] and min(a["bbox"][2:]) > 0]
        if carries == "keypoints":
            kept = [a for a in kept if a["beside"]["num_keypoints"]]
        kept.sort(key=lambda a: place[a["image_id"]])
        named: list[list[Any]] = []
        points: list[np.ndarray] = []
        if carries == "keypoints":
            named = [category["keypoints"] for category in content["categories"] if "keypoints" in category]
            points = [np.array(a["beside"]["keypoints"]).reshape(-1, 3) for a in kept]
        if carries == "polygons":
            sizes = {image["id"]: (image["height"], image["width"]) for image in images}
            points = [_outline(a["beside"]["segmentation"], a["bbox"], sizes[a["image_id"]]) for a in kept]
        return Said(
            files=files,
            shapes=np.array([(image["height"], image["width"]) for image in images], np.int32).reshape(-1, 2),
            image=np.array([place[a["image_id"]] for a in kept], np.int64),
            category=np.array([a["category_id"] for a in kept], np.int64),
            boxes=np.array([a["bbox"] for a in kept], np.float64).reshape(-1, 4),
            points=points,
            names={category["id"]: category["name"] for category in _kinds(content)},
            keypoint_names=tuple(map(str, named[0])) if named else (),
        )


def _kinds(content: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The categories that objects may be of: Roboflow's exports have one above all others, which no object is of."""
    used = {a["category_id"] for a in content["annotations"]}
    above = {c.get("supercategory") for c in content["categories"]}
    return [
        c
        for c in content["categories"]
        if c["id"] in used or c.get("supercategory") != "none" or c["name"] not in above
    ]


def _outline(segmentation: Any, bbox: list[float], size: tuple[int, int]) -> np.ndarray:
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
