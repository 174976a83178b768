"""The W&B run, read from its offline files: what people open its page for, and that it never gets in the way."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb

from tests.conftest import DETECT, TINY, launch, state_of, succeed
from tests.reporting.wandb_file import read
from train.reporting.plots import Mark
from train.reporting.wandb_page import _wandb_mask

QUICK = "--imgsz 160 --batch 8 --nbs 8 --warmup-epochs 0 --workers 0 --optimizer AdamW --lr0 1e-4"
RUN = Path("runs") / "detect" / "exp"
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, shapes: Path, trained: Path) -> tuple[Path, str]:
    """A training on two processes of a model that knows something; it is killed at its end's beginning and resumed."""
    folder = tmp_path_factory.mktemp("wandb")
    options = ["--data", shapes, "--model", trained / "weights" / "best.pt", *QUICK.split(), "--epochs", 2]
    options += ["--log-interval", 2, "--wandb-project", "mine", "--wandb-tags", "a", "b", "--wandb-notes", "why"]
    options += ["--wandb-group", "g", "--wandb-name", "n", "--wandb-entity", "us", "--trackers", "wandb", "tensorboard"]
    return folder / RUN, succeed(2, DETECT, *options, cwd=folder)


@pytest.fixture(scope="module")
def records(tracked: tuple[Path, str]) -> dict[str, list[Any]]:
    (run,) = (tracked[0] / "wandb").glob("offline-run-*")  # one for both ranks
    return read(run)


def test_one_run_with_its_id_in_folder_and_checkpoints(tracked, records):
    folder, console = tracked
    (run,) = records["run"][:1]
    id_ = (folder / "wandb_id.txt").read_text().strip()
    assert run.run_id == id_
    assert state_of(folder)["wandb_id"] == id_
    for name in ("best.pt", "last.pt"):
        assert torch.load(folder / "weights" / name, weights_only=False)["wandb_id"] == id_
    assert (run.project, run.entity, run.display_name, run.run_group, run.notes) == ("mine", "us", "n", "g", "why")
    assert list(run.tags) == ["a", "b"]
    assert re.search(
        rf"wandb      offline; to send it: cd {folder.parents[2]} && "
        rf"wandb sync {RUN}/wandb/offline-run-\d+_\d+-{id_}\n",
        console,
    )


def test_the_axes_rise(records):
    steps = {metric.name or metric.glob_name: metric.step_metric for metric in records["metric"]}
    assert steps["*"] == "global_step"
    assert steps["val*"] == "epoch"
    rows = [row for row in records["history"] if "global_step" in row]
    assert [row["global_step"] for row in rows] == [2, 4, 5, 7, 9, 10]
    assert [row["epoch"] for row in rows] == pytest.approx([0.4, 0.8, 1, 1.4, 1.8, 2])
    assert len(rows) == len(records["history"])  # nothing beside these rows


def test_numbers_of_training_validation_and_speed(records):
    within, last = records["history"][0], records["history"][-1]
    for row in (within, last):
        assert {f"train/{loss}_loss" for loss in ("box", "cls", "dfl")} <= set(row)
        assert {"lr", "train/grad_norm", "speed/images_per_s", "speed/data_wait_worst_rank"} <= set(row)
        assert row["speed/step_slowest_rank"] >= row["speed/step_median_rank"] > 0
    assert {"val/AP", "val/AP50", "val/AP75", "val/APs", "val/P", "val/R", "val/F1", "val/box_loss"} <= set(last)
    assert last["val/AP"] > 0.1


def test_charts_tables_and_pictures(tracked, records):
    folder, _ = tracked
    (run,) = (folder / "wandb").glob("offline-run-*")
    first, last = (row for row in records["history"] if "val/AP" in row)
    for row in (first, last):
        assert row["val/per_class"]["_type"] == "table-file"
    table = json.loads((run / "files" / last["val/per_class"]["path"]).read_text())
    assert table["columns"] == ["class", "images", "boxes", "P", "R", "F1", "AP50", "AP75", "AP"]
    assert [row[0] for row in table["data"]] == ["circle", "square", "triangle"]
    captions = [[text.partition(": ") for text in row["val/examples"]["captions"]] for row in (first, last)]
    assert [file for file, *_ in captions[0]] == [file for file, *_ in captions[1]]  # the same every time
    assert len(captions[0]) == 12
    boxes = last["val/examples"]["all_boxes"]
    assert len(boxes) == 12
    for one in boxes:
        assert set(one) == {"truth", "detections"}
    shown = json.loads((run / "files" / boxes[0]["truth"]["path"]).read_text())
    assert all(0 <= box["position"]["minX"] < box["position"]["maxX"] <= 1.001 for box in shown["box_data"])
    assert captions[1][0][2].startswith(f"{len(shown['box_data'])} boxes, ")
    assert first["train/labels"]["_type"] == "image-file"
    assert first["train/batches"]["count"] == 3
    names = {key for row in records["history"] for key in row}
    assert {"losses/box_loss_table", "val/PR_curve_table", "val/confusion_matrix_table"} <= names


