"""Pictures, as far as a test can look at them."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

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
