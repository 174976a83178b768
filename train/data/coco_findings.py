"""What is wrong with a file in COCO's form, annotation by annotation, as its reader sees it, which needs no ids of
annotations, takes ids that are text, and lets a box leave its image a little.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from train.data.coco_json import UNREADABLE, read_json
from train.data.findings import OVER, Finding
from train.data.formats import FAR
from train.data.runlengths import that_are_none
from train.data.tables import OUTSIDE, is_outside, over_edge
from train.processes.allocator import no_collection

try:
    import hotcoco
except ImportError:  # then boxes that lie on each other are found where they are equal
    hotcoco = None  # type: ignore[assignment]

Entry = tuple[str, dict[str, Any]]  # an annotation, and how it is called
Images = dict[Any, tuple[str, int, int]]  # by id name, height and width; 0 where the file does not say


def of_annotations(split: str, file: str) -> list[Finding]:
    """What is wrong with the annotations of a file in COCO's form, each by its id, or by its number where it has none
    of its own; nothing of a file that holds something else: its reader says why.
    """
    with no_collection():
        try:
            content = read_json(file)
            annotations = list(content["annotations"])
            images = {_key(one["id"]): (str(one.get("file_name")), *_size(one)) for one in content["images"]}
            categories = {_key(one["id"]) for one in content["categories"]}
        except UNREADABLE:
            return []
        entries: list[Entry] = []
        said = [*_named(annotations, entries)]
        placed: list[Entry] = []
        for place, one in entries:
            lacking = "image" if _key(one.get("image_id")) not in images else "category"
            if lacking == "image" or _key(one.get("category_id")) not in categories:
                said.append(("annotation that cannot be placed", place, f"the file does not list its {lacking}"))
            else:
                placed.append((place, one))
        said += chain(_of_boxes(placed, images), _of_masks(placed, images), _of_keypoints(placed))
    return [Finding(kind, split, file, place, what) for kind, place, what in said]


def lying_on_another(image: np.ndarray, cls: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Rows of boxes that another of their image and class overlaps by more than 0.95, ascending.

    Args:
        image, cls: of each, any whole numbers.
        boxes: (n, 4) left, top, width, height in pixels.
    """
    if not len(image):
        return np.zeros(0, np.int64)
    if hotcoco is None:
        rows = np.concatenate((np.stack((image, cls), 1), boxes), 1)
        _, which, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
        return np.flatnonzero(counts[which.ravel()] > 1)
    coco = hotcoco.COCO.from_arrays(
        [{"id": i, "width": 1, "height": 1} for i in np.unique(image).tolist()],
        [{"id": k, "name": str(k)} for k in np.unique(cls).tolist()],
        image, cls.astype(np.int64), boxes, ids=np.arange(len(image)),
    )  # fmt: skip
    said = [one for one in coco.healthcheck()["warnings"] if one["code"] == "near_duplicate"]
    return np.array(sorted(said[0]["affected_ids"]) if said else [], np.int64)


