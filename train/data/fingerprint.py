"""What a data set was when it was read, so that a run is not gone on with on other images or labels."""

import os
import zlib

import numpy as np
import torch

from train.config.errors import InputError
from train.config.words import printable
from train.data.formats import Labels


def fingerprint(
    train: list[Labels], val: list[Labels], before: dict[str, torch.Tensor] | None = None, resume: str = ""
) -> dict[str, torch.Tensor]:
    """By split a number for each image, in order (int64): of its name in the data set, its size and its labels.

    Args:
        train, val: labels of the images.
        before: what this was when a run began that is gone on with; empty of a run that has not kept it.
        resume: that run.

    Raises:
        InputError: they differ; it says what has changed.
    """
    labels = {"train": train, "val": val}
    now = {split: _numbers(entries) for split, entries in labels.items()}
    for split, numbers in (before or {}).items():
        if torch.equal(numbers, now[split]):
            continue
        images, same = labels[split], min(len(numbers), len(now[split]))
        differing = (numbers[:same] != now[split][:same]).nonzero().flatten().tolist()
        what = f"{len(images)} images and had {len(numbers)}"
        if len(images) == len(numbers):
            what = f"{len(differing)} images of another name, size or label than"
        first = images[min([*differing, same, len(images) - 1])].im_file
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
