"""What a run is kept in: whole files, the newest two states, the best.pt that belongs to them; a disk that is full."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import DETECT, ROOT, TINY, state_of, succeed
from tests.reporting.wandb_file import read
from tests.soak import SHORT, Kill, contents, differing, soak, train_over
from train.config.options import TrainConfig
from train.config.words import seconds_of
from train.processes.files import draft_of, hold
from train.training.optim import epochs_within
from train.training.resume import find_run, indivisible
from train.training.saves import checksum, clear_drafts, hash_of, settle, states, write_state

KILLED = ROOT / "tests" / "workers" / "killed.py"
OPTIONS = "--imgsz 64 --batch 8 --nbs 8 --workers 0 --trackers none --no-plots --warmup-epochs 0"
HOLDER = """
import sys, time
from pathlib import Path
from train.processes.files import hold
print(hold(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def test_states_are_whole_and_the_newest_two_are_kept(tmp_path: Path):
    content = {
        "rows": [{"a": 1.5, "b": None}],
        "t": {"x": torch.rand(3, 4), "y": torch.zeros(0)},
        "options": {"c": (1, 2)},
    }
    for step in (3, 12, 7, 100):
        write_state(tmp_path, content | {"updates": step})
    assert [path.name for path in states(tmp_path)] == ["state_100.pt", "state_12.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state_100.pt", "state_12.pt"]
    saved = torch.load(tmp_path / "state_100.pt", weights_only=True)
    assert saved.pop("checksum") == checksum(saved)
    for change in (
        {"rows": [{"a": 1.5, "b": 0}]},
        {"t": {"x": content["t"]["x"].T, "y": torch.zeros(0)}},
        {"updates": 99},
    ):
        assert checksum(saved | change) != checksum(saved)
    (tmp_path / ".state_100.pt.4711").write_bytes(b"half")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / ".last.pt.4711").write_bytes(b"half")
    draft_of(tmp_path / "weights" / "best.pt").write_bytes(b"half")
    assert any(tmp_path.rglob("*.draft"))
    clear_drafts(tmp_path)
    assert not any(tmp_path.rglob("*.4711"))
    assert not any(tmp_path.rglob("*.draft"))


@pytest.mark.parametrize("place", ["best.pt", "best_next.pt", "best_before.pt", "last.pt"])
def test_best_belongs_to_the_state(tmp_path: Path, place: str):
    for name in ("best.pt", "best_next.pt", "best_before.pt", "last.pt"):
        (tmp_path / name).write_text(name)
    settle(tmp_path, hash_of(tmp_path / place))
    assert (tmp_path / "best.pt").read_text() == place
    assert not (tmp_path / "best_next.pt").exists()
    settle(tmp_path, "")  # a state before the first best epoch
    assert not (tmp_path / "best.pt").exists()


def test_times_and_plans():
    assert [seconds_of(text) for text in ("11h30m", "1.5h", "15m", "45s", "1h0m1s")] == [41400, 5400, 900, 45, 3601]
    assert [seconds_of(text) for text in ("", "15", "m", "1d", "5 m", "-5m", "1m1h")] == [0] * 7
    assert epochs_within(1.0, used=70, each=60) == 1 + 58
    assert epochs_within(1.0, used=5000, each=60) == 1
    assert indivisible(TrainConfig(batch=12), 5) == "--batch is 12; it must be divisible by the 5 processes, as 10 is."
    assert indivisible(TrainConfig(batch=12, resume="run"), 5) == (
        "--batch is 12; it must be divisible by the 5 processes. The run's batch stays as it is: go on with 1, 2, 3, "
        "4, 6, 12 processes."
    )
    faults = TrainConfig(save_interval="soon", time_limit="1d", time=0.0).faults()
    assert len(faults) == 3
    assert "--time-limit is '1d'; a time is written 11h30m, 90m or 45s." in faults


def run_folder(project: Path, name: str, state: str, started: float, **options: object) -> Path:
    """A run as it looks from outside."""
    folder = project / name
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "state_5.pt").touch()
    config = vars(TrainConfig(**({"project": str(project), "epochs": 9, "max_dets": (1, 10, 100)} | options)))
    (folder / "config.json").write_text(json.dumps(config | {"versions": {}}))
    told = {"state": state, "host": "elsewhere", "pid": 1, "started": started, "updated": 0.0}
    (folder / "status.json").write_text(json.dumps(told))
    return folder


def test_auto_finds_the_newest_unfinished_run_of_the_same_options(tmp_path: Path):
    def found(**options: object) -> str:
        config = TrainConfig(**({"project": str(tmp_path), "epochs": 9, "resume": "auto"} | options))
        return os.path.relpath(find_run(config), tmp_path) if find_run(config) else ""

    assert found() == ""
    run_folder(tmp_path, "exp", "preempted", 1.0)
    run_folder(tmp_path, "exp2", "running", 2.0)  # killed
    run_folder(tmp_path, "exp3", "failed", 3.0, lr0=0.5)
    run_folder(tmp_path, "exp4", "finished", 4.0)
    run_folder(tmp_path, "exp10", "preempted", 1.5)
    (run_folder(tmp_path, "exp11", "running", 9.0) / "weights" / "state_5.pt").unlink()  # it has saved nothing
    run_folder(tmp_path, "export", "preempted", 9.0)  # of another name
    assert found() == "exp2"
    assert found(workers=3, save_interval=7, val_batch=2) == "exp2"
    assert found(lr0=0.5) == "exp3"
    assert found(lr0=0.4) == ""
    assert found(data="other.yaml") == ""
    assert found(epochs=12) == "exp4"  # finished, but shorter
    assert found(name="export") == "export"


