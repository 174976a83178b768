"""A training that is told to end saves what it has done, says so, and goes on from there, whoever was told and how."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import DETECT, TINY, launch, state_of, succeed
from tests.processes.test_exits import SOON, start


def ranks_of(run) -> list[int]:
    """The processes of the ranks, in their order."""
    found = {}
    for process in run.left():
        variables = (Path("/proc") / str(process) / "environ").read_bytes().split(b"\0")
        rank = next((int(v[5:]) for v in variables if v.startswith(b"RANK=")), None)
        if rank is not None:
            found.setdefault(rank, process)  # its workers are younger
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize(
    ("launcher", "target", "number", "code", "state"),
    [
        ("ours", "rank 1", signal.SIGUSR1, 3, "preempted"),
        ("ours", "launcher", signal.SIGUSR1, 3, "preempted"),
        ("none", "launcher", signal.SIGINT, 130, "interrupted"),
        pytest.param("ours", "rank 1", signal.SIGINT, 130, "interrupted", marks=pytest.mark.slow),
        pytest.param("torchrun", "rank 0", signal.SIGUSR1, 1, "preempted", marks=pytest.mark.slow),
        pytest.param("accelerate, one", "group", signal.SIGINT, None, "interrupted", marks=pytest.mark.slow),
    ],
)
def test_a_signal_lets_the_step_end(tmp_path: Path, shapes: Path, launcher, target: str, number, code, state: str):
    run = start(tmp_path, shapes, launcher, "slow", 0, "--save-interval", 1000, "--log-interval", 1)
    run.wait_for("epoch 2/500  step 2/")
    if target == "group":  # as a terminal does
        os.killpg(run.process.pid, number)
    else:
        os.kill(run.process.pid if target == "launcher" else ranks_of(run)[int(target[-1])], number)
    run.finish()
    assert code in (None, run.process.returncode)
    assert run.status["state"] == state
    words = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert run.status["reason"] == words
    assert run.err.count(f"{words}; go on with --resume {tmp_path}/runs/detect/exp") == 1
    said = "".join(run.said)
    stopped = re.search(r"stopped after batch (\d) of epoch 2", said)
    assert stopped is not None, said
    saved = state_of(tmp_path / "runs" / "detect" / "exp")
    assert (saved["epoch"], saved["batches"]) == (0, int(stopped[1]))
    assert saved["updates"] == 5 + int(stopped[1])


def test_the_time_is_limited_and_one_command_goes_on(tmp_path: Path, shapes: Path):
    """On two processes, then on one; and --time, whose plan is kept."""
    options = ["--resume", "auto", "--time", 0.05, "--close-mosaic", 2]
    run = start(tmp_path, shapes, "ours", "slow", 0, *options, "--time-limit", "14s")
    run.finish(within=40)
    assert run.process.returncode == 3
    said = "".join(run.said)
    planned = re.search(r"plan: (\d+) epochs of 0:00:0\d in 0.05 hours \(--time\)", said)
    assert planned is not None, said
    assert run.status["reason"] == "the time is up (--time-limit)"
    before = state_of(tmp_path / "runs" / "detect" / "exp")
    assert before["length"] == int(planned[1]) > 20
    run = start(tmp_path, shapes, "none", "none", 0, *options)
    run.wait_for(f"epoch {before['epoch'] + 2}/{planned[1]}  ")  # of the plan, which is not made again
    run.process.send_signal(signal.SIGTERM)
    run.finish()
    assert run.process.returncode == 3
    assert "plan:" not in "".join(run.said)
    assert os.listdir(tmp_path / "runs" / "detect") == ["exp"]


def test_before_the_first_step_it_ends_at_once(tmp_path: Path, shapes: Path):
    done = launch(1, DETECT, "--data", shapes, "--model", TINY, "--time-limit", "1s", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (3, "the time is up (--time-limit)\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("ranks", "number", "code"), [(2, signal.SIGUSR1, 3), pytest.param(1, signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_metric_is_cut_off_and_repeated(tmp_path: Path, shapes: Path, ranks: int, number, code: int):
    """COCO's metric of the first epoch computes for 14 seconds; another rank than the one that computes is told."""
    run = start(tmp_path, shapes, "ours" if ranks > 1 else "none", "long", 0)
    run.wait_for("epoch 1/500  train")
    time.sleep(1.5)
    told = time.monotonic()
    os.kill(ranks_of(run)[1] if ranks > 1 else run.process.pid, number)
    run.finish()
    assert time.monotonic() - told < 8
    assert run.process.returncode == code
    saved = state_of(tmp_path / "runs" / "detect" / "exp")
    assert (saved["epoch"], saved["batches"], saved["rows"]) == (-1, 5, [])
    console = succeed(1, DETECT, "--resume", "runs/detect/exp", "--epochs", 1, cwd=tmp_path)
    assert "epoch 1/1  val" in console
    assert "tiny.yaml, resumed after batch 5 of epoch 1" in console


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ours", "none"])
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, shapes: Path, launcher: str):
    run = start(tmp_path, shapes, launcher, "hang", 0)  # in the third step, which does not end
    run.wait_for("now:")
    time.sleep(1)
    run.process.send_signal(signal.SIGINT)
    time.sleep(3)
    assert run.process.poll() is None  # the step might still end
    run.process.send_signal(signal.SIGINT)
    run.finish(within=6)
    assert run.process.returncode == 130
    assert run.status["state"] == "interrupted"
    assert "go on with" not in run.err
    assert "Traceback" not in run.err


@pytest.mark.slow
def test_a_rank_that_dies_while_the_others_save_is_the_cause(tmp_path: Path, shapes: Path):
    """A launcher's signal, sent since a rank is gone, is no preemption."""
    run = start(tmp_path, shapes, "ours", "late-kill", 1, "--val-interval", 2)
    run.wait_for("now:")
    run.finish(within=SOON)
    assert run.process.returncode == 137
    assert run.status["state"] == "failed"
    assert json.loads((tmp_path / "runs/detect/exp/status.json").read_text())["epoch"] == 2
