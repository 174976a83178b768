"""How a script ends from outside: by signals, without readers, without a place to print; and what it leaves behind."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import train
from tests.conftest import DETECT, ROOT, TINY, launch
from train.processes import scratch
from train.training.saves import states

QUICK = ["--model", str(TINY), "--imgsz", "64", "--batch", "8", "--nbs", "8", "--trackers", "none", "--no-plots"]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A temporary folder for the run. Its path is short: sockets lie there, whose paths may have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def environment(temporary: Path, **more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "YOLO_", "ACCELERATE_"))}
    clean |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), "WANDB_MODE": "offline"}
    return clean | more


def begin(folder: Path, temporary: Path, *command: object, **more: str) -> subprocess.Popen:
    """Start a training in a session of its own, as a terminal does, with signals at their defaults."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=folder, env=environment(temporary, **more),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def left_in(temporary: Path) -> list[str]:
    return sorted(path.name for path in temporary.iterdir())


@pytest.mark.parametrize("delay", [0.25, 0.9, 1.6])
@pytest.mark.parametrize("launcher", [[], ["-m", "train.processes.launcher", "--cpus", "1", "--"]])
def test_ctrl_c_while_modules_are_imported(tmp_path: Path, temporary: Path, delay: float, launcher: list[str]):
    process = begin(tmp_path, temporary, *launcher, DETECT, *QUICK, PYTHONPATH=str(ROOT))
    time.sleep(delay)  # seconds, of the two that imports take
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    if delay > 0.5:  # before that Python itself may not have come to our first line
        assert (process.returncode, err) == (130, "interrupted\n")
        assert out == ""
        assert left_in(temporary) == []


def test_ctrl_c_while_the_script_takes_the_launchers_place(tmp_path: Path, temporary: Path):
    code = (
        "import os, signal, sys\nfrom train.processes import scratch, signals\nscratch.clean_up()\nsignals.hold()\n"
        f"os.kill(os.getpid(), signal.SIGINT)\nos.execv(sys.executable, [sys.executable, {str(DETECT)!r}])"
    )
    process = begin(tmp_path, temporary, "-c", code, PYTHONPATH=str(ROOT))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert left_in(temporary) == []


@pytest.mark.parametrize(
    ("ranks", "number", "words"),
    [
        (1, signal.SIGHUP, "ended by SIGHUP"),
        (2, signal.SIGTERM, "ended by SIGTERM"),
        pytest.param(2, signal.SIGINT, "interrupted", marks=pytest.mark.slow),
    ],
)
def test_a_signal_leaves_a_line_and_nothing_else(
    tmp_path: Path, temporary: Path, shapes: Path, ranks: int, number: signal.Signals, words: str
):
    options = [*QUICK, "--data", shapes, "--epochs", 500, "--workers", 1, "--val-interval", 500]
    command = ["-m", "train.processes.launcher", "--cpus", ranks, "--"] if ranks > 1 else []
    process = begin(tmp_path, temporary, *command, DETECT, *options, PYTHONPATH=str(ROOT))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/500"):
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (3 if number == signal.SIGTERM else 128 + number)
    assert err == f"{words}; go on with --resume {tmp_path}/runs/detect/exp\n"
    run = tmp_path / "runs" / "detect" / "exp"
    for rank in range(ranks):
        assert words in (run / "logs" / f"rank{rank}.log").read_text().splitlines()[-1]
    assert states(run / "weights")
    assert left_in(temporary) == []


def test_a_main_thread_that_does_not_listen_is_ended(tmp_path: Path, temporary: Path):
    """As in a collective or a device's call, where Python runs no handler."""
    code = (
        "import torch\nfrom train.processes import script, signals\nsignals.GRACE = 0.5\n"
        "signals.during_work(script._ended_by)\ntorch.set_num_threads(1)\n"
        "a = torch.ones(7000, 7000, dtype=torch.float64)\nprint('begun', flush=True)\na @ a"
    )
    process = begin(tmp_path, temporary, "-c", code, PYTHONPATH=str(ROOT))
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(1)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - sent < 5  # seconds; the product takes twenty
    assert (process.returncode, err) == (3, "ended by SIGTERM\n")
    assert left_in(temporary) == []


def test_what_a_killed_run_leaves_is_removed_by_the_next(tmp_path: Path, temporary: Path, shapes: Path):
    process = begin(tmp_path, temporary, DETECT, *QUICK, "--data", shapes, "--epochs", 500, "--workers", 1)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/500"):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    (left,) = left_in(temporary)
    other = temporary / "yoloacc-theirs__"  # of a run that lives: its lock is held
    other.mkdir()
    (other / train.LOCK).write_bytes(train.HOST)
    holds = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(1, flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", holds, str(other / train.LOCK)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    clone = temporary / "yoloacc-sources_"  # somebody's folder that happens to have such a name
    clone.mkdir()
    for folder in (left, other.name, clone.name):
        os.utime(temporary / folder, (0, time.time() - 2 * scratch.YOUNG))
    done = launch(1, DETECT, "--epochs", 0, cwd=tmp_path, TMPDIR=str(temporary))
    holder.kill()
    assert done.returncode == 2
    assert left_in(temporary) == sorted([other.name, clone.name])


def test_several_processes_with_workers_leave_nothing(tmp_path: Path, temporary: Path, shapes: Path):
    options = [*QUICK, "--data", shapes, "--epochs", 1, "--workers", 1]
    done = launch(2, DETECT, *options, cwd=tmp_path, TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr[-2000:]
    assert left_in(temporary) == []
    done = launch(2, DETECT, *options, "--batch", 3, cwd=tmp_path, TMPDIR=str(temporary))
    assert "--batch is 3; it must be divisible by the 2 processes" in done.stderr
    assert left_in(temporary) == []


def test_make_hands_on_the_code_and_no_traceback_of_the_launchers(tmp_path: Path, temporary: Path, shapes: Path):
    command = ["-m", "train.processes.launcher", "--cpus", 2, "--", DETECT, *QUICK, "--data", shapes, "--batch", 3]
    process = begin(tmp_path, temporary, *command, PYTHONPATH=str(ROOT))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "error: --batch is 3; it must be divisible by the 2 processes, as 4 is.\n"
    assert out == ""
    assert left_in(temporary) == []


@pytest.mark.parametrize("stream", ["closed", "nobody reads", "full"])
def test_a_console_that_fails_does_not_end_a_training(tmp_path: Path, temporary: Path, shapes: Path, stream: str):
    command = [sys.executable, str(DETECT), *QUICK, "--data", str(shapes), "--epochs", "2", "--workers", "0"]
    if stream == "closed":
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" >&-', "sh", *command], cwd=tmp_path, env=environment(temporary),
            stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
        code, err = done.returncode, done.stderr
    else:
        reader, writer = os.pipe()
        os.close(reader)
        if stream == "full":
            os.close(writer)
            writer = os.open("/dev/full", os.O_WRONLY)
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(temporary), stdout=writer, stderr=subprocess.PIPE, text=True,
            timeout=60,
        )  # fmt: skip
        os.close(writer)
        code, err = done.returncode, done.stderr
    assert (code, err) == (0, "")
    run = tmp_path / "runs" / "detect" / "exp"
    log = (run / "logs" / "rank0.log").read_text()
    assert (run / "metrics.json").exists()
    assert "epoch 2/2  val" in log
    assert log.count("the console is gone") == (stream != "closed")
