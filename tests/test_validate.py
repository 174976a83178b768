"""One AP: for any number of processes, and bit for bit what pycocotools says of predictions.json."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.conftest import VALIDATE, launch, succeed
from train.coco import METRICS


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The trained model, validated in bf16 (whose scores tie) on 1, 2 and 3 processes."""
    home, out = trained.parent.parent.parent, tmp_path_factory.mktemp("val")
    for ranks in (1, 2, 3):
        options = ["--weights", trained / "weights" / "best.pt", "--save-dir", out / str(ranks), "--val-batch", 7]
        succeed(ranks, VALIDATE, *options, "--mixed-precision", "bf16", cwd=home)
    return {ranks: out / str(ranks) for ranks in (1, 2, 3)}


def test_the_model_is_worth_comparing(evaluated: dict[int, Path]):
    metrics = json.loads((evaluated[1] / "metrics.json").read_text())
    assert 0.2 < metrics["AP"] < 0.9
    assert metrics["images"] >= 200
    detections = json.loads((evaluated[1] / "predictions.json").read_text())
    scores = {}
    for detection in detections:
        scores.setdefault((detection["image_id"], detection["category_id"]), []).append(detection["score"])
    tied = sum(len(values) - len(set(values)) for values in scores.values())
    assert tied > 100


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


def test_pycocotools_as_the_evaluator(evaluated: dict[int, Path], trained: Path, tmp_path: Path):
    options = ["--weights", trained / "weights" / "best.pt", "--save-dir", tmp_path, "--coco-eval", "pycocotools"]
    console = succeed(
        2, VALIDATE, *options, "--mixed-precision", "bf16", "--val-batch", 7, cwd=trained.parent.parent.parent
    )
    assert (tmp_path / "metrics.json").read_bytes() == (evaluated[1] / "metrics.json").read_bytes()
    assert "circle" in console


def test_the_ap_in_training_is_the_ap_of_best_pt(trained: Path, tmp_path: Path):
    options = ["--weights", trained / "weights" / "best.pt", "--save-dir", tmp_path, "--channels-last"]
    succeed(1, VALIDATE, *options, "--mixed-precision", "auto", cwd=trained.parent.parent.parent, OMP_NUM_THREADS="2")
    for name in ("metrics.json", "predictions.json"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


def test_more_processes_than_images(trained: Path, shapes: Path, tmp_path: Path):
    one = sorted(shapes.parent.glob("images/val/*.jpg"))[:1]
    (tmp_path / "one.txt").write_text(f"{one[0]}\n")
    (tmp_path / "data.yaml").write_text("train: one.txt\nval: one.txt\nnames: [circle, square, triangle]\n")
    for ranks in (1, 2):
        options = ["--weights", trained / "weights" / "best.pt", "--data", "data.yaml", "--save-dir", str(ranks)]
        succeed(ranks, VALIDATE, *options, cwd=tmp_path)
    assert (tmp_path / "1" / "metrics.json").read_bytes() == (tmp_path / "2" / "metrics.json").read_bytes()


def test_no_detection_at_all_and_no_label_at_all(trained: Path, shapes: Path, tmp_path: Path):
    options = ["--weights", trained / "weights" / "best.pt", "--data", shapes, "--save-dir", tmp_path / "none"]
    succeed(2, VALIDATE, *options, "--conf", 1.0, cwd=tmp_path)
    assert json.loads((tmp_path / "none" / "predictions.json").read_text()) == []
    assert json.loads((tmp_path / "none" / "metrics.json").read_text())["AP"] == 0
    (tmp_path / "images").mkdir()
    for file in sorted(shapes.parent.glob("images/val/*.jpg"))[:3]:
        (tmp_path / "images" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [circle, square, triangle]\n")
    options = ["--weights", trained / "weights" / "best.pt", "--data", "data.yaml", "--save-dir", "empty"]
    console = succeed(2, VALIDATE, *options, cwd=tmp_path)
    assert json.loads((tmp_path / "empty" / "metrics.json").read_text())["AP"] == -1
    assert "no labelled object" in console


def test_a_checkpoint_of_other_classes_is_refused(trained: Path, shapes: Path, tmp_path: Path):
    (tmp_path / "data.yaml").write_text(
        f"path: {shapes.parent}\ntrain: images/train\nval: images/val\nnames: [a, b, c, d]\n"
    )
    done = launch(1, VALIDATE, "--weights", trained / "weights" / "best.pt", "--data", "data.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "knows 3 classes" in done.stderr
