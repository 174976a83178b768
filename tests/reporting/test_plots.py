"""Pictures, as far as a test can look at them."""

from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from train.config.options import TrainConfig
from train.evaluation.coco import METRICS
from train.reporting import plots
from train.reporting.training_report import TrainingReport


def test_epochs_on_the_axis_are_whole_numbers(tmp_path: Path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    losses = [f"{part}/{loss}_loss" for part in ("train", "val") for loss in ("box", "cls", "dfl")]
    columns = [*losses, *(f"val/{name}" for name in (*METRICS, "P", "R", "F1")), "lr/pg0", "images_per_s"]
    for epochs in (1, 3):
        rows = [{"epoch": epoch + 1} | dict.fromkeys(columns, 0.5 + epoch) for epoch in range(epochs)]
        plots.draw_results(rows, "val", tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 0
    for figure in drawn:
        for panel in figure.axes:
            assert np.array_equal(panel.get_xticks(), np.round(panel.get_xticks()))


def test_a_batch_is_drawn_as_it_was_and_stays_as_it_is(tmp_path: Path):
    torch.manual_seed(0)
    report = TrainingReport(Accelerator(cpu=True), TrainConfig(hang_timeout=0, trackers=("none",)))
    report.open(tmp_path, report.config)
    report.names = {0: "circle"}
    images = (torch.rand(2, 3, 64, 64) * 255).byte()
    images[0] = 0  # as in the dark
    batch = {"img": images, "cls": torch.zeros(3, 1), "bboxes": torch.rand(3, 4) / 2 + 0.2}
    batch |= {"batch_idx": torch.tensor([0.0, 0, 1])}
    before = {name: tensor.clone() for name, tensor in batch.items()}
    report.training_batch(0, batch | {"im_file": ["a.jpg", "b.jpg"]})
    images += 1  # the step goes on, while a thread draws
    report.close()
    images -= 1
    drawn = cv2.imread(str(tmp_path / "train_batch0.jpg"))
    second = drawn[drawn.shape[0] // 2 :, : drawn.shape[1] // 2]  # below the first
    assert second.mean() == pytest.approx(images[1].float().mean().item(), abs=25)
    assert all(torch.equal(batch[name], before[name]) for name in before)
