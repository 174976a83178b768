"""The recipe against Ultralytics' own trainer: the same weights and batches in, the same weights out."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.pose import PoseTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.utils.torch_utils import unset_deterministic

from tests.labels import to_train_on
from tests.training.test_parity import furthest
from train.config.options import TrainConfig
from train.config.task_options import PoseConfig, SegmentConfig
from train.data.files import find_data
from train.data.sets import TrainSet
from train.model.architecture import read_architecture
from train.model.build import ModelEMA, build_model
from train.model.loss import end_of_epoch
from train.model.tasks import HEADS, build_criterion, with_sigmas
from train.processes.stops import Stop
from train.processes.watch import Watch
from train.training.engine import train_one_epoch
from train.training.meter import Meter
from train.training.optim import Schedule, build_optimizer
from train.training.state import TrainState

BATCHES = 5  # in an epoch of 20 images


class Images(list):
    """A data set of so many images, as far as the trainer looks at it."""

    def __init__(self, images: int):
        super().__init__(range(images))
        self.labels = [{"cls": np.zeros((1, 1))}] * images


class Recorded:
    """A loader of recorded batches, with what Ultralytics' trainer asks a loader for."""

    num_workers, drop_last, batch_size = 0, False, 4
    sampler = range(4 * BATCHES)

    def __init__(self, epochs: list[list[dict]]):
        self.epochs, self.epoch = epochs, 0
        self.dataset = Images(len(self.sampler))

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[dict]:
        self.epoch += 1
        yield from deepcopy(self.epochs[self.epoch - 1])


class Loop:
    """Of Ultralytics' trainers the loop, over the recorded batches, with neither validation nor files."""

    recorded: Recorded

    def get_dataloader(self, dataset_path, batch_size=16, rank=0, mode="train"):
        return self.recorded

    def get_validator(self):
        return SimpleNamespace(metrics=SimpleNamespace(keys=[]))

    def validate(self):
        return {}, 0.0

    def save_metrics(self, metrics):
        pass

    def save_model(self):
        pass

    def final_eval(self):
        pass


class Detecting(Loop, DetectionTrainer):
    """Of boxes."""


class Segmenting(Loop, SegmentationTrainer):
    """Of masks."""


class Posing(Loop, PoseTrainer):
    """Of keypoints."""


KINDS = {"detect": (Detecting, TrainConfig), "segment": (Segmenting, SegmentConfig), "pose": (Posing, PoseConfig)}


def close_groups(trainer: Any) -> None:
    """Ours steps at an epoch's end, Ultralytics carries over; the warm-up's epoch closes by itself."""
    trainer.seen = getattr(trainer, "seen", 0) + 1
    if trainer.seen == 2 * BATCHES:
        trainer.accumulate = 1


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        ("yolov8n.yaml", "SGD"), ("yolo26n.yaml", "SGD"), ("yolov8n.yaml", "MuSGD"), ("yolov8n.yaml", "AdamW"),
        ("yolov8n-seg.yaml", "SGD"), ("yolo26n-seg.yaml", "SGD"), ("yolov8n-pose.yaml", "SGD"),
        ("yolo26n-pose.yaml", "SGD"),
        *(
            pytest.param(f"yolo{model}.yaml", "MuSGD", marks=pytest.mark.slow)
            for model in ("v8n-seg", "26n-seg", "v8n-pose", "26n-pose")
        ),
    ],
)  # fmt: skip
def test_weights_and_average_are_those_of_ultralytics_trainer(model: str, optimizer: str, drawn: dict, tmp_path: Path):
    task = HEADS[read_architecture(model)["head"][-1][2]]
    theirs, kind = KINDS[task.name]
    config = kind(
        data=str(drawn[task.name]),
        model=model,
        optimizer=optimizer,
        imgsz=64,
        batch=4,
        nbs=8,
        epochs=2,
        close_mosaic=0,
        fraction=20,
    )
    accelerator = Accelerator(cpu=True)
    data = find_data(config.data, carries=task.carries)
    config = with_sigmas(config, task, data)
    labels = to_train_on(data, config, accelerator, task.carries)
    dataset = TrainSet(labels, data, config)
    epochs = [
        [dataset.collate_fn(dataset.__getitems__([(e, 4 * i + p, False) for p in range(4)])) for i in range(BATCHES)]
        for e in range(2)
    ]
    torch.manual_seed(0)
    detector, _ = build_model(config, model, data)

    trainer = theirs(
        overrides={
            "model": model, "data": config.data, "optimizer": optimizer, "imgsz": 64, "batch": 4, "nbs": 8, "epochs": 2,
            "close_mosaic": 0, "amp": False, "plots": False, "val": False, "device": "cpu", "workers": 0,
            "project": str(tmp_path), "exist_ok": True,
        }
    )  # fmt: skip
    trainer.model, trainer.recorded = deepcopy(detector), Recorded(epochs)
    trainer.add_callback("on_train_batch_start", close_groups)
    try:
        trainer._do_train()
    finally:
        unset_deterministic()

    ema = ModelEMA(detector)
    detector.criterion = build_criterion(detector, lambda value: value, ranks=1)
    schedule = Schedule(config, images=20, classes=3)
    sgd = build_optimizer(detector, schedule)
    state = TrainState(detector, detector, ema, sgd, accelerator)
    meter, watch = Meter(accelerator, detector), Watch(0, 1, 0, print)
    stop, before = Stop(accelerator), deepcopy(detector.state_dict())
    for epoch in range(2):
        loader = meter.timed(deepcopy(epochs[epoch]))
        assert len(list(train_one_epoch(state, loader, schedule, meter, watch, stop))) == (4, 3)[epoch]
        end_of_epoch(detector)
        state.finish(epoch)
    watch.close()
    assert ema.updates == trainer.ema.updates == 4 + 3  # steps: warm-up, then groups of two and a rest of one
    assert furthest(detector.state_dict(), before) > 1e-3
    assert furthest(detector.state_dict(), trainer.model.state_dict()) <= 1e-5
    assert furthest(ema.ema.state_dict(), trainer.ema.ema.state_dict()) <= 1e-5
