"""COCO's files: the truth of a split from its labels or an annotation file, detections from a results file."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from ultralytics.utils.ops import xywh2ltwh

from train.config.errors import InputError
from train.config.options import EvalConfig
from train.config.plain import checked_name
from train.data.formats import Labels, check_regular
from train.data.scan import Counted, scan, subset, uncounted

# How reading a JSON file fails that holds something else
UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError)


def ground_truth(
    labels: list[Labels],
    names: dict[int, str],
    config: EvalConfig | None = None,
    annotations: dict[str, Any] | None = None,
) -> tuple[list[Labels], dict[str, Any]]:
    """The truth of a split as a COCO annotation dict, whose categories stand in the order of the class indices.

    It is made from the labels (category ids are class indices, areas are box areas), or taken from `--annotations`;
    the labels then come back with that file's image ids.

    Args:
        labels: the split's labels, boxes normalised.
        names: class names by class index.
        config: names the annotation file, and the classes that count.
        annotations: what that file says, see `read_annotations`.

    Raises:
        InputError: the annotation file lacks an image or a class.
    """
    assert (annotations is not None) == bool(config and config.annotations)
    if config is not None and annotations is not None:
        return _from_annotations(labels, names, config, annotations)
    images: list[dict] = []
    marks: list[dict] = []
    for entry in labels:
        height, width = entry.shape
        images.append({"id": entry.image_id, "file_name": entry.im_file, "width": width, "height": height})
        for category, box in zip(entry.cls, xywh2ltwh(entry.boxes * (width, height, width, height)), strict=True):
            marks.append(
                {
                    "id": len(marks) + 1,  # pycocotools takes annotation 0 for none
                    "image_id": entry.image_id,
                    "category_id": int(category),
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3]),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": index, "name": name} for index, name in names.items()]
    return labels, {"images": images, "annotations": marks, "categories": categories}


def _json(file: str) -> Any:
    check_regular(file)
    return json.loads(Path(file).read_text(encoding="utf-8-sig"))


def _reason(error: BaseException, where: str) -> str:
    """What is wrong with a JSON file, in words: Python's own would be of its types."""
    if isinstance(error, KeyError):
        return f"{where} has no {error}"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON: {error}"
    return f"{where} is not what COCO has there"


def _span(ids: list[int]) -> str:
    return f"{min(ids)} to {max(ids)}" if ids else "none"


