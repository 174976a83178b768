"""In which order images are served, and how they are augmented."""

import os
import random
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import YOLODataset

from tests.data.conftest import load
from tests.labels import labels_of
from train.config.objects import Objects
from train.config.options import Augmentation, TrainConfig, ValConfig
from train.data.formats import read_image
from train.data.loaders import Positions, train_loader, val_loader
from train.data.sets import GROUP, TrainSet, ValSet, hyperparameters


# Training
@pytest.fixture(scope="module")
def train_set(shapes: Path, accelerator: Accelerator) -> TrainSet:
    labels, names = load(shapes, "train", accelerator)
    config = TrainConfig(imgsz=64, batch=16, epochs=3, close_mosaic=1, mixup=0.3, cutmix=0.3, seed=5)
    return TrainSet(labels, Objects(names=names), config)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("img", "cls", "bboxes")) and a["im_file"] == b["im_file"]


def test_a_sample_follows_from_seed_epoch_and_position_alone(train_set: TrainSet, shapes: Path, accelerator):
    together = train_set.__getitems__([(0, p, False) for p in range(16)])
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    labels, names = load(shapes, "train", accelerator)
    other = TrainSet(labels, Objects(names=names), train_set.config)
    backwards = {
        p: other.__getitems__([(1, 3, False), (0, p, False)])[1] for p in reversed(range(16))
    }  # other neighbours, order
    assert all(same(together[p], backwards[p]) for p in range(16))
    assert not same(together[0], train_set[(1, 0, False)])


def test_every_image_once_an_epoch_and_another_order_in_each(train_set: TrainSet):
    first, second = train_set.order(0).tolist(), train_set.order(1).tolist()
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second


def test_a_set_smaller_than_the_batch_is_repeated(shapes: Path, accelerator: Accelerator):
    labels, names = load(shapes, "train", accelerator)
    small = TrainSet(labels_of(labels[:3]), Objects(names=names), TrainConfig(imgsz=64, batch=8))
    order = small.order(0)
    assert len(order) == 8
    assert set(order.tolist()) == {0, 1, 2}


def test_mosaic_partners_come_from_the_aligned_group(train_set: TrainSet):
    order = train_set.order(0)
    assert GROUP == 16
    assert train_set.group(0, 17).tolist() == order[16:32].tolist()
    assert train_set.group(0, 39).tolist() == order[24:40].tolist()  # the last group is full too
    loaded: set[int] = set()
    for position in range(16, 32):
        train_set.__getitems__([(0, position, False)])
        loaded |= set(train_set._decoded)
    assert loaded <= set(order[16:32].tolist())
    assert len(loaded) > 8


def test_every_augmentation_option_reaches_ultralytics():
    changed = {"copy_paste_mode": "mixup", "degrees": 7.0, "bgr": 0.5, "cutmix": 0.25}
    hyp = hyperparameters(TrainConfig(**changed))
    for field in fields(Augmentation):
        assert getattr(hyp, field.name) == changed.get(field.name, field.default)


def test_a_batch_of_whole_groups_decodes_each_image_once(train_set: TrainSet):
    train_set.__getitems__([(0, p, False) for p in range(16)])
    assert len(train_set._decoded) == 16


def test_the_last_epochs_have_no_mosaic(train_set: TrainSet):
    train_set.__getitems__([(1, 0, False)])
    assert len(train_set._decoded) > 1
    train_set.__getitems__([(2, 0, True)])
    assert len(train_set._decoded) == 1


def test_the_ranks_shares_make_up_the_batch():
    whole = list(Positions(batches=3, batch=8, ranks=1))
    halves = list(Positions(batches=3, batch=8, ranks=2))
    assert not hasattr(Positions(1, 1, 1), "batch_size")  # Accelerate would drop batches
    assert [a + b for a, b in zip(halves[0::2], halves[1::2], strict=True)] == whole


