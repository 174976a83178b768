"""Whole runs, as people start them."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
import torch

from tests.conftest import DETECT, ROOT, TINY, VALIDATE, launch, state_of, succeed
from train.data.shapes import draw_shapes
from train.evaluation.coco import METRICS
from train.processes.files import new_folder
from train.training.saves import states

QUICK = "--imgsz 64 --epochs 2 --batch 8 --nbs 16 --warmup-epochs 1 --log-interval 1 --workers 1"
BARE = [*QUICK.split(), "--model", TINY, "--no-plots"]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_losses_of_one_process_and_two_agree(runs, trained: Path):
    assert [row["global_step"] for row in rows(runs[1][0])] == [row["global_step"] for row in rows(runs[2][0])]
    home = trained.parent.parent.parent  # has the built-in shapes
    for ranks in (1, 2):
        options = "--imgsz 96 --epochs 1 --batch 32 --fraction 128 --trackers none --no-plots --val-limit 9 --mosaic 0"
        succeed(ranks, DETECT, *options.split(), "--name", f"epoch{ranks}", cwd=home)
    (one,), (two,) = (rows(home / "runs" / "detect" / f"epoch{ranks}") for ranks in (1, 2))
    for name in ("train/box_loss", "train/cls_loss", "train/dfl_loss"):
        # not the same: BatchNorm sees sixteen images instead of thirty-two
        assert float(two[name]) == pytest.approx(float(one[name]), rel=0.05)
    assert one["global_step"] == two["global_step"] == "2"  # of four batches: --nbs 64


@pytest.mark.slow
def test_gradients_in_bf16_are_nearly_those_in_fp32(runs, tmp_path: Path, shapes: Path):
    """The ranks' weights are the same, else their validation would say that they are not."""
    options = "--imgsz 64 --epochs 2 --batch 8 --nbs 8 --warmup-epochs 0 --workers 1 --trackers none --no-plots"
    given = ["--data", shapes, "--model", TINY, *options.split(), "--compress-gradients"]
    succeed(2, DETECT, *given, cwd=tmp_path)
    run, plain = tmp_path / "runs" / "detect" / "exp", runs[2][0]
    ours, theirs = (
        torch.cat([value.flatten() for name, value in state_of(folder)["model"].items() if name.endswith("weight")])
        for folder in (run, plain)
    )
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.003
    for row, other in zip(rows(run), rows(plain), strict=True):
        assert float(row["train/box_loss"]) == pytest.approx(float(other["train/box_loss"]), rel=1e-3)


def test_the_pictures_of_a_training(runs):
    for folder, _ in runs.values():
        for name in ("labels.png", "results.png", "train_batch0.jpg", "train_batch2.jpg", "val_batch.jpg", "val.jpg"):
            assert cv2.imread(str(folder / name)) is not None, name


def test_files_of_a_run(runs):
    for folder, _ in runs.values():
        config = json.loads((folder / "config.json").read_text())
        assert config["imgsz"] == 64
        kept = {file.name for file in (folder / "weights").iterdir()} - {"best_before.pt"}  # of the older state
        assert kept == {"best.pt", "last.pt", "state_10.pt", "state_5.pt"}
        metrics = json.loads((folder / "metrics.json").read_text())
        assert set(metrics) == {*METRICS, "P", "R", "F1", "per_class", "images", "boxes", "tide"}
        assert metrics["images"] == 21
        best = max(rows(folder), key=lambda row: 0.1 * float(row["val/AP50"]) + 0.9 * float(row["val/AP"]))
        assert metrics["AP"] == float(best["val/AP"])
        assert len(json.loads((folder / "ground_truth.json").read_text())["images"]) == 21
        assert [path.name for path in folder.rglob(".*")] == [".lock"]  # no half-written file


def test_a_new_folder_for_each_run(tmp_path: Path):
    assert [new_folder(tmp_path / "runs", "a").name for _ in range(3)] == ["a", "a2", "a3"]


