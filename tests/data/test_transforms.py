"""The transforms that are faster than Ultralytics' own give the bytes of Ultralytics' own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from ultralytics.data.augment import Compose

from tests.data.conftest import load, load_of
from tests.labels import labels_of
from train.config.objects import Objects
from train.config.options import TrainConfig
from train.config.task_options import PoseConfig, SegmentConfig
from train.data import sets, transforms
from train.data.sets import TrainSet
from train.model.tasks import TASKS

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "geometry": {"degrees": 30.0, "shear": 8.0, "translate": 0.6, "scale": 0.9, "flipud": 0.5},
    "perspective": {"perspective": 0.001, "bgr": 0.5},
    "mixed": {"mixup": 0.5, "cutmix": 0.5, "mosaic": 0.7},
    "copied": {"copy_paste": 0.7, "mosaic": 0.5},
    "copied from others": {"copy_paste": 0.7, "copy_paste_mode": "mixup"},
    "no mosaic": {"mosaic": 0.0},
    "rect": {"rect": True},
    "no colours": {"hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0},
}


class Slow(TrainSet):
    """With Ultralytics' transforms, and images that nobody else has."""

    def load_image(self, i: int, *args: Any, **kwargs: Any) -> tuple:
        image, *shapes = super().load_image(i, *args, **kwargs)
        return (image.copy(), *shapes)


def classes(compose: Compose) -> set[type]:
    """Of all its steps."""
    found = {type(step) for step in compose.transforms}
    for step in compose.transforms:
        for inner in (step, getattr(step, "pre_transform", None)):
            found |= classes(inner) if isinstance(inner, Compose) else set()
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_the_bytes_are_those_of_ultralytics_own(name: str, shapes: Path, accelerator: Accelerator, monkeypatch):
    labels, names = load(shapes, "train", accelerator)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) / 2
    outlined = [
        replace(one, segments=[box[:2] + corners * box[2:] for box in one.boxes]) if "copied" in name else one
        for one in labels
    ]
    config = TrainConfig(imgsz=96, batch=16, epochs=2, close_mosaic=1, seed=3, **OPTIONS[name])
    fast = TrainSet(labels_of(outlined), Objects(names=names), config)
    monkeypatch.setattr(sets, "faster", lambda transforms: transforms)
    slow = Slow(labels_of(outlined), Objects(names=names), config)
    assert classes(fast.transforms) >= set(transforms.FASTER.values())
    assert not classes(slow.transforms) & set(transforms.FASTER.values())
    for epoch, closed in ((0, False), (1, True)):
        for start in (0, 16):
            keys = [(epoch, start + position, closed) for position in range(16)]
            for one, other in zip(fast.__getitems__(keys), slow.__getitems__(keys), strict=True):
                for part in ("img", "cls", "bboxes"):
                    assert torch.equal(one[part], other[part]), (epoch, one["im_file"], part)
                assert one["img"].is_contiguous()


@pytest.mark.parametrize("name", ["default", "geometry", "mixed", "copied", "no mosaic"])
@pytest.mark.parametrize("kind", [SegmentConfig, PoseConfig])
def test_masks_and_keypoints_are_those_of_ultralytics_own(name: str, kind: Any, drawn, accelerator, monkeypatch):
    task = TASKS[kind.task]
    labels, data = load_of(task.carries, drawn[task.name], "train", accelerator)
    overlap = {"overlap_mask": name != "mixed"} if task.name == "segment" else {}
    config = kind(imgsz=96, batch=16, epochs=2, close_mosaic=1, seed=3, **overlap, **OPTIONS[name])
    fast = TrainSet(labels, data, config)
    monkeypatch.setattr(sets, "faster", lambda transforms: transforms)
    slow = Slow(labels, data, config)
    parts = ("img", "cls", "bboxes", *(("masks", "sem_masks") if task.name == "segment" else ("keypoints",)))
    seen = 0.0
    for one, other in zip(
        fast.__getitems__([(0, position, False) for position in range(16)]),
        slow.__getitems__([(0, position, False) for position in range(16)]),
        strict=True,
    ):
        assert all(torch.equal(one[part], other[part]) for part in parts), one["im_file"]
        seen += one[parts[3]].float().sum().item()
        if "keypoints" in one or not config.overlap_mask:
            assert len(one["cls"]) == len(one[parts[3]])
    assert seen > 0


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels: int, tmp_path: Path, accelerator: Accelerator, monkeypatch):
    rng = np.random.default_rng(0)
    for folder in ("images/train", "labels/train"):
        (tmp_path / folder).mkdir(parents=True)
    for i in range(20):
        cv2.imwrite(str(tmp_path / f"images/train/{i}.png"), rng.integers(0, 256, (40 + i, 70 - i, channels), np.uint8))
        (tmp_path / f"labels/train/{i}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (tmp_path / "grey.yaml").write_text(
        f"path: {tmp_path}\ntrain: images/train\nval: images/train\nnames: [a]\nchannels: {channels}\n"
    )
    labels, names = load(tmp_path / "grey.yaml", "train", accelerator)
    config = TrainConfig(imgsz=64, batch=16, epochs=2, seed=3)
    fast = TrainSet(labels, Objects(names=names, channels=channels), config)
    monkeypatch.setattr(sets, "faster", lambda transforms: transforms)
    slow = Slow(labels, Objects(names=names, channels=channels), config)
    keys = [(0, position, False) for position in range(16)]
    for one, other in zip(fast.__getitems__(keys), slow.__getitems__(keys), strict=True):
        assert one["img"].shape == (channels, 64, 64)
        assert torch.equal(one["img"], other["img"])
        assert torch.equal(one["bboxes"], other["bboxes"])


def test_no_transform_writes_into_an_image_that_others_use(shapes: Path, accelerator: Accelerator):
    labels, names = load(shapes, "train", accelerator)
    for options in OPTIONS.values():
        images = TrainSet(labels, Objects(names=names), TrainConfig(imgsz=96, batch=16, epochs=2, **options))
        images.__getitems__([(0, position, False) for position in range(16)])
        for i, (image, *_) in images._decoded.items():
            assert np.array_equal(image, images.decode(i)[0])