def test_workers_are_there_from_the_start_and_stay(train_set: TrainSet, shapes: Path, accelerator: Accelerator):
    def workers() -> set[int]:
        return {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}

    others = workers()
    config = TrainConfig(imgsz=64, batch=8, epochs=3, workers=1, val_batch=8)
    labels, names = load(shapes, "val", accelerator)
    train, positions = train_loader(TrainSet(train_set.scanned, Objects(names=names), config), 5, accelerator)
    val = val_loader(ValSet(labels, Objects(names=names), config, 32), config, accelerator)
    started = workers() - others
    assert len(started) == 2  # a fork of a rank that has trained would copy all of its memory
    for epoch in range(2):
        positions.set(epoch, 0, False)
        assert len(list(train)) == 5
        ids = sorted(i for batch in val for i in batch["id"])
        assert ids == sorted(labels.ids.tolist())
        assert workers() - others == started
    positions.set(2, 0, False)
    assert train.started is None
    train.start()  # while this process validates
    ahead: Any = train.started
    while ahead._worker_result_queue.empty():  # the worker prepares batches though nobody asks for one
        time.sleep(0.01)
    positions.set(2, 0, False)  # as the next epoch does
    order = train.dataset.order(2)[:40].tolist()
    assert [file for batch in train for file in batch["im_file"]] == [train_set.im_files[i] for i in order]
    assert len(list(train)) == 5  # once only
    assert workers() - others == started


def test_rect_batches_have_one_shape_and_little_padding(shapes: Path, accelerator: Accelerator):
    labels, names = load(shapes, "train", accelerator)
    dataset = TrainSet(
        labels, Objects(names=names), TrainConfig(imgsz=160, batch=8, rect=True, epochs=3, close_mosaic=0)
    )
    shapes_seen = set()
    for epoch in range(2):
        order = dataset.order(epoch)
        assert len(set(order.tolist())) == len(order) == 40
        for batch in range(5):
            samples = dataset.__getitems__([(epoch, batch * 8 + p, False) for p in range(8)])
            assert len({sample["img"].shape for sample in samples}) == 1
            shapes_seen.add(tuple(samples[0]["img"].shape[1:]))
            assert len(dataset._decoded) == 8  # no mosaic
    assert len(shapes_seen) > 1
    assert max(max(shape) for shape in shapes_seen) == 160
    assert dataset.order(0).tolist() != dataset.order(1).tolist()


def test_images_of_a_user_are_not_touched(shapes: Path, tmp_path: Path, accelerator: Accelerator):
    source = next(shapes.parent.glob("images/train/*.jpg"))
    (tmp_path / "a.jpg").write_bytes(source.read_bytes())
    (tmp_path / "a.npy").write_bytes(b"not for Ultralytics to load, rewrite or remove")
    labels = labels_of([read_image(str(tmp_path / "a.jpg"), str(tmp_path / "a.txt"), 0, 1)])
    TrainSet(labels, Objects(names={0: "a"}), TrainConfig(imgsz=64, batch=1))[(0, 0, False)]
    assert (tmp_path / "a.npy").read_bytes().startswith(b"not for Ultralytics")


def test_albumentations_are_seeded_by_the_sample(train_set: TrainSet, monkeypatch):
    seeds = []

    class Spy:
        """Stands where Ultralytics applies Albumentations, which it seeds from torch's initial seed."""

        def __call__(self, labels: dict) -> dict:
            seeds.append(torch.initial_seed())
            return labels

    monkeypatch.setattr(train_set.transforms, "transforms", [Spy(), *train_set.transforms.transforms])
    train_set.__getitems__([(0, 1, False), (0, 2, False)])
    train_set.__getitems__([(0, 2, False)])
    assert seeds[0] != seeds[1] == seeds[2]


# Validation
def test_validation_shapes_are_ultralytics_at_batch_1(shapes: Path, accelerator: Accelerator):
    labels, names = load(shapes, "val", accelerator)
    dataset = ValSet(labels, Objects(names=names), ValConfig(imgsz=128), stride=32)
    theirs = YOLODataset(
        str(shapes.parent / "images" / "val"), data={"names": names}, augment=False, hyp=get_cfg(), imgsz=128,
        rect=True, batch_size=1, stride=32, pad=0.5,
    )  # fmt: skip
    (shapes.parent / "labels" / "val.cache").unlink()
    expected = {theirs.im_files[i]: theirs[i]["img"] for i in range(len(theirs))}
    for batch in (1, 4, 100):
        batches = dataset.batches(batch)
        assert sorted(i for part in batches for i in part) == list(range(21))
        assert max(map(len, batches)) <= batch
        for part in batches:
            images = [dataset[i] for i in part]
            assert len({image["img"].shape for image in images}) == 1
            assert all(torch.equal(image["img"], expected[image["im_file"]]) for image in images)
    costs = [len(part) * dataset[part[0]]["img"].numel() for part in dataset.batches(4)]
    assert costs == sorted(costs, reverse=True)


def test_the_users_settings_stay_as_they_are():
    assert not Path(os.environ["YOLO_CONFIG_DIR"]).is_relative_to(Path.home())
