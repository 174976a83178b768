"""Augmented samples are distributed as Ultralytics' own, although ours follow from (seed, epoch, position).

By default on drawn images; AUGMENTATION_DATA names the YAML of another data set, such as coco128.
"""

import os
import random

import numpy as np
import pytest
from accelerate import Accelerator
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import YOLODataset

from tests.labels import to_train_on
from train.config.options import TrainConfig
from train.data.files import find_data
from train.data.sets import TrainSet
from train.data.shapes import draw_shapes

SAMPLES = 2000
QUANTITIES = ("boxes", "area", "aspect", "x", "y", "red", "green", "blue")


def measure(samples: list[dict]) -> dict[str, np.ndarray]:
    """What is compared: boxes an image, their area, aspect and centres, and the means of the channels."""
    boxes = np.concatenate([sample["bboxes"].numpy() for sample in samples])
    images = np.array([sample["img"].float().mean((1, 2)).numpy() for sample in samples])
    columns = (
        np.array([len(sample["bboxes"]) for sample in samples]),
        np.sqrt(boxes[:, 2] * boxes[:, 3]),
        np.log(boxes[:, 2] / boxes[:, 3]),
        boxes[:, 0],
        boxes[:, 1],
        *images.T,
    )
    return dict(zip(QUANTITIES, columns, strict=True))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov-Smirnov: the largest gap between the two distribution functions."""
    at = np.sort(np.concatenate([a, b]))
    return float(
        np.abs(
            np.searchsorted(np.sort(a), at, "right") / len(a) - np.searchsorted(np.sort(b), at, "right") / len(b)
        ).max()
    )


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    drawn = draw_shapes(tmp_path_factory.mktemp("many"), {"train": 128, "val": 1})
    data = find_data(os.environ.get("AUGMENTATION_DATA", str(drawn)))
    config = TrainConfig(imgsz=160, epochs=10_000)
    labels = to_train_on(data, config, Accelerator(cpu=True))
    n = len(labels)
    keys = [(i // n, i % n, False) for i in range(2 * SAMPLES)]
    ours = TrainSet(labels, data.names, 3, config)
    mine = [sample for i in range(0, len(keys), 16) for sample in ours.__getitems__(keys[i : i + 16])]

    class Theirs(YOLODataset):
        def get_img_files(self, path):
            return [entry.im_file for entry in labels]

        def get_labels(self):
            return [ours.labels[i] for i in range(n)]

    theirs = Theirs([], data={"names": data.names}, imgsz=160, augment=True, hyp=get_cfg(), batch_size=16)
    random.seed(0)
    np.random.seed(0)
    order = [i for _ in range(-(-SAMPLES // n)) for i in random.sample(range(n), n)]
    reference = [theirs[i] for i in order[:SAMPLES]]
    return {"ours": measure(mine[:SAMPLES]), "again": measure(mine[SAMPLES:]), "theirs": measure(reference)}


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_no_difference_beyond_sampling_noise(statistics: dict, quantity: str):
    # 0.1 % of pairs of samples of this size are further apart; boxes of an image count as one observation
    noise = 1.95 * np.sqrt(2 / SAMPLES)
    assert distance(statistics["ours"][quantity], statistics["theirs"][quantity]) < noise


def test_the_distance_sees_a_difference(statistics: dict):
    assert distance(statistics["ours"]["area"], statistics["again"]["area"]) < 1.95 * np.sqrt(2 / SAMPLES)
    assert distance(statistics["ours"]["area"], 1.5 * statistics["theirs"]["area"]) > 1.95 * np.sqrt(2 / SAMPLES)
