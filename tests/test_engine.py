"""Canary for the reason why the engine computes the loss outside the model's forward."""

import torch
from accelerate import Accelerator

from train.config import TrainConfig
from train.model import build_model

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
    model, _ = build_model(TrainConfig(), "yolov8n.yaml", {0: "a"}, 3)
    model = accelerator.prepare(model).train()
    try:
        predictions = model(BATCH["img"])
        assert not torch.is_autocast_enabled("cpu")
        assert {value.dtype for value in predictions.values() if isinstance(value, torch.Tensor)} == {torch.float32}
        accelerator.unwrap_model(model).loss(BATCH, predictions)[0].sum().backward()
        assert not torch.is_autocast_enabled("cpu")
    finally:
        accelerator.state._mixed_precision = "no"