def test_summary_and_model(tracked, records):
    folder, _ = tracked
    summary: dict[str, Any] = {}
    for update in records["summary"]:
        summary |= update
    state = state_of(folder)
    assert summary["best/AP"] == state["best_ap"]
    assert summary["best/epoch"] == state["best_epoch"] + 1
    aliases = {
        alias: artifact for artifact in records["artifact"] if artifact.type == "model" for alias in artifact.aliases
    }
    assert {"best", "last"} <= set(aliases)
    assert json.loads(aliases["best"].metadata)["AP"] == state["best_ap"]
    assert [entry.path for entry in aliases["last"].manifest.contents] == ["last.pt"]


def test_all_that_the_run_names_lies_in_its_folder(tracked, records):
    """Copied with its folder, the run is whole: every path in it leads there, from the folder it was started in."""
    folder, _ = tracked
    (run,) = (folder / "wandb").glob("offline-run-*")
    named = [entry.local_path for one in records["artifact"] for entry in one.manifest.contents]
    assert {Path(path).name for path in named} == {"best.pt", "last.pt"}
    assert not any(os.path.isabs(path) for path in named)
    for path in named:
        assert (folder.parents[2] / path).resolve().is_relative_to(folder)
        assert (folder.parents[2] / path).is_file()
    files = [file.path for one in records["files"] for file in one.files]
    assert any(path.startswith("media/table/") for path in files)
    for path in files:
        assert (run / "files" / path).is_file(), path
    (written,) = run.glob("*.wandb")
    absolute = set(re.findall(rb"/(?:[\w.+-]+/)+[\w.+-]+", written.read_bytes()))
    outside = [path for path in absolute if b"staging" in path or b".local" in path or b".cache" in path]
    assert not outside


def test_configuration(tracked, records):
    values: dict[str, Any] = {}
    for update in records["config"]:
        values |= update
    assert values["imgsz"] == 160
    assert values["processes"] == 2
    assert "detect.py" in values["command"]
    assert {"git", "torch_version", "ultralytics_version"} <= set(values)