def test_bad_input_is_one_message_and_nothing_is_written(tmp_path: Path, shapes: Path):
    done = launch(2, DETECT, "--data", shapes, "--imgsz", 100, "--epochs", 1, cwd=tmp_path)
    assert done.returncode == 1  # the launcher's own; one process ends with 2, see test_mistakes.py
    assert done.stderr.count("error: --imgsz is 100; it must be a multiple of the stride 32. The nearest is 96.") == 1
    assert 'detect.py", line' not in done.stderr  # no traceback of ours
    assert list(tmp_path.iterdir()) == []


def test_batches_that_do_not_divide(tmp_path: Path, shapes: Path):
    done = launch(2, DETECT, "--data", shapes, "--batch", 9, cwd=tmp_path)
    assert "--batch is 9; it must be divisible by the 2 processes, as 8 is." in done.stderr


def test_a_loss_that_is_not_finite_names_the_images_and_saves_nothing(tmp_path: Path, shapes: Path):
    done = launch(
        2, DETECT, "--data", shapes, *BARE, "--optimizer", "SGD", "--lr0", 1e30, "--warmup-epochs", 0,
        "--trackers", "none", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("error: The loss is no longer a finite number") == 1
    assert re.search(r"images/train/\d{6}\.jpg", done.stderr)
    assert list((tmp_path / "runs" / "detect" / "exp" / "weights").iterdir()) == []


@pytest.mark.slow  # as those of more models in tests/training/test_saves.py
def test_a_killed_run_resumes_and_ends_with_the_weights_it_would_have_had(tmp_path: Path, shapes: Path):
    recipe = [
        "--data",
        shapes,
        *QUICK.split(),
        "--no-plots",
        "--epochs",
        4,
        "--optimizer",
        "AdamW",
        "--lr0",
        0.001,
        "--trackers",
        "none",
    ]
    succeed(1, DETECT, *recipe, "--name", "whole", cwd=tmp_path)
    whole, killed = (tmp_path / "runs" / "detect" / name for name in ("whole", "killed"))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(DETECT), *map(str, recipe), "--name", "killed"], cwd=tmp_path, env=environment
    )
    try:
        while not states(killed / "weights"):
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert state_of(killed)["epoch"] < 3
    console = succeed(1, DETECT, "--resume", killed, cwd=tmp_path)
    assert ", resumed after " in console
    a, b = (state_of(run) for run in (whole, killed))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    assert a["updates"] == b["updates"]
    assert [row["train/box_loss"] for row in rows(whole)] == [row["train/box_loss"] for row in rows(killed)]
    assert (whole / "metrics.json").read_bytes() == (killed / "metrics.json").read_bytes()


@pytest.mark.slow
def test_a_run_of_an_older_commit_validates_and_resumes_with_more_epochs_and_processes(tmp_path: Path):
    kept, folder = ROOT / "tests" / "fixtures" / "run", tmp_path / "runs" / "detect" / "exp"
    shutil.copytree(kept, folder)  # trained on one process, at the last commit before the house was rebuilt
    data = draw_shapes(tmp_path, {"train": 40, "val": 21})
    best = folder / "weights" / "best.pt"
    succeed(1, VALIDATE, "--weights", best, "--data", data, "--save-dir", tmp_path / "val", "--no-plots", cwd=tmp_path)
    then, now = (json.loads((place / "metrics.json").read_text()) for place in (kept, tmp_path / "val"))
    assert now["AP"] == pytest.approx(then["AP"], abs=1e-3)
    assert (now["images"], now["boxes"], list(now["per_class"])) == (21, 57, ["circle", "square", "triangle"])
    console = succeed(2, DETECT, "--resume", "runs/detect/exp", "--epochs", 62, cwd=tmp_path)
    assert "tiny.yaml, resumed after epoch 60" in console
    assert state_of(folder)["measure"] == "0.1 AP50 + 0.9 AP"  # of the best epoch, as it began
    before, after = rows(kept), rows(folder)
    assert after[:60] == before
    assert [row["epoch"] for row in after[60:]] == ["61", "62"]
    for row in after[60:]:
        for name in ("train/cls_loss", "train/dfl_loss"):  # a third lower than in the first epoch
            assert float(row[name]) == pytest.approx(float(before[-1][name]), rel=0.15)


