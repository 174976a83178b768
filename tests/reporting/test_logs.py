"""What a run says, on pipes and on a terminal, and when a rank fails, hangs or is slow."""

import csv
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from tests.conftest import DETECT, ROOT, TINY, launch, succeed
from train.config.options import TrainConfig
from train.reporting.console import NO_TERMINAL
from train.reporting.report import Report

FAULTY = ROOT / "tests" / "workers" / "faulty.py"
QUICK = ["--model", str(TINY), "--imgsz", "64", "--epochs", "2", "--batch", "8", "--nbs", "8"]
QUICK += ["--warmup-epochs", "0", "--workers", "0", "--trackers", "none"]


def structure(console: str) -> list[str]:
    """Console lines with the numbers and paths masked."""
    text = re.sub(r"/\S+", "PATH", console).replace(", gloo", "").replace("processes", "process")
    text = re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "#", text)
    lines = (re.sub(r"\s+", " ", line) for line in text.splitlines())
    return [line for line in lines if not line.startswith("warning: slower")]  # two cores for four ranks: it may be so


def test_the_same_lines_for_1_2_and_4_processes(runs):
    lines = structure(runs[1][1])
    assert lines == structure(runs[2][1]) == structure(runs[4][1])
    # five steps an epoch, a line after the second and the fourth; the last has the epoch's own line
    assert sum(" step " in line for line in lines) == 2 * 2
    assert sum(" train box" in line for line in lines) == sum(" val box" in line for line in lines) == 2
    assert all(
        "data wait #% (rank #) #.# GB (rank #)" in line.replace("# GB", "#.# GB") for line in lines if " step " in line
    )
    text = re.sub(" +", " ", runs[4][1])
    assert "batch 8 images over 4 processes x 1 accumulated = 8 a step" in text


def test_pipes_get_whole_lines_and_nothing_else(runs):
    for _, console in runs.values():
        assert "\r" not in console
        assert "could not be written" not in console
        assert "\x1b" not in console


def test_every_rank_has_a_log_with_everything(runs):
    for ranks, (folder, console) in runs.items():
        logs = {file.name: file.read_text() for file in (folder / "logs").iterdir()}
        assert sorted(logs) == [f"rank{rank}.log" for rank in range(ranks)]
        for rank in range(ranks):
            text = logs[f"rank{rank}.log"]
            assert re.match(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} rank{rank} INFO ", text)
            for other in range(ranks):  # step time and data wait of every rank, in the files
                assert len(re.findall(rf"rank {other}: [\d.]+ s a step, .*data wait [\d.]+ s", text)) == 2
        assert all(line in logs["rank0.log"] for line in console.splitlines() if line)
        assert (folder.parents[2] / "here" / "log.txt").read_text() == logs["rank0.log"]


def test_results_csv(runs):
    for folder, _ in runs.values():
        with open(folder / "results.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["epoch"] for row in rows] == ["1", "2"]
        wanted = {"seconds", "images_per_s", "peak_memory_gb", "global_step", "lr/pg0", "lr/pg1", "lr/pg2"}
        wanted |= {f"{part}/{loss}_loss" for part in ("train", "val") for loss in ("box", "cls", "dfl")}
        assert wanted | {"val/AP", "val/AP50", "val/APs", "val/AR100", "val/P", "val/R", "val/F1"} <= set(rows[0])


def test_at_most_twelve_lines_an_epoch_by_default(shapes: Path, tmp_path: Path):
    options = ["--data", shapes, *QUICK, "--epochs", 1, "--batch", 1, "--nbs", 1, "--fraction", 100]
    console = succeed(1, DETECT, "--data", shapes, *options[2:], "--no-plots", cwd=tmp_path)
    mine = [line for line in console.splitlines() if line.startswith(("epoch 1/1", "validation took", "warning"))]
    assert 4 <= len(mine) <= 12
    losses = [re.search(r"box ([\d.]+)", line)[1] for line in mine if " step " in line]
    assert len(set(losses)) == len(losses) == 3  # 40 steps, a line every ten


def test_progress_off_and_levels(shapes: Path, tmp_path: Path):
    options = ["--data", shapes, *QUICK, "--epochs", 1, "--log-interval", 1, "--progress", "off", "--no-plots"]
    console = succeed(2, DETECT, *options, "--log-level", "warning", cwd=tmp_path)
    assert " step " not in console
    assert "epoch 1/1  train" in console
    logs = [(tmp_path / "runs" / "detect" / "exp" / "logs" / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert not any(" INFO " in log for log in logs)


# A terminal -----------------------------------------------------------------------------------------------------------
def on_a_terminal(options: list[object], cwd: Path, script: Path = DETECT, **environment: str) -> str:
    """Everything that the script writes to a pseudo-terminal of 120 columns."""
    main, secondary = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    base = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", *NO_TERMINAL)}
    base |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TERM": "xterm", **environment}
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, options)], cwd=cwd, env=base,
        stdin=secondary, stdout=secondary, stderr=secondary,
    )  # fmt: skip
    os.close(secondary)
    said = b""
    while True:
        ready, _, _ = select.select([main], [], [], 0.2)
        try:
            part = os.read(main, 65536) if ready else b""
        except OSError:  # the other side is closed
            break
        said += part
        if not ready and process.poll() is not None:
            break
    assert process.wait() == 0, said.decode()[-2000:]
    os.close(main)
    return said.decode()


