"""One AP: for any number of processes, and bit for bit what pycocotools says of predictions.json."""

import csv
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.conftest import DETECT, VALIDATE, launch, succeed
from train.evaluation.coco import METRICS
from train.model.weights import load_detector


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The trained model, validated in bf16 (whose scores tie) on 1 and 2 processes; test_evaluate.py has more."""
    home, out = trained.parent.parent.parent, tmp_path_factory.mktemp("val")
    for ranks in (1, 2):
        options = ["--weights", trained / "weights" / "best.pt", "--save-dir", out / str(ranks), "--val-batch", 7]
        succeed(ranks, VALIDATE, *options, "--mixed-precision", "bf16", cwd=home)
    return {ranks: out / str(ranks) for ranks in (1, 2)}


def test_the_number_of_processes_changes_no_bit(evaluated: dict[int, Path]):
    for name in ("metrics.json", "predictions.json", "ground_truth.json"):
        assert len({(folder / name).read_bytes() for folder in evaluated.values()}) == 1


def test_pycocotools_says_the_same_of_the_files(evaluated: dict[int, Path]):
    folder = evaluated[2]
    truth = COCO(str(folder / "ground_truth.json"))
    result = COCOeval(truth, truth.loadRes(str(folder / "predictions.json")), "bbox")
    result.evaluate()
    result.accumulate()
    result.summarize()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert np.array_equal(result.stats, [metrics[name] for name in METRICS])


@pytest.fixture(scope="module")
def odd(trained: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two processes with validation of its own kind, from weights that have learnt something."""
    folder = tmp_path_factory.mktemp("odd")
    options = ["--model", trained / "weights" / "best.pt", "--data", shapes, "--imgsz", 160, "--epochs", 4]
    options += ["--batch", 8, "--nbs", 8, "--lr0", 1e-4, "--optimizer", "AdamW", "--warmup-epochs", 0]
    options += ["--val-interval", 3, "--val-batch", 5, "--val-precision", "bf16", "--no-rect", "--conf", 0.002]
    options += ["--max-dets", 1, 5, 50, "--patience", 99, "--trackers", "none", "--no-plots"]
    succeed(2, DETECT, *options, cwd=folder)
    return folder / "runs" / "detect" / "exp"


def test_validate_says_of_best_and_last_what_the_log_says(odd: Path, tmp_path: Path):
    with open(odd / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [name for name in rows[0] if name.startswith("val/") and not name.endswith("_loss")]
    best = max(
        (row for row in rows if row["val/AP"]), key=lambda r: 0.1 * float(r["val/AP50"]) + 0.9 * float(r["val/AP"])
    )
    for name, row in (("best", best), ("last", rows[-1])):
        options = ["--weights", odd / "weights" / f"{name}.pt", "--save-dir", tmp_path / name, "--no-plots"]
        succeed(1, VALIDATE, *options, cwd=tmp_path)
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert [metrics[key.removeprefix("val/")] for key in measured] == [float(row[key]) for key in measured]
    assert metrics["AP"] > 0.1
    assert "AR50" in metrics


def test_epochs_without_validation_leave_blanks(odd: Path):
    with open(odd / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["val/AP"]) for row in rows] == [False, False, True, True]  # every third, and the last
    assert [bool(row["val/box_loss"]) for row in rows] == [False, False, True, True]
    assert all(row["train/box_loss"] for row in rows)
    best, _ = load_detector(str(odd / "weights" / "best.pt"))
    assert load_detector(str(odd / "weights" / "best.pt"))[1]["epoch"] in (2, 3)
    assert best.names == {0: "circle", 1: "square", 2: "triangle"}


