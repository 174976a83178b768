"""Parts of the engine; and a canary for why it computes the loss outside the model's forward."""

import pytest
import torch
from accelerate import Accelerator

from train.config.objects import Objects
from train.config.options import TrainConfig
from train.model.build import build_model
from train.training.engine import check_finite, rescale

BATCH = {
    "img": torch.rand(2, 3, 64, 64),
    "cls": torch.zeros(1, 1),
    "bboxes": torch.full((1, 4), 0.5),
    "batch_idx": torch.zeros(1),
}


def test_autocast_is_off_again_after_a_step():
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "bf16"
    accelerator.native_amp = True
    model, _ = build_model(TrainConfig(), "yolov8n.yaml", Objects(names={0: "a"}))
    model = accelerator.prepare(model).train()
    try:
        predictions = model(BATCH["img"])
        assert not torch.is_autocast_enabled("cpu")
        assert {value.dtype for value in predictions.values() if isinstance(value, torch.Tensor)} == {torch.float32}
        accelerator.unwrap_model(model).loss(BATCH, predictions)[0].sum().backward()
        assert not torch.is_autocast_enabled("cpu")
    finally:
        accelerator.state._mixed_precision = "no"


def test_multi_scale_follows_from_seed_and_batch_number():
    config = TrainConfig(imgsz=320, multi_scale=0.5, seed=3)
    images = torch.rand(1, 3, 320, 320)
    sizes = [rescale(images, ni, config, 32).shape[2:] for ni in range(40)]
    assert sizes == [rescale(images, ni, config, 32).shape[2:] for ni in range(40)]
    assert {h for h, _ in sizes} <= set(range(160, 481, 32))
    assert len(set(sizes)) > 5
    assert rescale(images, 0, TrainConfig(imgsz=320), 32) is images


def test_poisoned_weights_are_an_error():
    model, _ = build_model(TrainConfig(), "yolov8n.yaml", Objects(names={0: "a"}))
    check_finite(model)
    model.model[3].conv.weight.data[0, 0, 0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="no longer finite"):
        check_finite(model)
