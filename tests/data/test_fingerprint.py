"""A run is not gone on with on a data set that has changed, and one that has only moved has not."""

import copy
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.labels import labels_of
from tests.truths import truth_of
from train.config.errors import InputError
from train.data.fingerprint import fingerprint
from train.data.formats import ImageLabels
from train.data.labels import Labels
from train.evaluation.truth import Truth

NAMES = {0: "a", 1: "b"}


def entries(folder: str, number: int) -> list[ImageLabels]:
    boxes = np.array([[0.5, 0.5, 0.25, 0.25], [0.25, 0.5, 0.125, 0.25]])
    classes = np.array([0.0, 1.0])
    return [ImageLabels(f"{folder}/{i}.jpg", i, (40, 60), classes, boxes, [], 1000 + i) for i in range(number)]


def made(some: list[ImageLabels]) -> Labels:
    return labels_of(some, base=os.path.dirname(some[0].im_file))


def refused(message: str, train: list[ImageLabels], val: list[ImageLabels], truth=None, before=None) -> None:
    with pytest.raises(InputError, match=f"--resume run: the data set has changed. {message}"):
        fingerprint(made(train), made(val), truth, before, "run")


def test_what_has_changed_is_named():
    train, val = entries("/data/images/train", 5), entries("/data/images/val", 3)
    before = fingerprint(made(train), made(val))
    assert before.keys() == {"train images", "val images"}
    moved = made(entries("/moved/images/train", 5)), made(entries("/moved/images/val", 3))
    assert fingerprint(*moved, None, before, "run")
    other = f"train has 1 images of another name, size or label than when the run began; first {train[3].im_file}. Put"
    for change in ({"size": 7}, {"cls": np.array([1.0, 1.0])}, {"boxes": train[3].boxes + 0.01}, {"shape": (41, 60)}):
        refused(other, [*train[:3], replace(train[3], **change), train[4]], val, before=before)
    refused(
        "val has 2 images and had 3 when the run began; first /data/images/val/1.jpg", train, val[:2], before=before
    )
    refused("val has 2 images and had 3 .*; first /data/images/val/2.jpg", train, [val[0], val[2]], before=before)
    assert not torch.equal(before["val images"], fingerprint(made(train), made(val[::-1]))["val images"])


def test_a_file_of_annotations_counts():
    train, val = entries("/data/images/train", 5), entries("/data/images/val", 3)
    content = Truth.of_labels(made(val), NAMES).dataset()
    truth = truth_of(content)
    assert fingerprint(made(train), made(val), Truth.of_labels(made(val), NAMES).own_numbers).keys() == {
        "train images", "val images"
    }  # fmt: skip
    before = fingerprint(made(train), made(val), truth.own_numbers)
    moved = copy.deepcopy(content)
    moved["annotations"][2]["bbox"][0] += 1
    assert fingerprint(made(train), made(val), truth_of(content).own_numbers, before, "run")
    now = truth_of(moved).own_numbers
    refused("--annotations has 1 images of another .* first /data/images/val/1.jpg", train, val, now, before)


def test_a_run_that_kept_what_an_older_version_keeps_goes_on():
    train, val = made(entries("/data/images/train", 5)), made(entries("/data/images/val", 3))
    assert fingerprint(train, val, None, {"train": torch.zeros(7, dtype=torch.int64)}, "run")