def test_auto_leaves_a_run_alone_that_somebody_is_at(tmp_path: Path):
    for name in ("exp", "exp2", "exp3"):
        run_folder(tmp_path, name, "preempted", float(name[3:] or 1))
    command, environment = [sys.executable, "-c", HOLDER], os.environ | {"PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        holders = []
        for name in ("exp2", "exp3"):
            holder = subprocess.Popen(
                [*command, str(tmp_path / name)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            holders.append(stack.enter_context(holder))
            stack.callback(holder.kill)
            assert holder.stdout is not None
            assert holder.stdout.readline() == "True\n"
        assert not hold(tmp_path / "exp3")
        assert find_run(TrainConfig(project=str(tmp_path), epochs=9, resume="auto")) == str(tmp_path / "exp")
        holders[1].kill()  # a lock ends with its process
        holders[1].wait()
        assert hold(tmp_path / "exp3")


def test_a_full_disk_is_a_warning_as_long_as_something_can_follow(tmp_path: Path, shapes: Path):
    """From step 8 to 10 of 15 no file may be larger than 100 kB. What it means at the end is in test_mistakes.py."""
    options = ["--data", shapes, "--model", TINY, *OPTIONS.split(), "--epochs", 3, "--workers", 1]
    succeed(1, DETECT, *options, "--name", "whole", cwd=tmp_path)
    console = succeed(1, KILLED, "full:8:10", *options, "--name", "full", cwd=tmp_path)
    assert console.count("weights could not be written to, where ") == 2  # before the validation and after
    assert "); the run goes on with what was saved before" in console
    whole, full = (tmp_path / "runs" / "detect" / name for name in ("whole", "full"))
    assert differing(contents(whole), contents(full)) == []


def test_save_period_keeps_checkpoints(tmp_path: Path, shapes: Path):
    options = ["--data", shapes, "--model", TINY, *OPTIONS.split(), "--epochs", 4, "--save-period", 2]
    succeed(1, DETECT, *options, cwd=tmp_path)
    weights = tmp_path / "runs" / "detect" / "exp" / "weights"
    assert sorted(path.name for path in weights.glob("epoch*")) == ["epoch2.pt", "epoch4.pt"]
    assert torch.load(weights / "epoch2.pt", weights_only=False)["epoch"] == 1
    assert hash_of(weights / "epoch4.pt") == hash_of(weights / "last.pt")


# Bit for bit ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "ranks", "workers"),
    [
        (str(TINY), 2, 1),
        pytest.param("yolov8n.yaml", 1, 2, marks=pytest.mark.slow),
        pytest.param("yolov8n.yaml", 2, 0, marks=pytest.mark.slow),
        pytest.param("yolo26n.yaml", 1, 0, marks=pytest.mark.slow),
        pytest.param("yolo26n.yaml", 2, 2, marks=pytest.mark.slow),
        pytest.param("yolov8n.yaml", 4, 0, marks=pytest.mark.slow),
    ],
)
def test_killed_within_an_epoch_it_ends_with_the_bits_it_would_have_had(
    tmp_path: Path, model: str, ranks: int, workers: int
):
    """Default augmentation, accumulation over two batches, mosaic closing in the third epoch of three."""
    options = ["--workers", str(workers), "--epochs", "3", "--close-mosaic", "1", "--trackers", "none"]
    options += ["--mosaic", "1.0"]
    kills = [Kill("kill:step::7"), Kill("kill:validation::1")]  # in the second epoch, and where that is validated
    for name, here in (("whole", []), ("killed", kills)):
        (tmp_path / name).mkdir()
        train_over(tmp_path / name, ((ranks, None),), [here], model, options)
    whole, killed = (contents(tmp_path / name / "runs" / "detect" / "exp") for name in ("whole", "killed"))
    assert differing(whole, killed) == []
    assert [row["epoch"] for row in killed["results.csv"]] == ["1", "2", "3"]
    assert "resumed after batch" in (tmp_path / "killed" / "console.txt").read_text()
    assert state_of(tmp_path / "killed" / "runs" / "detect" / "exp")["epoch"] == 2


@pytest.mark.slow
def test_a_compiled_model_resumes_to_the_same_bits_and_leaves_no_trace_in_its_files(tmp_path: Path):
    options = ["--workers", "1", "--epochs", "3", "--trackers", "none", "--compile"]
    for name, kills in (("whole", []), ("killed", [Kill("kill:step::7")])):
        (tmp_path / name).mkdir()
        train_over(tmp_path / name, ((2, None),), [kills], str(TINY), options)
    whole, killed = (contents(tmp_path / name / "runs" / "detect" / "exp") for name in ("whole", "killed"))
    assert differing(whole, killed) == []
    run = tmp_path / "whole" / "runs" / "detect" / "exp"
    plain = torch.load(run / "weights" / "best.pt", weights_only=False)["model"]
    assert "forward" not in vars(plain)
    assert not any("_orig_mod" in name for name in (*plain.state_dict(), *state_of(run)["model"]))


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path):
    """A few kills at times and at each place, over one process and two; `make soak` is the long one.

    With this seed those that need a better epoch come while there are any.
    """
    assert soak(tmp_path, timed=3, each=1, seed=633, model=str(TINY), segments=SHORT, epochs=60) == []
    runs = sorted((tmp_path / "whole" / "runs" / "detect" / "exp" / "wandb").glob("offline-run-*"))
    records = [read(run) for run in runs]  # the first was preempted after step 90, and is finished all the same
    assert [len(one["exit"]) for one in records] == [1, 1]
    assert len({one["run"][0].run_id for one in records}) == 1
    steps = [row["global_step"] for one in records for row in one["history"]]
    assert steps == sorted(steps)