def test_a_terminal_gets_one_live_bar_and_finished_lines_above(shapes: Path, tmp_path: Path):
    options = ["--data", shapes, *QUICK, "--log-interval", 1, "--sync-bn", "--no-plots", "--index-dir", "index"]
    said = on_a_terminal(options, tmp_path)
    bars = [part for part in re.split(r"[\r\n]", said) if "epoch 1/2:" in part and "step" in part]
    assert len(bars) >= 5
    assert any(re.search(r"4/5 \[.*<.*box [\d.]+ .*lr \S+ \d+ images/s\]", bar) for bar in bars)  # with ETA
    parts = re.split(r"[\r\n]", said)
    for bar, count in (("reading labels", 40), ("reading labels", 21), ("validating", r"\d")):
        assert any(re.match(rf"(\x1b\[\w*)*{bar}: .*/{count} \[", part) for part in parts), bar
    assert "\x1b[33mwarning: --sync-bn is ignored" in said
    assert "epoch 1/2  train  box" in said
    log = (tmp_path / "runs" / "detect" / "exp" / "logs" / "rank0.log").read_text()
    assert "\r" not in log
    assert "\x1b" not in log
    assert "epoch 1/2  step 3/5" in log


def test_a_bar_follows_the_terminals_width_and_leaves_nothing_behind(tmp_path: Path):
    said = on_a_terminal([], tmp_path, ROOT / "tests" / "workers" / "resized.py", PYTHONPATH=str(ROOT))
    drawn = {w: re.split(rf"<{w}>", said)[1].split("<")[0] if w != 120 else "" for w in (120, 60, 45)}
    for columns, before in ((60, 120), (45, 60)):
        first, *bars = drawn[columns].split("\x1b[J")
        assert first == f"\x1b[{-(-before // columns) - 1}A\r"  # the old line has been broken into so many rows
        bars = [bar for bar in "".join(bars).split("\r") if bar.strip()]
        assert all(len(bar) <= columns for bar in bars), bars
        assert len(bars[-1].rstrip()) > columns - 20
    assert "box 1.234 cls 5.012 dfl 1.234" in drawn[60].split("\r")[-1]
    assert re.search(r"\r +\r<end>$", said)


def test_a_bar_for_what_is_counted_and_nothing_elsewhere(capsys):
    def slow() -> Iterator[int]:
        for i in range(3):
            time.sleep(0.12)  # the bar moves every tenth of a second
            yield i

    for progress in ("bar", "lines"):
        one = Report(Accelerator(cpu=True), TrainConfig(progress=progress))
        assert list(one.reading(slow(), 3)) == [0, 1, 2]
        one.say("a line")
        one.close()
        said = capsys.readouterr().out
        assert ("2/3" in said) == (progress == "bar")
        assert said.endswith("a line\n")


def test_lines_on_a_terminal_without_colour(shapes: Path, tmp_path: Path):
    options = ["--data", shapes, *QUICK, "--epochs", 1, "--sync-bn", "--progress", "lines", "--no-plots"]
    said = on_a_terminal(options, tmp_path, NO_COLOR="1")
    assert "\x1b" not in said
    assert "\r" not in said.replace("\r\n", "\n")


