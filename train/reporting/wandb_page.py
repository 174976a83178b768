"""The page of a run on Weights & Biases: charts, tables, images with boxes, model versions."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import wandb
from wandb.plot import CustomChart

from train.config.words import printable
from train.evaluation.coco import COLUMNS, MEASURED
from train.evaluation.detections import prefix
from train.evaluation.evaluate import Evaluation
from train.evaluation.truth import Truth
from train.reporting.plots import CONFIDENCE, Mark, marks_on, same_images, small_picture, with_keypoints
from train.training.state import TrainState


def charts(rows: list[dict[str, Any]], val: str) -> dict[str, Any]:
    """Train and validation loss in one chart for each loss."""
    shown = {}
    for name in (key.removeprefix("train/") for key in rows[0] if key.startswith("train/")):
        measured = [row for row in rows if row[f"{val}/{name}"] is not None]
        xs = [[row["epoch"] for row in rows], [row["epoch"] for row in measured]]
        ys = [[row[f"train/{name}"] for row in rows], [row[f"{val}/{name}"] for row in measured]]
        shown[f"losses/{name}"] = wandb.plot.line_series(xs, ys, keys=["train", val], title=name, xname="epoch")
    return shown


def tables(result: Evaluation, truth: Truth, val: str, diagnosis: dict[str, Any] | None) -> dict[str, Any]:
    """AP by class, precision-recall curves, the confusion matrix, and images with truth and detections as boxes.

    Args:
        result: of the validation.
        truth: of the split.
        val: what the metrics are filed under.
        diagnosis: what `diagnose` returned.
    """
    columns = [*COLUMNS, *(prefix(kind) + name for kind in result.iou_types[1:] for name in MEASURED)]
    by_class = [[name, *(values[c] for c in columns)] for name, values in result.per_class.items()]
    shown: dict[str, Any] = {f"{val}/per_class": wandb.Table(columns=["class", *columns], data=by_class)}
    by_id = truth.names
    for kind, curves in result.curves.items():
        names = [by_id[id_] for id_ in curves.category_ids]
        points = [
            [name, round(i / 20, 2), float(precision[i * 5])]
            for name, precision in zip(names, curves.pr, strict=True)
            for i in range(21)
            if precision[0] >= 0
        ]
        what = f"{prefix(kind).rstrip('/')} precision-recall at {'OKS' if kind == 'keypoints' else 'IoU'} 0.50".strip()
        shown[f"{val}/{prefix(kind)}PR_curve"] = wandb.plot_table(
            "wandb/area-under-curve/v0", wandb.Table(columns=["class", "recall", "precision"], data=points),
            {"x": "recall", "y": "precision", "class": "class"},
            {"title": what[0].upper() + what[1:], "x-axis-title": "Recall", "y-axis-title": "Precision"},
        )  # fmt: skip
    if diagnosis:
        labels = [*names, "background"]
        counts = [
            [labels[i], labels[j], int(count)] for (i, j), count in np.ndenumerate(diagnosis["confusion"]) if count
        ]
        shown[f"{val}/confusion_matrix"] = wandb.plot_table(
            "wandb/confusion_matrix/v1", wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=counts),
            {"Actual": "Actual", "Predicted": "Predicted", "nPredictions": "nPredictions"},
            {"title": f"Confusion at confidence {CONFIDENCE}"},
        )  # fmt: skip
    pictures = []
    for place in same_images(truth):
        image, file = truth.size_of(place), truth.file(place)
        marks, found = marks_on(place, truth, result.detections)
        both = (("truth", marks), ("detections", found))
        boxes = {
            kind: {"box_data": [_wandb_box(mark, image, by_id) for mark in some], "class_labels": by_id}
            for kind, some in both
        }
        picture = small_picture(file)
        if picture is not None:
            masked = result.detections.masks is not None
            masks = {kind: _wandb_mask(some, picture, by_id) for kind, some in both} if masked else None
            picture = with_keypoints(picture, found, picture.shape[0] / image["height"])
            caption = f"{printable(Path(file).name)}: {len(marks)} boxes, {len(found)} detections"
            pictures.append(wandb.Image(picture, boxes=boxes, masks=masks, caption=caption, file_type="jpg"))
    shown[f"{val}/examples"] = pictures  # a panel with a slider over the epochs
    return shown


def as_files(run: Any, shown: dict[str, Any], step: int) -> dict[str, Any]:
    """What is shown, its tables bound to the run: a bound table is a file of the run, which may be copied with it.

    Of a table that is not bound W&B makes an artifact, too, whose files the run names by absolute paths.
    """
    for key, value in shown.items():
        if isinstance(value, wandb.Table):
            value.bind_to_run(run, key, step)
        elif isinstance(value, CustomChart):
            value.set_key(key)
            value.table.bind_to_run(run, value.spec.table_key, step)
    return shown


def _wandb_mask(marks: list[Mark], picture: np.ndarray, names: dict[int, str]) -> dict[str, Any]:
    """Masks as W&B has them: a class for each pixel, of one picture; 0 is background. It takes classes up to 255, so of
    more those alone are named that are in the picture.
    """
    here = {mark.category for mark in marks}
    names = names if len(names) < 256 else {id_: name for id_, name in names.items() if id_ in here}
    classes = {id_: min(number, 255) for number, id_ in enumerate(names, 1)}
    data = np.zeros(picture.shape[:2], np.uint8)
    for mark in sorted(marks, key=lambda mark: -1 if mark.mask is None else -int(mark.mask.sum())):
        if mark.mask is not None:  # the smaller lie over the larger
            data[cv2.resize(mark.mask, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0] = classes[
                mark.category
            ]
    return {"mask_data": data, "class_labels": {0: "background"} | {classes[id_]: name for id_, name in names.items()}}


def _wandb_box(mark: Mark, image: dict, names: dict[int, str]) -> dict[str, Any]:
    """A box (ltwh in the image's pixels) as W&B has it: corners as shares of the image."""
    (x, y, w, h), category, score = mark.box, mark.category, mark.score
    across, down = image["width"], image["height"]
    position = {"minX": x / across, "maxX": (x + w) / across, "minY": y / down, "maxY": (y + h) / down}
    box: dict[str, Any] = {"position": position, "class_id": category, "box_caption": names[category]}
    if score is not None:
        box |= {"scores": {"score": score}, "box_caption": f"{names[category]} {score:.2f}"}
    return box


def first_pictures(folder: Path) -> dict[str, Any]:
    """The labels and the first training batches."""
    batches = [wandb.Image(str(file)) for file in sorted(folder.glob("train_batch*.jpg"))]
    shown: dict[str, Any] = {"train/batches": batches} if batches else {}
    if (folder / "labels.png").exists():
        shown["train/labels"] = wandb.Image(str(folder / "labels.png"))
    return shown


def log_model(run: Any, weights: Path, state: TrainState) -> None:
    """best.pt and last.pt as versions of one model artifact, whose paths start in the working directory if they can."""
    for name, epoch in (("last", state.epoch + 1), ("best", state.best_epoch + 1)):
        metadata = {"epoch": epoch} | ({"AP": state.best_ap} if name == "best" else {"AP": state.last_ap})
        artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=metadata)
        file = (weights / f"{name}.pt").resolve()
        if file.is_relative_to(Path.cwd()):  # so that a copy of the folder is whole wherever it lies
            file = file.relative_to(Path.cwd())
        artifact.add_file(str(file), policy="immutable", skip_cache=True)  # the file itself, no copy
        run.log_artifact(artifact, aliases=[name, f"epoch-{epoch}"])
