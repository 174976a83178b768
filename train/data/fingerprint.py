"""What a data set was when it was read, so that a run is not gone on with on other images or labels."""

import os
import zlib
from typing import Any

import numpy as np
import torch

from train.config.errors import InputError
from train.config.words import printable
from train.data.formats import Labels


def fingerprint(
    train: list[Labels],
    val: list[Labels],
    truth: dict[str, Any] | None = None,
    before: dict[str, torch.Tensor] | None = None,
    resume: str = "",
) -> dict[str, torch.Tensor]:
    """By split a number for each image, in order (int64): of its name in the data set, its size and its labels.

    Args:
        train, val: labels of the images.
        truth: COCO ground truth of `val`, where that is a file's own.
        before: what this was when a run began that is gone on with; empty of a run that has not kept it.
        resume: that run.

    Raises:
        InputError: they differ; it says what has changed.
    """
    files = {"train": [entry.im_file for entry in train], "val": [entry.im_file for entry in val]}
    now = {"train": _numbers(train), "val": _numbers(val)}
    if truth is not None:
        files["--annotations"] = [image["file_name"] for image in truth["images"]]
        now["--annotations"] = _numbers_of(truth)
    for split, numbers in (before or {}).items():
        if split not in now or torch.equal(numbers, now[split]):
            continue
        images, same = len(files[split]), min(len(numbers), len(now[split]))
        differing = (numbers[:same] != now[split][:same]).nonzero().flatten().tolist()
        what = f"{images} images and had {len(numbers)}"
        if images == len(numbers):
            what = f"{len(differing)} images of another name, size or label than"
        first = files[split][min([*differing, same, images - 1])]
        raise InputError(
            f"--resume {resume}: the data set has changed. {split} has {what} when the run began; first "
            f"{printable(first)}. Put it back as it was, or start a new run from the weights: "
            f"--model {resume}/weights/last.pt"
        )
    return now


def _numbers(labels: list[Labels]) -> torch.Tensor:
    folders = {folder: os.path.abspath(folder) for folder in {os.path.dirname(entry.im_file) for entry in labels}}
    base = os.path.commonpath(folders.values()) if folders else ""
    names = {folder: os.path.relpath(place, base) for folder, place in folders.items()}
    found = np.empty(len(labels), dtype=np.int64)
    for i, entry in enumerate(labels):
        folder, name = os.path.split(entry.im_file)
        number = zlib.crc32(f"{names[folder]}/{name} {entry.shape} {entry.size}".encode(errors="surrogateescape"))
        for array in (entry.cls, entry.boxes, *entry.segments):
            number = zlib.crc32(np.ascontiguousarray(array).data, number)
        found[i] = number
    return torch.from_numpy(found)


def _numbers_of(truth: dict[str, Any]) -> torch.Tensor:
    """The same of COCO's annotations."""
    found = {image["id"]: zlib.crc32(f"{image['height']} {image['width']}".encode()) for image in truth["images"]}
    for a in truth["annotations"]:
        told = f"{a['category_id']} {a['bbox']} {a['area']} {a['iscrowd']}"
        found[a["image_id"]] = zlib.crc32(told.encode(), found[a["image_id"]])
    return torch.tensor([found[image["id"]] for image in truth["images"]])
