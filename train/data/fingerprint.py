"""What a data set was when it was read, so that a run is not gone on with on other images or labels."""

from collections.abc import Callable

import numpy as np
import torch

from train.config.errors import InputError
from train.config.words import printable
from train.data.labels import Labels


def fingerprint(
    train: Labels,
    val: Labels,
    truth: tuple[np.ndarray, Callable[[int], str]] | None = None,
    before: dict[str, torch.Tensor] | None = None,
    resume: str = "",
) -> dict[str, torch.Tensor]:
    """By split a number for each image, in order (int32): of its name in the data set, its size and its labels.

    Args:
        train, val: labels of the images.
        truth: the same numbers of `val`'s truth, where that is a file's own, and the images' names by place.
        before: what this was when a run began that is gone on with; empty of a run that has not kept it.
        resume: that run.

    Raises:
        InputError: they differ; it says what has changed.
    """
    found: dict[str, tuple[np.ndarray, Callable[[int], str]]] = {
        "train images": (train.numbers, train.file),
        "val images": (val.numbers, val.file),
    }
    if truth is not None:
        found["--annotations"] = truth
    now = {split: torch.from_numpy(np.array(numbers, np.int32)) for split, (numbers, _) in found.items()}
    for split, numbers in (before or {}).items():
        if split not in now or torch.equal(numbers, now[split]):
            continue
        images, same = len(now[split]), min(len(numbers), len(now[split]))
        differing = (numbers[:same] != now[split][:same]).nonzero().flatten().tolist()
        what = f"{images} images and had {len(numbers)}"
        if images == len(numbers):
            what = f"{len(differing)} images of another name, size or label than"
        first = found[split][1](min([*differing, same, images - 1]))
        raise InputError(
            f"--resume {resume}: the data set has changed. {split.removesuffix(' images')} has {what} when the run "
            f"began; first {printable(first)}. Put it back as it was, or start a new run from the weights: "
            f"--model {resume}/weights/last.pt"
        )
    return now
