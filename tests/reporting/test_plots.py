"""Pictures, as far as a test can look at them."""

from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from train.evaluation.coco import METRICS
from train.reporting import plots


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


def test_drawing_a_batch_leaves_it_as_it_is(tmp_path: Path):
    torch.manual_seed(0)
    images = (torch.rand(2, 3, 64, 64) * 255).byte()
    images[0] = 0  # as in the dark
    batch = {"img": images, "cls": torch.zeros(3, 1), "bboxes": torch.rand(3, 4) / 2 + 0.2}
    batch |= {"batch_idx": torch.tensor([0.0, 0, 1])}
    before = {name: tensor.clone() for name, tensor in batch.items()}
    plots.draw_batch(batch | {"im_file": ["a.jpg", "b.jpg"]}, {0: "circle"}, tmp_path / "batch.jpg")
    drawn = cv2.imread(str(tmp_path / "batch.jpg"))
    second = drawn[drawn.shape[0] // 2 :, : drawn.shape[1] // 2]  # below the first
    assert second.mean() == pytest.approx(images[1].float().mean().item(), abs=25)
    assert all(torch.equal(batch[name], before[name]) for name in before)