@pytest.mark.slow
def test_own_code_and_an_own_loss_run_on_every_process(tmp_path: Path, shapes: Path):
    shutil.copytree(ROOT / "train", tmp_path / "train", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    share = 'print(f"share {len(batch[\'img\'])}; ", end="")'  # one write, so that the ranks' words stay apart
    own = "terms = nn.functional.pad(terms, (0, 1), value=0.25 * len(preds['boxes']))"
    own += "; items = items | {'own_loss': terms.new_tensor(0.25)}"
    for file, place, code in (
        ("detect.py", "        # Your own code for a batch goes here.", share),
        ("detect.py", "        # Your own code for an epoch goes here.", "report.say(f'own {result.images}')"),
        (
            "model/loss.py",
            "        self.sum_over_ranks, self.ranks = sum_over_ranks, ranks",
            "self.loss_names += ('own_loss',)",
        ),
        ("model/loss.py", "        if self.sum_over_ranks is None:", own),
    ):
        text = (tmp_path / "train" / file).read_text()
        assert text.count(place) == 1
        (tmp_path / "train" / file).write_text(text.replace(place, f"        {code}\n{place}"))
    options = ["--data", shapes, *QUICK.split(), "--model", TINY, "--epochs", 1, "--trackers", "none"]
    console = succeed(2, tmp_path / "train" / "detect.py", *options, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert console.count("share 4; ") == 2 * 5  # ranks, batches
    assert console.count("own 21\n") == 1
    (row,) = rows(tmp_path / "runs" / "detect" / "exp")
    assert (float(row["train/own_loss"]), float(row["val/own_loss"])) == (0.25, 0.25)
    assert "own 0.25" in console
    assert cv2.imread(str(tmp_path / "runs" / "detect" / "exp" / "results.png")) is not None


def test_time_is_kept_to(tmp_path: Path, shapes: Path):
    console = succeed(2, DETECT, "--data", shapes, *BARE, "--time", 1e-6, "--trackers", "none", cwd=tmp_path)
    assert "plan: 1 epochs of 0:00:0" in console
    assert "in 1e-06 hours (--time); the learning rate ends there" in console
    assert len(rows(tmp_path / "runs" / "detect" / "exp")) == 1


ULTRALYTICS = """
import sys
sys.modules["train"] = None  # importing it fails
import numpy
from ultralytics import YOLO
best, data, image = sys.argv[1:]
model = YOLO(best)
assert len(model.predict(image, imgsz=160, conf=0.05, verbose=False)[0].boxes)
print("map50", model.val(data=data, imgsz=160, plots=False, verbose=False, workers=0).box.map50)
exported = YOLO(model.export(format="torchscript", imgsz=160), task="detect")
assert len(exported.predict(image, imgsz=160, conf=0.05, verbose=False)[0].boxes)
"""


def test_ultralytics_loads_predicts_validates_and_exports_best(trained: Path, tmp_path: Path):
    data = trained.parent.parent.parent / "datasets" / "shapes" / "shapes.yaml"
    image = next(data.parent.glob("images/val/*.jpg"))
    done = subprocess.run(
        [sys.executable, "-c", ULTRALYTICS, str(trained / "weights" / "best.pt"), str(data), str(image)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"ULTRALYTICS_SAFE_LOAD": "1", "YOLO_CONFIG_DIR": str(tmp_path), "YOLO_AUTOINSTALL": "0"},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    theirs = float(re.search(r"map50 (\S+)", done.stdout)[1])
    ours = json.loads((trained / "metrics.json").read_text())["AP50"]
    assert theirs == pytest.approx(ours, abs=0.03)  # their AP interpolates otherwise