def test_notebooks_and_forced_colours(monkeypatch, capsys):
    for name in (*NO_TERMINAL, "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def report(terminal: bool, **environment: str) -> Report:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
            one = Report(Accelerator(cpu=True), TrainConfig(trackers=("none",)))
        one.say("warning: so")
        one.close()
        return one

    def shows(one: Report) -> tuple[bool, bool]:
        return one.console.shows_bar, one.console.colours

    assert shows(report(True)) == (True, True)
    assert shows(report(True, JPY_PARENT_PID="1")) == (False, False)  # the terminal of a notebook
    assert shows(report(True, NO_COLOR="1")) == (True, False)
    assert shows(report(False, FORCE_COLOR="1")) == (False, True)
    assert capsys.readouterr().out.count("\x1b[33mwarning: so\x1b[0m") == 2


# When something is wrong ----------------------------------------------------------------------------------------------
def faulty(kind: str, shapes: Path, cwd: Path, *options: object) -> tuple[subprocess.CompletedProcess, float]:
    """A training on two processes with something wrong on rank 1, and how long it took."""
    started = time.monotonic()
    base = ["--data", shapes, *QUICK, "--epochs", 1, "--log-interval", 1, "--no-plots", *options]
    return launch(2, FAULTY, kind, 1, *base, cwd=cwd), time.monotonic() - started


def test_a_rank_that_fails_is_named_once_and_ends_all(shapes: Path, tmp_path: Path):
    started = time.time()
    done, _ = faulty("fail", shapes, tmp_path)
    assert done.returncode != 0
    log = tmp_path / "runs" / "detect" / "exp" / "logs" / "rank1.log"
    assert time.time() - log.stat().st_mtime < 15
    assert done.stderr.count("broken on purpose") == 1
    assert re.search(r"error: rank 1 of 2 on \S+ failed: ValueError: broken on purpose", done.stderr)
    assert f"the traceback is in {log}" in done.stderr
    assert "faulty.py" not in done.stderr.split("the traceback is in")[0]  # no traceback of ours on the console
    text = log.read_text()
    assert "Traceback (most recent call last)" in text
    assert 'raise ValueError("broken on purpose")' in text
    assert time.time() - started < 60


def test_a_rank_that_hangs_is_named_with_where_it_stands(shapes: Path, tmp_path: Path):
    done, seconds = faulty("hang", shapes, tmp_path, "--hang-timeout", 4)
    assert done.returncode != 0
    assert seconds < 90
    assert "no step finished for" in done.stderr
    assert done.stderr.count("error: ") == 1
    verdict = done.stderr.split("Did not arrive:")[1]
    assert re.search(r"rank 1 of 2, at waiting for batch \d \(", verdict)
    assert "rank 0 of 2" not in verdict.split("The stacks")[0]
    for rank in (0, 1):
        log = (tmp_path / "runs" / "detect" / "exp" / "logs" / f"rank{rank}.log").read_text()
        assert "most recent call first" in log
        assert "Thread 0x" in log
    assert "faulty.py" in log  # rank 1 sleeps there


def test_a_slow_rank_is_named(shapes: Path, tmp_path: Path):
    done, _ = faulty("slow", shapes, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"warning: slower than the median rank: rank 1 by \d+% \(data wait 0\.[1-9]", done.stdout)


def test_a_killed_run_has_its_last_line(shapes: Path, tmp_path: Path):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(DETECT),
        "--data",
        str(shapes),
        *QUICK,
        "--epochs",
        "50",
        "--log-interval",
        "1",
    ]
    process = subprocess.Popen(
        [*command, "--no-plots"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/50  step 3"):
            process.kill()
            break
    rest = [line, *process.stdout]
    process.wait()
    log = (tmp_path / "runs" / "detect" / "exp" / "logs" / "rank0.log").read_text()
    assert all(said.strip() in log for said in rest if said.endswith("\n"))


def test_the_configuration_holds_versions_and_no_environment(runs):
    config = json.loads((runs[1][0] / "config.json").read_text())
    assert {"torch", "ultralytics", "accelerate", "python"} <= set(config["versions"])
