"""train/segment.py and train/pose.py as people use them, on one and two processes."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from ultralytics import YOLO

from tests.conftest import DETECT, POSE, ROOT, SEGMENT, TINY, VALIDATE, launch, state_of, succeed
from tests.processes.test_machines import both, well
from tests.reporting.wandb_file import read
from tests.soak import contents, differing
from train.model.tasks import TASKS
from train.model.weights import load_detector

SCRIPTS = {"segment": SEGMENT, "pose": POSE}
MODELS = {
    task: ROOT / "tests" / "fixtures" / f"tiny-{kind}.yaml" for task, kind in (("segment", "seg"), ("pose", "pose"))
}
BEFORE = {"segment": "mask/", "pose": "pose/"}
FILES = {"segment": "predictions_segm.json", "pose": "predictions_keypoints.json"}
OPTIONS = "--imgsz 64 --batch 8 --nbs 8 --warmup-epochs 0 --optimizer AdamW --lr0 0.01 --workers 1"
NONE = ["--trackers", "none"]


@pytest.fixture(scope="module", params=["segment", pytest.param("pose", marks=pytest.mark.slow)])
def run(request, drawn: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """The task, the folder of a run of two epochs on two processes, and its console."""
    task, home = request.param, tmp_path_factory.mktemp(request.param)
    options = ["--data", drawn[task], "--model", MODELS[task], *OPTIONS.split(), "--epochs", 2, "--conf", 0.0001]
    console = succeed(2, SCRIPTS[task], *options, cwd=home)
    return task, home / "runs" / task / "exp", console


def test_a_run_leaves_what_a_detectors_leaves_and_more(run: tuple[str, Path, str]):
    task, folder, console = run
    before, word = BEFORE[task], BEFORE[task].replace("/", " ")
    said = json.loads((folder / "metrics.json").read_text())
    assert 0 <= said[f"{before}AP"] <= said[f"{before}AP50"] <= 1
    assert {f"{before}AP", f"{before}P", f"{before}F1"} <= said["per_class"]["circle"].keys()
    assert f"AP {said['AP']:.4f}, {word}AP {said[f'{before}AP']:.4f} on 21 images of val" in console
    assert f"class {word.strip()}" in console
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [float(row[f"val/{before}AP50"]) >= 0 for row in rows] == [True, True]
    terms = {"segment": ("seg_loss", "sem_loss"), "pose": ("pose_loss", "kobj_loss")}[task]
    assert all(f"{split}/{term}" in rows[0] for term in terms for split in ("train", "val"))
    coco = COCO(str(folder / "ground_truth.json"))
    results = json.loads((folder / FILES[task]).read_text())
    assert results
    assert all("bbox" not in one for one in results)  # else their areas would be the boxes'
    assert len(coco.loadRes(str(folder / FILES[task])).anns) == len(results)
    pictures = {"train_batch0.jpg", "labels.png", "results.png", "val.jpg", "val_batch.jpg", "tide.png"}
    pictures |= {f"{start}{name}_curve.png" for start in ("", before.replace("/", "_")) for name in ("PR", "F1")}
    assert pictures <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["task"] == task


def test_its_page_on_wandb(run: tuple[str, Path, str]):
    task, folder, _ = run
    (kept,) = (folder / "wandb").glob("offline-run-*")
    last = [row for row in read(kept)["history"] if "val/AP" in row][-1]
    assert {
        f"val/{BEFORE[task]}AP",
        f"val/{BEFORE[task]}F1",
        f"train/{task[:3] if task == 'segment' else task}_loss",
    } <= set(last)
    table = json.loads((kept / "files" / last["val/per_class"]["path"]).read_text())
    assert f"{BEFORE[task]}AP50" in table["columns"]
    assert len(table["data"][0]) == len(table["columns"])
    if task == "segment":
        masks = last["val/examples"]["all_masks"]
        assert len(masks) == 12
        assert {"truth", "detections"} == set(masks[0])
        shown = cv2.imread(str(kept / "files" / masks[0]["truth"]["path"]), cv2.IMREAD_UNCHANGED)
        assert set(np.unique(shown)) <= {0, 1, 2, 3}
        assert shown.any()


@pytest.mark.slow
def test_it_goes_on_and_its_best_epoch_is_of_both_measures(run: tuple[str, Path, str], tmp_path: Path):
    task, folder, _ = run
    succeed(1, SCRIPTS[task], "--resume", folder, "--epochs", 3, "--project", tmp_path, cwd=tmp_path)
    gone_on = tmp_path / "exp"
    rows = list(csv.DictReader((gone_on / "results.csv").open()))
    assert len(rows) == 3
    fitness = [float(row["val/AP"]) + float(row[f"val/{BEFORE[task]}AP"]) for row in rows]
    state = state_of(gone_on)
    assert state["best_fitness"] == pytest.approx(max(fitness))
    assert state["best_epoch"] == fitness.index(max(fitness))
    assert state["measure"] == "AP"


def test_validate_takes_the_task_from_the_checkpoint(run: tuple[str, Path, str], tmp_path: Path):
    task, folder, _ = run
    best, trained = folder / "weights" / "best.pt", json.loads((folder / "metrics.json").read_text())
    succeed(2, VALIDATE, "--weights", best, "--workers", 0, cwd=tmp_path)
    place = tmp_path / "runs" / task / "val"
    measured = json.loads((place / "metrics.json").read_text())
    assert {name: measured[name] for name in trained} == trained
    assert (place / FILES[task]).read_bytes() == (folder / FILES[task]).read_bytes()
    files = ["--predictions", folder / FILES[task], "--annotations", folder / "ground_truth.json"]
    succeed(1, VALIDATE, *files, "--save-dir", tmp_path / "of_file", "--no-plots", cwd=tmp_path)
    alone = json.loads((tmp_path / "of_file" / "metrics.json").read_text())
    assert alone[f"{BEFORE[task]}AP"] == trained[f"{BEFORE[task]}AP"]
    assert "AP" not in alone  # there are no boxes in it


def used(weights: Path, task: str, data: Path) -> None:
    """Load a checkpoint into Ultralytics, predict, validate, export, and predict with what was exported."""
    model, image = YOLO(weights), data.parent / "images" / "val" / "000000.jpg"
    assert model.task == task
    part = {"segment": "masks", "pose": "keypoints"}[task]
    (found,) = model.predict(image, conf=0.0001, imgsz=64, verbose=False)
    assert len(found.boxes) == len(getattr(found, part)) > 0
    theirs = model.val(data=str(data), imgsz=64, plots=False, verbose=False, workers=0)
    assert 0 <= (theirs.seg if task == "segment" else theirs.pose).map50 <= 1
    exported = YOLO(model.export(format="torchscript", imgsz=64, verbose=False), task=task)
    (found,) = exported.predict(image, conf=0.0001, imgsz=64, verbose=False)
    assert len(found.boxes) == len(getattr(found, part)) > 0


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_ultralytics_loads_predicts_validates_and_exports(
    run: tuple[str, Path, str], drawn: dict[str, Path], tmp_path: Path, monkeypatch, name: str
):
    task, folder, _ = run
    monkeypatch.chdir(tmp_path)
    used(folder / "weights" / name, task, drawn[task])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["yolo11n", "yolo26n"])
@pytest.mark.parametrize("task", ["segment", "pose"])
def test_so_it_does_with_other_versions(task: str, family: str, drawn: dict[str, Path], tmp_path: Path, monkeypatch):
    model = f"{family}-{'seg' if task == 'segment' else 'pose'}.yaml"
    options = ["--data", drawn[task], "--model", model, *SMALL.split(), "--epochs", 1, "--lr0", 0.0001]
    succeed(1, SCRIPTS[task], *options, "--fraction", 12, "--val-limit", 4, cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("best.pt", "last.pt"):
        used(tmp_path / "runs" / task / "exp" / "weights" / name, task, drawn[task])


def of_others(task: str, yaml: Path, folder: Path) -> Path:
    """The YAML of the same images with two other classes, and of their keypoints without the last."""
    shutil.copytree(yaml.parent, folder)
    for file in (folder / "labels").rglob("*.txt"):
        rows = [row.split() for row in file.read_text().splitlines()]
        rows = [[str(min(int(row[0]), 1)), *(row[1:] if task == "segment" else row[1:14])] for row in rows]
        file.write_text("".join(" ".join(row) + "\n" for row in rows))
    about = "names: [round, pointed]\n" + ("kpt_shape: [3, 3]\n" if task == "pose" else "")
    (folder / "others.yaml").write_text(f"path: {folder}\ntrain: images/train\nval: images/val\n{about}")
    return folder / "others.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("other", [False, True])
def test_a_training_begins_with_what_fits_of_a_checkpoint(
    run: tuple[str, Path, str], drawn: dict[str, Path], tmp_path: Path, other: bool
):
    """Its rate is 0, so that it ends with what it has begun with."""
    task, folder, _ = run
    yaml = of_others(task, drawn[task], tmp_path / "others") if other else drawn[task]
    options = ["--data", yaml, "--model", folder / "weights" / "best.pt", *SMALL.split(), "--epochs", 1, "--lr0", 0]
    console = succeed(2, SCRIPTS[task], *options, cwd=tmp_path)
    said = re.search(r"model      (\d+) of (\d+) tensors from \S+best\.pt; ", console)
    assert said is not None, console
    assert (int(said[1]) < int(said[2])) == other
    given, _ = load_detector(str(folder / "weights" / "best.pt"))
    ended, _ = load_detector(str(tmp_path / "runs" / task / "exp" / "weights" / "last.pt"), task=TASKS[task])
    theirs = dict(given.named_parameters())
    fits = [name for name, value in ended.named_parameters() if value.shape == theirs[name].shape]
    assert (len(fits) < len(theirs)) == other
    mine = dict(ended.named_parameters())
    assert all(torch.allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-7) for name in fits)
    assert [*ended.names.values()] == (["round", "pointed"] if other else ["circle", "square", "triangle"])
    assert task == "segment" or [*ended.model[-1].kpt_shape] == ([3, 3] if other else [4, 3])


def test_what_is_of_another_task_names_the_right_script(
    run: tuple[str, Path, str], drawn: dict[str, Path], tmp_path: Path
):
    task, folder, _ = run
    best = folder / "weights" / "best.pt"
    other = {"segment": "pose", "pose": "segment"}[task]
    wrong_data = {
        "segment": r"no train image has a usable label\. First of \d+ faults: \S+: boxes, without polygons; train/det",
        "pose": r"shapes.yaml names no kpt_shape, .* train/detect.py",
    }[task]
    cases: list[tuple[Path, list[object], str]] = [
        (
            DETECT,
            ["--data", drawn["detect"], "--model", best],
            rf"ends in a \w+ head, .*; train/{task}\.py trains that",
        ),
        (SCRIPTS[other], ["--resume", folder], rf"config\.json is of the task '{task}'; train/{task}\.py trains that"),
        (SCRIPTS[task], ["--data", drawn["detect"], "--model", MODELS[task]], wrong_data),
        (SCRIPTS[task], ["--model", TINY], r"tiny\.yaml ends in a Detect head, of a detect model; train/detect\.py"),
    ]
    lines = []
    for script, options, _ in cases:
        more = [] if "--resume" in options else [*OPTIONS.split(), *NONE]
        lines.append(json.dumps([str(script), *map(str, [*options, *more])]))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "workers" / "mistakes.py"], input="\n".join(lines), cwd=tmp_path,
        capture_output=True, text=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, timeout=120,
    )  # fmt: skip
    for (_, _, message), said in zip(cases, map(json.loads, done.stdout.splitlines()), strict=True):
        assert said["code"] == 2, said
        assert re.search(message, said["err"]), said["err"]
        assert "Traceback" not in said["err"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("task", ["segment", pytest.param("pose", marks=pytest.mark.slow)])
def test_detect_serves_the_boxes_of_the_other_sets(task: str, drawn: dict[str, Path], tmp_path: Path):
    options = ["--data", drawn[task], "--model", TINY, *OPTIONS.split(), *NONE, "--epochs", 1, "--no-plots"]
    assert "AP " in succeed(1, DETECT, *options, cwd=tmp_path)
    truth = json.loads((tmp_path / "runs" / "detect" / "exp" / "ground_truth.json").read_text())
    assert not {"segmentation", "keypoints"} & truth["annotations"][0].keys()


@pytest.mark.slow
@pytest.mark.parametrize("scale", "nsmlx")
@pytest.mark.parametrize("family", ["yolov8", "yolo11", "yolo26"])
@pytest.mark.parametrize("task", ["segment", "pose"])
def test_every_scale_is_built(task: str, family: str, scale: str):
    from train.config.objects import Objects
    from train.config.task_options import PoseConfig, SegmentConfig
    from train.model.build import build_model
    from train.model.tasks import with_sigmas

    name = f"{family}{scale}-{'seg' if task == 'segment' else 'pose'}.yaml"
    objects = Objects(names={0: "a"}, keypoints=(17, 3) if task == "pose" else ())
    config = with_sigmas((SegmentConfig if task == "segment" else PoseConfig)(model=name), TASKS[task], objects)
    model, origin = build_model(config, name, objects)
    assert isinstance(model, TASKS[task].model)
    assert origin == f"{name} from scratch"


def test_the_sigmas_are_one_for_loss_and_metric(drawn: dict[str, Path], tmp_path: Path):
    options = ["--data", drawn["pose"], "--model", MODELS["pose"], *OPTIONS.split(), *NONE, "--epochs", 1, "--no-plots"]
    succeed(1, POSE, *options, "--sigmas", 0.1, 0.2, 0.1, 0.2, cwd=tmp_path)
    best = tmp_path / "runs" / "pose" / "exp" / "weights" / "best.pt"
    model, kept = load_detector(str(best))
    assert model.kpt_oks_sigmas == [0.1, 0.2, 0.1, 0.2]
    assert [*kept["config"]["sigmas"]] == [0.1, 0.2, 0.1, 0.2]
    model.criterion = model.init_criterion() if hasattr(model, "criterion") else None
    assert torch.allclose(model.init_criterion().keypoint_loss.sigmas, torch.tensor([0.1, 0.2, 0.1, 0.2]))
    done = launch(1, POSE, *options, "--sigmas", 0.1, 0.2, cwd=tmp_path)
    assert done.returncode == 2
    assert "--sigmas is [0.1, 0.2]; it must be 4 numbers above 0" in done.stderr


@pytest.mark.slow
def test_keypoints_of_two_dimensions(drawn: dict[str, Path], tmp_path: Path):
    shutil.copytree(drawn["pose"].parent, tmp_path / "flat")
    for file in (tmp_path / "flat" / "labels").rglob("*.txt"):
        rows = [row.split() for row in file.read_text().splitlines()]
        flat = [[*row[:5], *(value for i, value in enumerate(row[5:]) if i % 3 < 2)] for row in rows]
        for row in flat[:1]:
            row[-2:] = ["-1", "-1"]  # is not there
        file.write_text("".join(" ".join(row) + "\n" for row in flat))
    yaml = tmp_path / "flat" / "flat.yaml"
    yaml.write_text(drawn["pose"].read_text().replace("[4, 3]", "[4, 2]").replace("flip_idx: [0, 3, 2, 1]\n", ""))
    options = ["--data", yaml, "--model", MODELS["pose"], *OPTIONS.split(), *NONE, "--epochs", 1, "--conf", 0.0001]
    console = succeed(2, POSE, *options, cwd=tmp_path)
    assert "names no flip_idx, so images are not flipped (--fliplr, --flipud)" in console
    folder = tmp_path / "runs" / "pose" / "exp"
    truth = json.loads((folder / "ground_truth.json").read_text())["annotations"]
    assert {one["num_keypoints"] for one in truth} == {3, 4}
    assert {value for one in truth for value in one["keypoints"][2::3]} == {0, 2}
    found = json.loads((folder / FILES["pose"]).read_text())
    assert {value for one in found for value in one["keypoints"][2::3]} == {1}
    assert len(COCO(str(folder / "ground_truth.json")).loadRes(str(folder / FILES["pose"])).anns) == len(found) > 0


# What is proven for boxes, for masks and keypoints --------------------------------------------------------------------
SMALL = "--imgsz 64 --batch 6 --nbs 12 --warmup-epochs 0 --optimizer SGD --workers 0 --trackers none --no-plots"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "model", "ranks"), [("segment", "yolo26n-seg.yaml", 2), ("pose", "yolo26n-pose.yaml", 3), ("pose", "", 1)]
)
def test_killed_within_an_epoch_it_ends_with_the_bits_it_would_have_had(
    task: str, model: str, ranks: int, drawn: dict[str, Path], tmp_path: Path
):
    options = ["--data", drawn[task], "--model", model or MODELS[task], *SMALL.split(), "--epochs", 3]
    options += ["--close-mosaic", 1, "--save-interval", 2, "--resume", "auto"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    succeed(ranks, SCRIPTS[task], *options, cwd=tmp_path / "whole")
    killed = ROOT / "tests" / "workers" / "killed.py"
    for place in ("kill:step::6", "kill:validation::2"):
        done = launch(ranks, killed, place, *options, cwd=tmp_path / "killed", SCRIPT=str(SCRIPTS[task]))
        assert done.returncode != 0
    console = succeed(ranks, SCRIPTS[task], *options, cwd=tmp_path / "killed")
    assert "resumed after" in console
    whole, again = (contents(tmp_path / name / "runs" / task / "exp") for name in ("whole", "killed"))
    assert differing(whole, again) == []


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segment", "pose"])
def test_two_machines_and_a_cache_change_no_bit(task: str, drawn: dict[str, Path], tmp_path: Path):
    options = ["--data", drawn[task], "--model", MODELS[task], *SMALL.split(), "--epochs", 2]
    for name in ("m0", "m1", "one", "cached"):
        (tmp_path / name).mkdir()
    well(both(tmp_path, [SCRIPTS[task], *options]))
    succeed(2, SCRIPTS[task], *options, cwd=tmp_path / "one")
    succeed(2, SCRIPTS[task], *options, "--cache", "ram", cwd=tmp_path / "cached")
    runs = [contents(tmp_path / name / "runs" / task / "exp") for name in ("m0", "one", "cached")]
    assert differing(runs[0], runs[1]) == []
    assert differing(runs[1], runs[2]) == []


# How a run ends and is compiled ---------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_time_is_limited_and_one_command_goes_on(drawn: dict[str, Path], tmp_path: Path):
    options = ["--data", drawn["segment"], "--model", MODELS["segment"], *SMALL.split(), "--resume", "auto"]
    done = launch(1, SEGMENT, *options, "--epochs", 500, "--time-limit", "15s", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    folder = tmp_path / "runs" / "segment" / "exp"
    status, epoch = json.loads((folder / "status.json").read_text()), state_of(folder)["epoch"]
    assert (status["state"], status["reason"]) == ("preempted", "the time is up (--time-limit)")
    assert "resumed after" in succeed(1, SEGMENT, *options, "--epochs", epoch + 3, cwd=tmp_path)
    rows = [*csv.DictReader((folder / "results.csv").open())]
    assert [row["epoch"] for row in rows] == [str(number + 1) for number in range(epoch + 3)]
    assert len({row["train/seg_loss"] for row in rows}) > 1


@pytest.mark.slow
def test_a_signal_lets_the_step_end(drawn: dict[str, Path], tmp_path: Path):
    options = ["--data", drawn["pose"], "--model", MODELS["pose"], *SMALL.split(), "--epochs", 500]
    process = subprocess.Popen(
        [sys.executable, str(POSE), *map(str, options)], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("epoch 2/500"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 3
    folder = tmp_path / "runs" / "pose" / "exp"
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("preempted", "ended by SIGTERM")
    console = succeed(1, POSE, "--resume", folder, "--epochs", status["epoch"] + 1, cwd=tmp_path)
    assert "tiny-pose.yaml, resumed after " in console
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_compiled_masks_are_learnt_as_they_are(drawn: dict[str, Path], tmp_path: Path):
    learnt = []
    for number, more in enumerate(([], ["--compile"])):
        home, cache = tmp_path / str(number), tmp_path / f"cache{number}"
        home.mkdir()
        options = ["--data", drawn["segment"], "--model", MODELS["segment"], *SMALL.split(), "--epochs", 1, *more]
        # torch sets the folder where another test has imported its compiler
        succeed(1, SEGMENT, *options, cwd=home, XDG_CACHE_HOME=str(cache), TORCHINDUCTOR_CACHE_DIR=None)
        assert any(cache.rglob("compiled/*")) == bool(more)
        (row,) = csv.DictReader((home / "runs" / "segment" / "exp" / "results.csv").open())
        learnt.append([float(row[f"train/{term}_loss"]) for term in ("box", "seg", "cls", "dfl")])
    assert learnt[1] == pytest.approx(learnt[0], rel=1e-3)
    best, _ = load_detector(str(home / "runs" / "segment" / "exp" / "weights" / "best.pt"))
    assert "forward" not in vars(best)
