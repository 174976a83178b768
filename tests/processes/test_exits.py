"""No process of a run outlives it: whatever ends it, all of it is gone soon, with a code, and the cause is said once.

What is left of a run is found by a mark in its environment, which every process that it starts inherits.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, TINY
from train.processes import status

FAULTY = ROOT / "tests" / "workers" / "faulty.py"
SOON = 15  # seconds
LAUNCHERS = {
    "none": [],
    "ours": ["-m", "train.processes.launcher", "--cpus", "2", "--"],
    "accelerate": ["-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/accelerate_configs/multi_cpu.yaml"],
    "accelerate, one": ["-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/accelerate_configs/cpu.yaml"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}
OPTIONS = "--imgsz 64 --batch 8 --nbs 8 --no-plots --trackers none --workers 0 --epochs 500 --val-limit 8"


@dataclass
class Run:
    """A training with something wrong in it, which has been started, and what became of it."""

    folder: Path
    process: subprocess.Popen
    mark: str
    said: list[str] = field(default_factory=list)
    err: str = ""
    seconds: float = 0.0  # from the end's cause until nothing was left

    def wait_for(self, words: str) -> None:
        """Wait until the run says so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if words in line:
                return
        raise AssertionError("".join(self.said) + self.process.stderr.read())  # type: ignore[union-attr]

    def left(self) -> list[int]:
        """Processes of the run that live, as their environments tell."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (process / "environ").read_bytes():
                    found.append(int(process.name))
            except OSError:  # it has ended, or it is not ours
                pass
        return found

    def finish(self, within: float = SOON) -> "Run":
        """Wait until nothing is left, and take what was said."""
        begun = time.monotonic()
        while self.process.poll() is None or self.left():
            if time.monotonic() - begun > within:
                left = {pid: psutil.Process(pid).cmdline()[:6] for pid in self.left()}
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"left after {within} s: {left}")
            time.sleep(0.05)
        self.seconds = time.monotonic() - begun
        out, self.err = self.process.communicate(timeout=10)
        self.said.append(out)
        return self

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.folder / "runs" / "detect" / "exp" / "status.json").read_text())


def start(folder: Path, shapes: Path, launcher: str, kind: str, rank: int, *options: object) -> Run:
    """Start tests/workers/faulty.py."""
    mark = uuid.uuid4().hex
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "YOLO_", "ACCELERATE_"))}
    clean |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "TEST_MARK": mark}
    command = [sys.executable, *LAUNCHERS[launcher], FAULTY, kind, rank, "--data", shapes, "--model", TINY]
    process = subprocess.Popen(
        [*map(str, command), *OPTIONS.split(), *map(str, options)], cwd=folder,
        env=clean | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    return Run(folder, process, mark)


# One rank is the cause ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "rank", "code", "words", "reason"),
    [
        pytest.param(
            "fail",
            1,
            1,
            "rank 1 of 2 on {host} failed: ValueError: broken on purpose",
            "ValueError: broken on purpose",
            marks=pytest.mark.slow,
        ),
        ("late-input", 1, 2, "bad input found late", "bad input found late"),
        pytest.param(
            "memory",
            1,
            1,
            "the GPU is out of memory (CUDA out of memory). Lower --batch",
            "Lower --batch",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "late-memory",
            0,
            1,
            "the GPU is out of memory (CUDA out of memory). Lower --val-batch",
            "Lower --val-batch",
            marks=pytest.mark.slow,
        ),
        ("kill", 1, 137, "rank 1 was killed by SIGKILL, perhaps out of memory", "rank 1 of 2 on {host} is gone"),
        pytest.param(
            "late-kill",
            0,
            137,
            "rank 0 was killed by SIGKILL, perhaps out of memory",
            "rank 0 was killed by SIGKILL",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_rank_ends_all_and_says_why(tmp_path, shapes: Path, kind: str, rank: int, code: int, words, reason: str):
    run = start(tmp_path, shapes, "ours", kind, rank)
    run.wait_for("now:")
    run.finish()
    assert run.process.returncode == code
    assert run.err.count("error: ") == 1
    assert run.err.startswith(f"error: {words}".format(host=os.uname().nodename) if "failed" in words else "error: ")
    assert words.format(host=os.uname().nodename) in run.err
    assert "Traceback" not in run.err
    assert run.status["state"] == "failed"
    assert reason.format(host=os.uname().nodename) in run.status["reason"]
    assert run.status["rank"] == rank
    assert run.status["epoch"] == 1
    assert not status.alive(run.status)


@pytest.mark.slow
def test_a_rank_that_is_killed_while_it_reads_is_no_preemption(tmp_path: Path, shapes: Path):
    """The others know no more than that torchrun ends them."""
    run = start(tmp_path, shapes, "ours", "none", 0)
    until = time.monotonic() + 30
    while len(run.left()) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(1)  # of the two that imports take
    children = psutil.Process(run.process.pid).children()
    os.kill(children[0].pid, signal.SIGKILL)
    run.finish()
    assert run.process.returncode == 137
    assert "error: rank 0 was killed by SIGKILL, perhaps out of memory" in run.err


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "rank"), [("accelerate", 1), ("torchrun", 0)])
def test_the_status_says_it_under_any_launcher(tmp_path: Path, shapes: Path, launcher: str, rank: int):
    run = start(tmp_path, shapes, launcher, "kill", rank)
    run.wait_for("now:")
    run.finish()
    assert run.process.returncode == 1
    gone = f"rank {rank} of 2 on {os.uname().nodename} is gone"
    assert run.err.count(f"error: {gone}") == 1
    if rank == 0:  # nobody could write it, so that the dead process has to tell
        assert run.status["state"] == "running"
    else:
        assert (run.status["state"], run.status["rank"]) == ("failed", 1)
        assert run.status["reason"].startswith(gone)
    assert not status.alive(run.status)


def test_sigterm_under_torchrun_is_a_preemption(tmp_path: Path, shapes: Path):
    run = start(tmp_path, shapes, "torchrun", "none", 0)
    run.wait_for("epoch 2/500")
    assert status.alive(run.status)
    assert run.status["epoch"] >= 1
    run.process.send_signal(signal.SIGTERM)
    run.finish()
    assert run.err.count("ended by SIGTERM") == 1
    assert (run.status["state"], run.status["reason"]) == ("preempted", "ended by SIGTERM")


@pytest.mark.slow
def test_ctrl_c_while_a_rank_waits_in_a_gather(tmp_path: Path, shapes: Path):
    run = start(tmp_path, shapes, "ours", "late-hang", 1)
    run.wait_for("now:")
    time.sleep(1)  # until the other waits
    run.process.send_signal(signal.SIGINT)
    run.finish()
    assert run.process.returncode == 130
    assert run.err == "interrupted\n"
    assert run.status["state"] == "interrupted"


# The launcher is gone -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("delay", [2.6, pytest.param(1.6, marks=pytest.mark.slow)])
def test_the_launcher_is_killed_while_its_ranks_import(tmp_path: Path, shapes: Path, delay: float):
    run = start(tmp_path, shapes, "ours", "none", 0)
    until = time.monotonic() + 30
    while len(run.left()) < 3 and time.monotonic() < until:  # the launcher and its ranks
        time.sleep(0.02)
    time.sleep(delay - 1.6)
    os.kill(run.process.pid, signal.SIGKILL)
    run.finish()
    assert "error: the launcher is gone" in run.err or delay == 1.6  # earlier Python has not come to our first line


@pytest.mark.parametrize(
    ("launcher", "kind", "options", "ranks"),
    [
        ("ours", "late-hang", [], 2),  # the other waits in a gather
        # in a worker that decodes
        pytest.param("torchrun", "hang", ["--workers", 1], 2, marks=pytest.mark.slow),
        pytest.param("accelerate, one", "late-hang", ["--trackers", "wandb"], 1, marks=pytest.mark.slow),
    ],
)
def test_the_launcher_is_killed(tmp_path: Path, shapes: Path, launcher: str, kind: str, options: list, ranks: int):
    run = start(tmp_path, shapes, launcher, kind, ranks - 1, *options)
    run.wait_for("now:")
    os.kill(run.process.pid, signal.SIGKILL)
    run.finish()
    assert run.err.count("error: the launcher is gone") == 1
    assert run.err.count("error: ") == 1
    assert (run.status["state"], run.status["reason"]) == ("failed", "the launcher is gone")


def test_the_only_process_is_killed(tmp_path: Path, shapes: Path):
    """With W&B's service beside it, and a worker."""
    run = start(tmp_path, shapes, "none", "hang", 0, "--workers", 1, "--trackers", "wandb")
    run.wait_for("now:")
    assert len(run.left()) >= 3
    os.kill(run.process.pid, signal.SIGKILL)
    run.finish()
    assert run.status["state"] == "running"
    assert not status.alive(run.status)