def _key(value: Any) -> Any:
    """An id as the reader takes it: text of a number is that number."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return str(value)


def _named(annotations: list[Any], entries: list[Entry]) -> Iterator[tuple[str, str, str]]:
    """Add annotations under what each is called; kind, place and words of what is wrong with that."""
    ids: dict[str, int] = {}
    lacking = 0
    for number, one in enumerate(annotations, 1):
        place = f"entry {number} of `annotations`"
        if not isinstance(one, dict):
            yield "labels that cannot be read", place, "it is not what COCO has there"
            continue
        id_ = str(one.get("id"))
        lacking += one.get("id") is None
        if one.get("id") is not None and ids.setdefault(id_, number) == number:
            place = f"annotation {id_}"
        elif id_ in ids:
            yield "id that is there twice", place, f"it has the id {id_}, as entry {ids[id_]} has"
        entries.append((place, one))
    if lacking:
        what = f"{lacking} of its {len(annotations)} annotations have no id; other tools ask for it, this one does not"
        yield "annotations without ids", "", what


def _of_boxes(entries: list[Entry], images: Images) -> Iterator[tuple[str, str, str]]:
    """Kind, place and words of what is wrong with the boxes of annotations; crowds are not trained on."""
    places: list[str] = []
    keys: list[tuple[Any, Any]] = []
    boxes: list[list[float]] = []
    for place, one in entries:
        box = _numbers(one.get("bbox"))
        if len(box) != 4:
            yield "labels that cannot be read", place, f"its bbox is {str(one.get('bbox'))[:80]}, not four numbers"
        elif _key(one.get("iscrowd", 0)):
            continue
        elif min(box[2:]) < 0:
            yield "negative size", place, "its box has a negative width or height; it is left out"
        elif not min(box[2:]):
            yield "box of no size", place, "its box has no width or no height; it is left out"
        else:
            places.append(place)
            keys.append((_key(one["image_id"]), _key(one["category_id"])))
            boxes.append(box)
    if not boxes:
        return
    table, sides = np.array(boxes), np.array([images[image][:0:-1] for image, _ in keys], np.float64)
    shares = np.concatenate((table[:, :2] + table[:, 2:] / 2, table[:, 2:]), 1) / np.tile(np.maximum(sides, 1), 2)
    outside, over = is_outside(shares), over_edge(shares)
    for i in np.flatnonzero(sides.all(1) & (outside | (over > OUTSIDE))).tolist():
        what = OVER.format(over[i])
        if outside[i]:
            name, height, width = images[keys[i][0]]
            what = f"its box {boxes[i]} leaves {name} of {width}x{height} px, which is left out"
        yield "coordinate outside the image" if outside[i] else "box over the edge", places[i], what
    image, cls = (np.unique([str(key) for key in some], return_inverse=True)[1] for some in zip(*keys, strict=True))
    for i in lying_on_another(image, cls, table).tolist():
        yield "duplicate box", places[i], "it lies on another of its class (IoU above 0.95)"


def _size(image: Any) -> tuple[int, int]:
    """Height and width that the file gives of an image; 0 where it gives none."""
    height, width = (_key(image.get(side)) for side in ("height", "width"))
    right = all(isinstance(side, int) and 0 < side < FAR for side in (height, width))
    return (height, width) if right else (0, 0)


def _numbers(value: Any) -> list[float]:
    """The numbers of pixels in a list; nothing where it is none, or something else is in it."""
    try:
        found = [float(number) for number in (value if isinstance(value, list) else ())]
    except (TypeError, ValueError, OverflowError):
        return []
    return found if all(abs(number) < FAR for number in found) else []


def _of_masks(entries: list[Entry], images: Images) -> Iterator[tuple[str, str, str]]:
    """Kind, place and words of masks that train/segment.py refuses, where the file is not of boxes alone."""
    if not any(one.get("segmentation") for _, one in entries if not _key(one.get("iscrowd", 0))):
        return
    what = "its segmentation is neither polygons, lists of 6 or more numbers, nor run lengths of its image"
    sizes = [images[_key(one["image_id"])][1:] for _, one in entries]
    for i in that_are_none([one.get("segmentation") for _, one in entries], sizes):
        yield "segmentation that is none", entries[i][0], f"{what}; train/segment.py does not take the file"


def _of_keypoints(entries: list[Entry]) -> Iterator[tuple[str, str, str]]:
    """Kind, place and words of keypoints that train/pose.py refuses, where the file has some."""
    counts = Counter(len(_numbers(one["keypoints"])) for _, one in entries if one.get("keypoints"))
    usual = next((count for count, _ in counts.most_common() if count and not count % 3), 3)
    for place, one in entries if counts else ():
        if len(_numbers(one.get("keypoints"))) != usual:
            what = f"its keypoints are not {usual} numbers, x, y and visibility of {usual // 3}"
            yield "keypoints that are none", place, f"{what}; train/pose.py does not take the file"