def test_validation_on_a_subset_goes_by_other_names_and_patience_counts_epochs(shapes: Path, tmp_path: Path):
    options = ["--data", shapes, "--imgsz", 64, "--epochs", 9, "--batch", 20, "--val-fraction", 0.5, "--lr0", 1e-9]
    options += ["--val-interval", 4, "--patience", 2, "--optimizer", "SGD", "--warmup-epochs", 0, "--trackers", "none"]
    console = succeed(2, DETECT, *options, "--no-plots", cwd=tmp_path)
    run = tmp_path / "runs" / "detect" / "exp"
    with open(run / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # epoch 2 may be the last by --patience and is validated; nothing gets better, so epoch 4 is
    assert [bool(row["val_subset/AP"]) for row in rows] == [False, True, False, True]
    assert not any(name.startswith("val/") for name in rows[0])
    assert "stopped: no better epoch than 2 for 2 epochs (--patience)" in console
    assert json.loads((run / "metrics.json").read_text())["images"] == 10
    assert "subset_AP" in json.loads((run / "metrics.json").read_text())
    assert "val_subset/AP" in load_detector(str(run / "weights" / "best.pt"))[1]["train_metrics"]


def test_no_label_at_all_is_said_in_words(trained: Path, shapes: Path, tmp_path: Path):
    (tmp_path / "images").mkdir()
    for file in sorted(shapes.parent.glob("images/val/*.jpg"))[:3]:
        (tmp_path / "images" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [circle, square, triangle]\n")
    options = ["--weights", trained / "weights" / "best.pt", "--data", "data.yaml", "--save-dir", "empty"]
    console = succeed(1, VALIDATE, *options, cwd=tmp_path)
    assert json.loads((tmp_path / "empty" / "metrics.json").read_text())["AP"] == -1
    assert "no labelled object" in console
    assert "3 of 3 classes do not occur here" in console


PICTURES = {"PR_curve.png", "F1_curve.png", "P_curve.png", "R_curve.png", "confusion_matrix_normalized.png"}
PICTURES |= {"tide.png", "val.jpg"}


def test_what_people_look_at(evaluated: dict[int, Path], trained: Path, tmp_path: Path):
    for folder in evaluated.values():
        assert {file.name for file in folder.iterdir()} >= PICTURES
        assert all(cv2.imread(str(folder / name)) is not None for name in PICTURES)
    options = ["--weights", trained / "weights" / "best.pt", "--save-dir", tmp_path / "out", "--no-plots"]
    options += ["--val-limit", 10, "--max-dets", 1, 5, 20]
    console = succeed(1, VALIDATE, *options, cwd=trained.parent.parent.parent)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json", "ground_truth.json", "logs", "metrics.json", "predictions.json", "status.json"
    }  # fmt: skip
    header = next(line for line in console.splitlines() if line.startswith("class"))
    assert header.split() == ["class", "images", "boxes", "P", "R", "F1", "AP50", "AP75", "AP"]
    for start in ("all", "circle", "square", "triangle", "AP small, medium, large", "AR at 1, 5, 20 detections"):
        assert any(line.startswith(start) for line in console.splitlines()), start
    assert re.search(r"AP 0\.\d+ on 10 images \(a subset\) of val", console)
    stages = r"slowest rank \(mean\): data .*, inference .*, postprocess .*, gather .*, metric "
    assert re.search(stages, console)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"subset_AP", "subset_AR5", "subset_F1", "per_class"} <= set(metrics)
    assert not {"AP", "AR5", "AR10", "subset_AR10"} & set(metrics)


def test_a_results_file_from_anywhere_needs_no_model(evaluated: dict[int, Path], trained: Path, tmp_path: Path):
    folder = evaluated[1]
    predictions = ["--predictions", folder / "predictions.json", "--no-plots"]
    home = trained.parent.parent.parent
    succeed(2, VALIDATE, *predictions, "--data", "shapes", "--save-dir", tmp_path / "a", cwd=home)
    succeed(1, VALIDATE, *predictions, "--annotations", folder / "ground_truth.json", "--save-dir", "b", cwd=tmp_path)
    expected = json.loads((folder / "metrics.json").read_text())
    del expected["tide"]
    assert json.loads((tmp_path / "a" / "metrics.json").read_text()) == expected
    assert json.loads((tmp_path / "b" / "metrics.json").read_text()) == expected
    assert (tmp_path / "a" / "predictions.json").read_bytes() == (folder / "predictions.json").read_bytes()


@pytest.mark.slow
def test_pictures_without_hotcoco(evaluated: dict[int, Path], tmp_path: Path):
    (tmp_path / "hotcoco.py").write_text("raise ImportError('not here')")
    folder = evaluated[1]
    options = ["--predictions", folder / "predictions.json", "--annotations", folder / "ground_truth.json"]
    options += ["--coco-eval", "pycocotools", "--save-dir", "out"]
    console = succeed(1, VALIDATE, *options, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "hotcoco is not installed: no confusion matrix, no TIDE errors" in console
    assert {"PR_curve.png", "val.jpg", "metrics.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    ours = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert ours["AP"] == json.loads((folder / "metrics.json").read_text())["AP"]


def test_a_checkpoint_of_other_classes_is_refused(trained: Path, shapes: Path, tmp_path: Path):
    (tmp_path / "data.yaml").write_text(
        f"path: {shapes.parent}\ntrain: images/train\nval: images/val\nnames: [a, b, c, d]\n"
    )
    done = launch(1, VALIDATE, "--weights", trained / "weights" / "best.pt", "--data", "data.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "knows 3 classes" in done.stderr
