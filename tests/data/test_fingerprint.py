"""A run is not gone on with on a data set that has changed, and one that has only moved has not."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from train.config.errors import InputError
from train.data.fingerprint import fingerprint
from train.data.formats import Labels
from train.evaluation.truth import ground_truth

NAMES = {0: "a", 1: "b"}


def labels(folder: str, number: int) -> list[Labels]:
    boxes = np.array([[0.5, 0.5, 0.25, 0.25], [0.25, 0.5, 0.125, 0.25]])
    return [Labels(f"{folder}/{i}.jpg", i, (40, 60), np.array([0.0, 1.0]), boxes, [], 1000 + i) for i in range(number)]


def refused(message: str, train: list[Labels], val: list[Labels], truth=None, before=None) -> None:
    with pytest.raises(InputError, match=f"--resume run: the data set has changed. {message}"):
        fingerprint(train, val, truth, before, "run")


def test_what_has_changed_is_named():
    train, val = labels("/data/images/train", 5), labels("/data/images/val", 3)
    before = fingerprint(train, val)
    assert {split: numbers.tolist() for split, numbers in before.items()}.keys() == {"train", "val"}
    assert fingerprint(labels("/moved/images/train", 5), labels("/moved/images/val", 3), None, before, "run")
    other = f"train has 1 images of another name, size or label than when the run began; first {train[3].im_file}. Put"
    for change in ({"size": 7}, {"cls": np.array([1.0, 1.0])}, {"boxes": train[3].boxes + 0.01}, {"shape": (41, 60)}):
        refused(other, [*train[:3], replace(train[3], **change), train[4]], val, before=before)
    refused(
        "val has 2 images and had 3 when the run began; first /data/images/val/1.jpg", train, val[:2], before=before
    )
    refused("val has 2 images and had 3 .*; first /data/images/val/2.jpg", train, [val[0], val[2]], before=before)
    assert not torch.equal(before["val"], fingerprint(train, val[::-1])["val"])


def test_a_file_of_annotations_counts():
    train, val = labels("/data/images/train", 5), labels("/data/images/val", 3)
    _, truth = ground_truth(val, NAMES)
    before = fingerprint(train, val, truth)
    moved = copy.deepcopy(truth)
    moved["annotations"][2]["bbox"][0] += 1
    assert fingerprint(train, val, copy.deepcopy(truth), before, "run")
    refused("--annotations has 1 images of another .* first /data/images/val/1.jpg", train, val, moved, before)