def read_annotations(file: str) -> dict[str, Any]:
    """A COCO annotation file with boxes, as far as this project uses it.

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
        content = _json(file)
        truth = {
            "images": [
                {"id": int(i["id"]), "file_name": str(i["file_name"]), "width": i["width"], "height": i["height"]}
                for i in each("images")
            ],
            "annotations": [
                {
                    "id": number,  # pycocotools takes annotation 0 for none
                    "image_id": int(a["image_id"]),
                    "category_id": int(a["category_id"]),
                    "bbox": [float(x) for x in a["bbox"]],
                    "area": float(a.get("area", a["bbox"][2] * a["bbox"][3])),
                    "iscrowd": int(a.get("iscrowd", 0)),
                }
                for number, a in enumerate(each("annotations"), 1)
            ],
            "categories": [{"id": int(c["id"]), "name": str(c["name"])} for c in each("categories")],
        }
    except UNREADABLE as error:
        reason = _reason(error, place)
        raise InputError(f"--annotations {file} is not a COCO annotation file that can be read: {reason}") from None
    names: dict[str, int] = {}
    for category in truth["categories"]:
        name = checked_name(category["name"], f"--annotations {file}: category {category['id']}")
        if name in names:
            raise InputError(
                f"--annotations {file}: the categories {names[name]} and {category['id']} are both {name!r}."
            )
        names[name] = category["id"]
    known = {kind: {entry["id"] for entry in truth[kind]} for kind in ("images", "categories")}
    for kind, ids in known.items():
        if len(ids) < len(truth[kind]):
            raise InputError(f"--annotations {file} has an id twice among its {kind}.")
    for a in truth["annotations"]:
        if len(a["bbox"]) != 4 or not np.isfinite([*a["bbox"], a["area"]]).all():
            raise InputError(f"--annotations {file}: annotation {a['id']} has the bbox {a['bbox']}, not four numbers.")
        if a["image_id"] not in known["images"] or a["category_id"] not in known["categories"]:
            raise InputError(
                f"--annotations {file}: annotation {a['id']} is of image {a['image_id']} and category "
                f"{a['category_id']}, which the file does not list."
            )
    return truth


def _from_annotations(
    labels: list[Labels], names: dict[int, str], config: EvalConfig, truth: dict[str, Any]
) -> tuple[list[Labels], dict[str, Any]]:
    """The part of the annotation file that is about these images and classes; images are matched by file name."""
    file = config.annotations
    by_name = defaultdict(list)
    for image in truth["images"]:
        by_name[Path(image["file_name"]).name].append(image)
    found: list[dict] = []
    missing: list[str] = []
    for entry in labels:
        same = by_name.get(Path(entry.im_file).name, [])
        if len(same) > 1:  # then the folders must tell them apart
            same = [image for image in same if Path(entry.im_file).as_posix().endswith(f"/{image['file_name']}")]
        found += same[:1]
        missing += [] if len(same) == 1 else [entry.im_file]
    if missing:
        raise InputError(f"--annotations {file} lacks {len(missing)} of {len(labels)} images, first {missing[0]}.")
    if len({image["id"] for image in found}) < len(found):
        raise InputError(f"--annotations {file}: two images of the split are one in the file by name.")
    ids = {category["name"]: category["id"] for category in truth["categories"]}
    unknown = [] if config.single_cls else [name for name in names.values() if name not in ids]
    if unknown:
        raise InputError(f"--annotations {file} has no category named {', '.join(unknown)}; it has {', '.join(ids)}.")
    labels = [replace(entry, image_id=image["id"]) for entry, image in zip(labels, found, strict=True)]
    images = [image | {"file_name": entry.im_file} for entry, image in zip(labels, found, strict=True)]
    here = {image["id"] for image in images}
    category_ids = {index: 0 if config.single_cls else ids[name] for index, name in names.items()}
    chosen = set(ids.values()) if config.single_cls else set(category_ids.values())
    if config.classes is not None:
        chosen = {ids[name] for name in ids if name in {names[index] for index in config.classes if index in names}}
    annotations = [a for a in truth["annotations"] if a["image_id"] in here and a["category_id"] in chosen]
    if config.single_cls:
        annotations = [a | {"category_id": 0} for a in annotations]
    categories = [{"id": category_ids[index], "name": name} for index, name in names.items()]
    return labels, {"images": images, "annotations": annotations, "categories": categories}


def read_predictions(file: str) -> np.ndarray:
    """The rows of a COCO results file, by image id, in the file's order within an image.

    Raises:
        InputError: it is not a results file.
    """
    try:
        content = _json(file)
        if not isinstance(content, list):
            raise KeyError("image_id")
        rows = np.array([[d["image_id"], *d["bbox"], d["score"], d["category_id"]] for d in content], dtype=np.float64)
        rows = rows.reshape(len(content), 7)
    except UNREADABLE as error:
        raise InputError(
            f"--predictions {file} is not a COCO results file, a list of image_id, category_id, bbox, score: "
            f"{_reason(error, 'an entry')}"
        ) from None
    if not np.isfinite(rows).all():
        raise InputError(f"--predictions {file} holds a value that is not a finite number.")
    return rows[np.argsort(rows[:, 0], kind="stable")]


def check_predictions(file: str, rows: np.ndarray, truth: dict[str, Any]) -> None:
    """Raise InputError where detections name images or categories that the truth does not have."""
    for column, what, entries in ((0, "image", truth["images"]), (6, "category", truth["categories"])):
        known = [entry["id"] for entry in entries]
        unknown = np.setdiff1d(rows[:, column], known)
        if len(unknown):
            raise InputError(
                f"--predictions {file} names {what} ids that the data set does not have, {len(unknown)} of them: "
                f"{', '.join(f'{id_:g}' for id_ in unknown[:5])}; known are {_span(known)}."
            )


def read_truth(
    files: list[str],
    names: dict[int, str],
    config: EvalConfig,
    accelerator: Accelerator,
    annotations: dict[str, Any] | None = None,
    counted: Counted = uncounted,
) -> tuple[list[Labels], dict[str, Any], list[str]]:
    """Labels and COCO truth of the images that are validated on, and what is wrong with the others (collective).

    Args:
        files: images of the whole split.
        names: class names by class index.
        config: the part of the split, and the classes that count.
        accelerator: of the run.
        annotations: what `read_annotations` has read, where `--annotations` names a file.
        counted: see `scan`.
    """
    chosen = subset(len(files), config.val_fraction, config.val_limit)
    labels, faults = scan(files, names, config, accelerator, chosen, counted)
    return *ground_truth(labels, names, config, annotations), faults