def test_tensorboard_has_the_numbers_too(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for events in tracked[0].rglob("events.out.tfevents*"):
        read_back = EventAccumulator(str(events))
        read_back.Reload()
        if "val/AP" in read_back.Tags()["scalars"]:  # the other file holds the hyperparameters
            break
    assert [point.step for point in read_back.Scalars("train/box_loss")] == [2, 4, 5, 7, 9, 10]
    assert len(read_back.Scalars("val/AP")) == 2


def test_masks_of_more_classes_than_wandb_has_values_for():
    names = {id_: f"class {id_}" for id_ in range(1000)}
    half, whole = np.zeros((8, 8), np.uint8), np.ones((8, 8), np.uint8)
    half[:4] = 1
    picture = np.zeros((16, 16, 3), np.uint8)
    shown = _wandb_mask([Mark([0, 0, 8, 4], 900, mask=half), Mark([0, 0, 8, 8], 5, mask=whole)], picture, names)
    wandb.Image(picture, masks={"truth": shown})  # which refuses values above 255
    assert shown["class_labels"] == {0: "background", 1: "class 5", 2: "class 900"}
    assert shown["mask_data"][:8].tolist() == [[2] * 16] * 8
    assert shown["mask_data"][8:].tolist() == [[1] * 16] * 8


def test_a_resumed_training_goes_on_with_its_run(tracked):
    folder, _ = tracked
    id_ = (folder / "wandb_id.txt").read_text()
    succeed(1, DETECT, "--resume", folder, "--epochs", 3, cwd=folder.parents[2])
    assert (folder / "wandb_id.txt").read_text() == id_
    runs = sorted((folder / "wandb").glob("offline-run-*"), key=lambda run: run.stat().st_mtime)
    assert len(runs) == 2
    resumed = read(runs[-1])
    assert resumed["run"][0].run_id == id_.strip()
    assert [row["global_step"] for row in resumed["history"]] == [12, 14, 15]
    assert resumed["history"][-1]["epoch"] == 3


# When W&B cannot be had -----------------------------------------------------------------------------------------------
SHORT = ["--model", str(TINY), "--imgsz", "64", "--batch", "20", "--epochs", "1", "--workers", "0", "--no-plots"]
NO_NETWORK = """
import socket
def getaddrinfo(host, *args, **kwargs):
    if host not in (None, "localhost", "127.0.0.1", "::1", socket.gethostname()):
        raise socket.gaierror("no network")
    return resolve(host, *args, **kwargs)
resolve, socket.getaddrinfo = socket.getaddrinfo, getaddrinfo
"""


def without_network(shapes: Path, home: Path, **environment: str | None) -> tuple[subprocess.CompletedProcess, Path]:
    (home / "sitecustomize.py").write_text(NO_NETWORK)
    base = {"PYTHONPATH": str(home), "HOME": str(home), "NETRC": str(home / "none"), "WANDB_MODE": None}
    return launch(1, DETECT, "--data", shapes, *SHORT, cwd=home, **(base | environment)), home / RUN


def test_a_key_but_no_network_is_one_warning_within_a_second(shapes: Path, tmp_path: Path):
    done, folder = without_network(shapes, tmp_path, WANDB_API_KEY=KEY)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("warning") == 1
    assert re.search(r"warning: W&B's server \S+ does not answer; the run is kept offline", done.stdout)
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1
    lines = (folder / "logs" / "rank0.log").read_text().splitlines()
    times = [
        time.mktime(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")) + int(line[20:23]) / 1000
        for line in lines
        if line[:2] == "20"
    ]
    after = next(i for i, line in enumerate(lines) if "W&B's server" in line)
    assert times[after] - times[after - 1] < 3  # seconds; by hand 0.8, and this machine may be busy
    said = done.stdout + done.stderr
    for file in folder.rglob("*"):
        said += file.read_bytes().decode(errors="replace") if file.is_file() else ""
    assert KEY not in said
    home = {
        str(path.relative_to(tmp_path))
        for place in (".local", ".cache", ".config")
        for path in (tmp_path / place).rglob("*")
    }
    assert not [path for path in home if "wandb" in path]


@pytest.mark.slow
def test_a_home_that_cannot_be_written_is_not_missed(shapes: Path, tmp_path: Path):
    """As in a container under a user of its own: W&B goes on, in the run's folder, and says nothing of its own."""
    done, folder = without_network(shapes, tmp_path, HOME="/dev/null")
    assert (done.returncode, done.stderr) == (0, "")
    assert "warning" not in done.stdout
    (run,) = (folder / "wandb").glob("offline-run-*")
    assert [row["epoch"] for row in read(run)["history"]][-1] == 1


def test_a_refused_run_is_kept_offline(shapes: Path, tmp_path: Path):
    """A server that answers, but not as W&B's does, as with a wrong key."""
    import http.server
    import threading

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(401)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    done, folder = without_network(shapes, tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("warning: W&B refused the run (a wrong key?); it is kept offline") == 1
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1


def test_a_tracker_that_fails_is_one_warning_and_the_training_goes_on(tmp_path: Path, shapes: Path):
    done = launch(2, DETECT, "--data", shapes, *SHORT, cwd=tmp_path, WANDB_MODE="nonsense")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("warning: wandb did not start and stays off") == 1
    assert "results in" in done.stdout


def test_wandbs_environment_variables_work(shapes: Path, tmp_path: Path):
    environment = {"WANDB_PROJECT": "p", "WANDB_NAME": "n", "WANDB_TAGS": "x,y", "WANDB_RUN_GROUP": "g"}
    environment |= {"WANDB_RUN_ID": "given123", "WANDB_NOTES": "so", "WANDB_DIR": str(tmp_path / "elsewhere")}
    (tmp_path / "elsewhere").mkdir()
    succeed(1, DETECT, "--data", shapes, *SHORT, cwd=tmp_path, **environment)
    (run,) = (tmp_path / "elsewhere" / "wandb").glob("offline-run-*")
    record = read(run)["run"][0]
    assert (record.project, record.display_name, record.run_group, record.notes) == ("p", "n", "g", "so")
    assert (record.run_id, list(record.tags)) == ("given123", ["x", "y"])


def test_a_folder_that_cannot_be_written_is_one_warning(shapes: Path, tmp_path: Path):
    done = launch(1, DETECT, "--data", shapes, *SHORT, cwd=tmp_path, WANDB_DIR="/proc/nowhere")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(r"warning: (W&B cannot write to /proc/nowhere|wandb did not start)", done.stdout)) == 1


def test_a_killed_run_loses_at_most_five_seconds(shapes: Path, tmp_path: Path):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    options = [*SHORT, "--epochs", "500", "--log-interval", "1", "--val-interval", "500"]
    command = [sys.executable, str(DETECT), "--data", str(shapes), *options]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said: list[tuple[float, int]] = []  # when which epoch was finished
    for line in process.stdout:
        if found := re.match(r"epoch (\d+)/500  train", line):
            said.append((time.monotonic(), int(found[1])))
            if said[-1][0] - said[0][0] > 8:
                process.kill()
                break
    process.wait()
    (run,) = (tmp_path / RUN / "wandb").glob("offline-run-*")
    kept = max(row["epoch"] for row in read(run)["history"])
    assert kept >= next(epoch for when, epoch in said if when > said[-1][0] - 5) - 1