# Frozen, or only busy -------------------------------------------------------------------------------------------------
def test_a_frozen_rank_is_found_while_the_others_wait_in_a_gather(tmp_path: Path, shapes: Path):
    run = start(tmp_path, shapes, "ours", "late-stop", 1, "--hang-timeout", 5)
    run.wait_for("now:")
    run.finish(within=10 + SOON)
    assert run.process.returncode == 1
    assert run.err.count("error: ") == 1
    assert "  rank 1 of 2; it does not answer and was last seen at" in run.err
    assert "  rank 0 of 2" not in run.err
    assert run.status["reason"].endswith("rank 1 did not arrive")


@pytest.mark.slow
def test_a_main_process_that_computes_for_long_is_no_hang(tmp_path: Path, shapes: Path):
    run = start(tmp_path, shapes, "ours", "long", 0, "--hang-timeout", 5, "--epochs", 1)
    run.finish(within=90)
    assert run.process.returncode == 0, run.err
    assert run.status["state"] == "finished"


# The file -------------------------------------------------------------------------------------------------------------
def test_a_status_is_believed_as_long_as_it_can_be_true(tmp_path: Path):
    assert not status.alive(status.read(tmp_path))
    status.begin(tmp_path)
    told = status.read(tmp_path)
    assert status.alive(told)
    assert not status.alive(told | {"started": told["started"] - 1e6})  # another process of that number
    assert not status.alive(told | {"pid": 2**22 + 1})
    assert status.alive(told | {"host": "other", "pid": 1})
    assert not status.alive(told | {"host": "other", "updated": told["updated"] - 2 * status.STALE})
    status.update(tmp_path, epoch=3)
    status.end(tmp_path, "failed", "why", 1)
    status.end(tmp_path, "interrupted", "later", 0)  # the first counts
    status.update(tmp_path, epoch=4)
    told = status.read(tmp_path)
    assert (told["state"], told["reason"], told["rank"], told["epoch"]) == ("failed", "why", 1, 3)
    assert not status.alive(told)
    (tmp_path / "status.json").write_text('{"state": "running", "updated": 1, "host": 3, "pid": "x", "started": []}')
    assert not status.alive(status.read(tmp_path))
