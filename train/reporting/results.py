"""The files of a run, whole or not at all: config.json, results.csv, metrics, predictions and truth as JSON."""

import csv
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np

from train.config.options import EvalConfig, TrainConfig
from train.evaluation.coco import metric_names
from train.evaluation.detections import KINDS
from train.evaluation.evaluate import Evaluation
from train.evaluation.truth import Truth
from train.model.tasks import task_of
from train.processes.files import whole_file
from train.training.meter import Window
from train.training.state import TrainState

PACKAGES = ("torch", "torchvision", "accelerate", "ultralytics", "hotcoco", "pycocotools", "wandb", "numpy")


class Results:
    """The run's folder.

    Args:
        folder: it is there.
        writes: whether this process writes; the others do nothing.
    """

    def __init__(self, folder: Path, writes: bool):
        self.folder, self.writes = folder, writes

    def write(self, name: str, text: str) -> None:
        """A text file."""
        if self.writes:
            with whole_file(self.folder / name) as draft:
                draft.write_text(text, encoding="utf-8")

    def config(self, config: EvalConfig) -> None:
        """config.json: the options as they were given, and the versions of what runs them."""
        task = {"task": config.task} if isinstance(config, TrainConfig) else {}
        self.write("config.json", json.dumps(asdict(config) | task | {"versions": versions()}, indent=2))

    def table(self, rows: list[dict[str, Any]]) -> None:
        """results.csv, a row for each epoch; no file where there is none."""
        if self.writes and not rows:
            (self.folder / "results.csv").unlink(missing_ok=True)
        elif self.writes:
            with whole_file(self.folder / "results.csv") as draft, open(draft, "w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[-1]))
                writer.writeheader()
                writer.writerows(rows)

    def evaluation(self, evaluation: Evaluation, truth: Truth, subset: bool) -> None:
        """metrics.json, predictions.json (and predictions_segm.json or predictions_keypoints.json) and
        ground_truth.json, unrounded.

        Args:
            evaluation: what was found.
            truth: of the split.
            subset: whether only a part of the split was evaluated; the metrics then go by other names.
        """
        if not self.writes:
            return
        name_of = "subset_" if subset else ""
        metrics: dict[str, Any] = {f"{name_of}{name}": value for name, value in evaluation.metrics.items()}
        metrics |= {"per_class": evaluation.per_class, "images": evaluation.images, "boxes": evaluation.boxes}
        sizes = truth.sizes_by_id(np.arange(len(truth)))
        for kind in evaluation.iou_types:
            self._write_list(KINDS[kind][2], evaluation.detections.results(kind, sizes))
        self.write("ground_truth.json", json.dumps(truth.dataset()))
        self.write("metrics.json", json.dumps(metrics, indent=2))

    def _write_list(self, name: str, entries: Iterable[dict[str, Any]]) -> None:
        """A JSON list, of which one entry is in memory at a time."""
        with whole_file(self.folder / name) as draft, open(draft, "w", encoding="utf-8") as file:
            before = "["
            for entry in entries:
                file.write(before + json.dumps(entry))
                before = ", "
            file.write("]" if before == ", " else "[]")

    def tide(self, tide: dict[str, float]) -> None:
        """Add AP50 lost by kind of error to metrics.json."""
        if self.writes:
            metrics = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
            self.write("metrics.json", json.dumps(metrics | {"tide": tide}, indent=2))


def epoch_row(
    state: TrainState, whole: Window, training: float, result: Evaluation | None, config: EvalConfig
) -> dict[str, Any]:
    """An epoch as a row of results.csv; its validation columns are None where it was not validated.

    Pictures and trackers find what they show by the beginning of a name: a loss is a pair of `train/` and `val/`, and
    `lr/` is a learning rate.

    Args:
        state: after the epoch.
        whole: what was measured in it.
        training: seconds of its training alone.
        result: of its validation.
        config: names the metrics.
    """
    losses, val = whole.means(), config.val_name
    row: dict[str, Any] = {
        "epoch": state.epoch + 1,
        "global_step": state.ema.updates,
        "seconds": round(state.seconds, 3),
    }
    row |= {"images_per_s": round(whole.images / training, 2)}
    row |= {"peak_memory_gb": round(max(whole.memory) / 1e9, 3)}
    row |= {f"train/{name}": value for name, value in losses.items()}
    row |= {f"{val}/{name}": result.losses[name] if result else None for name in losses}
    names = metric_names(config.max_dets, task_of(state.detector).iou_types)
    row |= {f"{val}/{name}": result.metrics[name] if result else None for name in names}
    return row | {f"lr/pg{i}": group["lr"] for i, group in enumerate(state.optimizer.param_groups)}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results may depend on."""
    found = {d.name.lower(): d.version for d in distributions() if d.name.lower() in PACKAGES}
    return found | {"python": platform.python_version()}
