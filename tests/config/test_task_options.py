"""The options of masks and keypoints, as they are typed, change what they are named after, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import ROOT
from tests.labels import to_train_on, to_validate_on
from train.config.reading import parse
from train.config.task_options import PoseConfig, SegmentConfig
from train.data.files import find_data
from train.data.sets import TrainSet, ValSet
from train.model.build import build_model
from train.model.tasks import TASKS, build_criterion, with_sigmas

KINDS = {"seg": SegmentConfig, "pose": PoseConfig}
IMAGES, SIZE = 4, 64


def learnt(model: str, drawn: dict[str, Path], *typed: object) -> tuple[dict[str, Any], list[float], dict[str, float]]:
    """A batch, and of its loss the terms that are learnt by and those that are shown, for the words of a command."""
    file, kind = ROOT / "tests" / "fixtures" / f"{model}.yaml", KINDS[model.partition("-")[2]]
    task = TASKS[kind.task]
    words = ["--data", drawn[task.name], "--model", file, "--imgsz", SIZE, "--batch", IMAGES, *typed]
    config, _ = parse(kind, "", [*map(str, words)])
    accelerator, data = Accelerator(cpu=True), find_data(config.data, carries=task.carries)
    config = with_sigmas(config, task, data)
    images = TrainSet(to_train_on(data, config, accelerator, task.carries), data, config)
    batch = images.collate_fn(images.__getitems__([(0, position, True) for position in range(IMAGES)]))
    torch.manual_seed(0)
    detector, _ = build_model(config, str(file), data)
    detector.train().criterion = build_criterion(detector, lambda value: value, ranks=1)
    terms, items = detector.loss(batch, detector(batch["img"].float() / 255))
    return batch, terms.tolist(), {name: value.item() for name, value in items.items()}


@pytest.mark.parametrize("model", ["tiny-pose", "tiny26-pose"])
def test_the_gains_of_keypoints(model: str, drawn: dict[str, Path]):
    _, terms, usual = learnt(model, drawn)
    assert ("rle_loss" in usual) == (model == "tiny26-pose")
    for name, default, gain in (("pose", 12.0, 6.0), ("kobj", 1.0, 3.0), ("rle", 1.0, 0.5)):
        _, changed, shown = learnt(model, drawn, f"--{name}", gain)
        times = [gain / default if term == f"{name}_loss" else 1.0 for term in usual]
        assert changed == pytest.approx([term * more for term, more in zip(terms, times, strict=True)], rel=1e-5)
        assert [*shown.values()] == pytest.approx(
            [term * more for term, more in zip(usual.values(), times, strict=True)], rel=1e-5
        )
        assert usual.get(f"{name}_loss", 1.0) > 0


@pytest.mark.parametrize(
    ("model", "overlap"),
    [("tiny-seg", "--overlap-mask"), ("tiny-seg", "--no-overlap-mask"), ("tiny26-seg", "--no-overlap-mask")],
)
def test_masks_are_as_many_times_smaller_as_is_said(model: str, overlap: str, drawn: dict[str, Path]):
    usual, _, expected = learnt(model, drawn, overlap)
    assert usual["masks"].shape[1:] == (SIZE // 4, SIZE // 4)
    objects = len(usual["cls"]) if overlap == "--no-overlap-mask" else IMAGES
    for ratio in (2, 8):
        batch, _, shown = learnt(model, drawn, overlap, "--mask-ratio", ratio)
        assert batch["masks"].shape == (objects, SIZE // ratio, SIZE // ratio)
        assert batch["sem_masks"].shape == (IMAGES, SIZE // ratio, SIZE // ratio)
        covered, before = ((one["masks"] > 0).float().mean().item() for one in (batch, usual))
        assert covered == pytest.approx(before, rel=0.5)
        assert shown["seg_loss"] != expected["seg_loss"]
        assert shown["seg_loss"] == pytest.approx(expected["seg_loss"], rel=0.5)
        if model == "tiny-seg":  # the assigner of version 26 looks at masks, too
            rest = {"box_loss", "cls_loss", "dfl_loss"}
            assert {name: shown[name] for name in rest} == {name: expected[name] for name in rest}


def test_masks_of_validation_are_of_that_size_too(drawn: dict[str, Path]):
    """Its losses are shown beside those of training."""
    words = ["--data", drawn["segment"], "--imgsz", SIZE, "--mask-ratio", 2, "--no-rect"]
    config, _ = parse(SegmentConfig, "", [*map(str, words)])
    data = find_data(config.data, carries="polygons")
    labels = to_validate_on(data, config, Accelerator(cpu=True), "polygons")
    assert ValSet(labels, data, config, 32)[0]["masks"].shape == (1, SIZE // 2, SIZE // 2)
