"""The schedules and parameter groups against Ultralytics' own trainer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ultralytics.cfg import get_cfg
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import DetectionModel, SegmentationModel

from train.config.options import TrainConfig
from train.training.optim import Schedule, build_optimizer


@pytest.fixture(scope="module")
def model() -> DetectionModel:
    """End to end: it has both class branches."""
    return DetectionModel("yolo26n.yaml", nc=3, verbose=False)


def theirs(model: DetectionModel, config: TrainConfig, schedule: Schedule) -> torch.optim.Optimizer:
    args = get_cfg(overrides={"optimizer": config.optimizer, "lr0": config.lr0, "momentum": config.momentum})
    trainer = SimpleNamespace(args=args, data={"nc": schedule.classes})
    iterations = -(-schedule.images // max(config.batch, config.nbs)) * config.epochs
    return BaseTrainer.build_optimizer(
        trainer, model, config.optimizer, config.lr0, config.momentum, schedule.weight_decay, iterations
    )


@pytest.mark.parametrize(
    ("optimizer", "images", "expected"),
    [
        ("SGD", 640, "SGD"),
        ("Adam", 640, "Adam"),
        ("AdamW", 640, "AdamW"),
        ("MuSGD", 640, "MuSGD"),
        ("auto", 640, "AdamW"),
        ("auto", 640_000, "MuSGD"),
    ],
)
def test_groups_are_ultralytics(model: DetectionModel, optimizer: str, images: int, expected: str):
    config = TrainConfig(optimizer=optimizer, epochs=10, batch=16)
    schedule = Schedule(config, images=images, classes=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".dfl" not in name
    ours, reference = build_optimizer(model, schedule), theirs(model, config, schedule)
    assert type(ours).__name__ == type(reference).__name__ == expected
    assert len(ours.param_groups) == len(reference.param_groups)
    for mine, other in zip(ours.param_groups, reference.param_groups, strict=True):
        trained = [id(p) for p in other["params"] if p.requires_grad]
        assert [id(p) for p in mine["params"]] == trained
        for key in set(other) - {"params", "initial_lr", "fused", "decoupled_weight_decay"}:
            assert mine[key] == other[key], key
        assert mine["initial_lr"] == other["lr"]


@pytest.mark.parametrize("optimizer", ["SGD", "MuSGD"])
def test_groups_of_a_segmentation_model_are_ultralytics(optimizer: str):
    test_groups_are_ultralytics(SegmentationModel("yolo26n-seg.yaml", nc=3, verbose=False), optimizer, 640, optimizer)


@pytest.mark.parametrize("cos_lr", [False, True])
@pytest.mark.parametrize("epochs", [1, 2, 8])
def test_rates_are_ultralytics(model: DetectionModel, epochs: int, cos_lr: bool):
    config = TrainConfig(optimizer="SGD", epochs=epochs, batch=4, nbs=16, cos_lr=cos_lr, warmup_epochs=3.0)
    schedule = Schedule(config, images=42, classes=3)
    nb = schedule.batches
    assert nb == 10
    ours, reference = build_optimizer(model, schedule), theirs(model, config, schedule)
    trainer = SimpleNamespace(
        args=get_cfg(overrides={"cos_lr": cos_lr, "epochs": epochs}), epochs=epochs, optimizer=reference
    )
    BaseTrainer._setup_scheduler(trainer)
    nw = BaseTrainer._get_warmup_iterations(trainer, nb)
    accumulate = min(4, nb * epochs)
    assert schedule.warmup_batches == nw
    for epoch in range(epochs):
        for group in reference.param_groups:
            group["lr"] = group["initial_lr"] * trainer.lf(epoch)
        since, ends = 0, set()
        for i in range(nb):
            ni = i + nb * epoch
            if nw and ni <= nw:  # the lines of BaseTrainer._do_train
                xi = [0, nw]
                accumulate = max(1, int(np.interp(ni, xi, [1, 4]).round()))
                for x in reference.param_groups:
                    start = config.warmup_bias_lr if x.get("param_group") == "bias" else 0.0
                    x["lr"] = float(np.interp(ni, xi, [start, x["initial_lr"] * trainer.lf(epoch)]))
                    x["momentum"] = float(np.interp(ni, xi, [config.warmup_momentum, config.momentum]))
            schedule.apply(ours, epoch, ni)
            for mine, other in zip(ours.param_groups, reference.param_groups, strict=True):
                assert mine["lr"] == pytest.approx(other["lr"], abs=1e-15)
                assert mine["momentum"] == other["momentum"]
            since += 1
            if since >= accumulate or i == nb - 1:
                ends.add(i)
                since = 0
        assert schedule.step_ends(epoch) == ends


def test_every_epoch_ends_with_a_step():
    schedule = Schedule(TrainConfig(batch=16, nbs=64, epochs=20), images=16 * 11 + 3, classes=2)
    assert schedule.batches == 11
    assert all(10 in schedule.step_ends(epoch) for epoch in range(20))
    assert sorted(schedule.step_ends(10)) == [3, 7, 10]
    assert schedule.step_ends(0) == frozenset(range(11)) - {6, 8}  # the warm-up begins with single batches


def test_a_set_smaller_than_the_batch_is_one_batch():
    assert Schedule(TrainConfig(batch=16), images=3, classes=1).batches == 1
