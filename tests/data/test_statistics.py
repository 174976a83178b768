"""Augmented samples are distributed as Ultralytics' own, although ours follow from (seed, epoch, position).

By default on drawn images; AUGMENTATION_DATA names the YAML of another data set, such as coco128.
"""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import YOLODataset

from tests.labels import to_train_on
from train.config.objects import Carries
from train.config.options import TrainConfig
from train.config.task_options import PoseConfig, SegmentConfig
from train.data.files import find_data
from train.data.listing import DataFiles
from train.data.sets import TrainSet
from train.data.shapes import draw_shapes
from train.model.tasks import TASKS

SAMPLES, OTHERS = 2000, 400
QUANTITIES = ("boxes", "area", "aspect", "x", "y", "red", "green", "blue")
OF_TASKS = {"segment": ("masked", "mask of box", "semantic"), "pose": ("x of keypoints", "y of keypoints", "visible")}


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


def measure_beside(task: str, samples: list[dict]) -> dict[str, np.ndarray]:
    """Of masks which share of the image they are, and of their boxes, and the mean class of their pixels; of keypoints
    where they are, and which of them are visible.
    """
    if task == "pose":
        points = np.concatenate([sample["keypoints"].numpy() for sample in samples])
        seen = points[..., 2] > 0
        columns = (points[..., 0][seen], points[..., 1][seen], seen.mean(1))
    else:
        masks = [sample["masks"][0].numpy() for sample in samples]
        shares = [
            (mask == i + 1).mean() / max(w * h, 1e-6)
            for mask, sample in zip(masks, samples, strict=True)
            for i, (_, _, w, h) in enumerate(sample["bboxes"].tolist())
        ]
        filled = np.array([(mask > 0).mean() for mask in masks])
        columns = (filled, np.array(shares), np.array([sample["sem_masks"].mean().item() for sample in samples]))
    return dict(zip(OF_TASKS[task], columns, strict=True))


@pytest.mark.parametrize("task", OF_TASKS)
def test_masks_and_keypoints_differ_no_more_than_boxes(task: str, tmp_path: Path):
    yaml = draw_shapes(tmp_path, {"train": 128, "val": 1}, carries=TASKS[task].carries)
    data = find_data(str(yaml), carries=TASKS[task].carries)
    config = (SegmentConfig if task == "segment" else PoseConfig)(imgsz=96, epochs=10_000)
    mine, reference = both(data, config, TASKS[task].carries, OTHERS)
    noise = 1.95 * np.sqrt(2 / OTHERS)
    for quantity, values in measure_beside(task, mine).items():
        assert distance(values, measure_beside(task, reference)[quantity]) < noise, quantity


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    drawn = draw_shapes(tmp_path_factory.mktemp("many"), {"train": 128, "val": 1})
    data = find_data(os.environ.get("AUGMENTATION_DATA", str(drawn)))
    mine, reference = both(data, TrainConfig(imgsz=160, epochs=10_000), "boxes", SAMPLES)
    return {"ours": measure(mine[:SAMPLES]), "again": measure(mine[SAMPLES:]), "theirs": measure(reference)}


def both(data: DataFiles, config: TrainConfig, carries: Carries, samples: int) -> tuple[list[dict], list[dict]]:
    """Twice as many of our samples, and so many of Ultralytics'."""
    labels = to_train_on(data, config, Accelerator(cpu=True), carries)
    n = len(labels)
    keys = [(i // n, i % n, False) for i in range(2 * samples)]
    ours = TrainSet(labels, data, config)
    mine = [sample for i in range(0, len(keys), 16) for sample in ours.__getitems__(keys[i : i + 16])]

    class Theirs(YOLODataset):
        def get_img_files(self, path):
            return [entry.im_file for entry in labels]

        def get_labels(self):
            return [ours.labels[i] for i in range(n)]

    about = {"names": data.names, "kpt_shape": [*(data.keypoints or (0, 0))], "flip_idx": [*data.flip_idx]}
    task = {"boxes": "detect", "polygons": "segment", "keypoints": "pose"}[carries]
    theirs = Theirs([], data=about, task=task, imgsz=config.imgsz, augment=True, hyp=get_cfg(), batch_size=16)
    random.seed(0)
    np.random.seed(0)
    order = [i for _ in range(-(-samples // n)) for i in random.sample(range(n), n)]
    return mine, [theirs[i] for i in order[:samples]]


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_no_difference_beyond_sampling_noise(statistics: dict, quantity: str):
    # 0.1 % of pairs of samples of this size are further apart; boxes of an image count as one observation
    noise = 1.95 * np.sqrt(2 / SAMPLES)
    assert distance(statistics["ours"][quantity], statistics["theirs"][quantity]) < noise


def test_the_distance_sees_a_difference(statistics: dict):
    assert distance(statistics["ours"]["area"], statistics["again"]["area"]) < 1.95 * np.sqrt(2 / SAMPLES)
    assert distance(statistics["ours"]["area"], 1.5 * statistics["theirs"]["area"]) > 1.95 * np.sqrt(2 / SAMPLES)
