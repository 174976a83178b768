"""Several machines: two launches of one process each, with working directories and copies of the data of their own."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import DETECT, ROOT, TINY, VALIDATE, state_of, succeed
from train.data.shapes import draw_shapes

TORCHRUN = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
ACCELERATE = [
    "-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/accelerate_configs/multi_node.yaml",
    "--num_processes", "2", "--main_process_ip", "127.0.0.1",
]  # fmt: skip
OPTIONS = "--imgsz 64 --batch 8 --nbs 8 --warmup-epochs 0 --workers 0 --trackers none --no-plots"
TRAIN = ["--data", "data/shapes/shapes.yaml", "--model", str(TINY), *OPTIONS.split()]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(machine: int, port: int, command: list[object], cwd: Path, accelerate: bool = False) -> subprocess.Popen:
    """One of two machines."""
    launcher = [*ACCELERATE, "--machine_rank", machine, "--main_process_port", port]
    if not accelerate:
        launcher = [*TORCHRUN, "--node_rank", machine, "--master_port", port]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "YOLO_", "ACCELERATE_"))}
    clean |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *map(str, launcher), *map(str, command)], cwd=cwd, env=clean,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def both(
    folder: Path, command: list[object], other: list[object] | None = None, accelerate: bool = False
) -> list[tuple]:
    """Run a command on both machines, or `other` on the second; (code, output, errors) of each."""
    port = free_port()
    machines = [
        start(i, port, command if i == 0 or other is None else other, folder / f"m{i}", accelerate) for i in (0, 1)
    ]
    said = [machine.communicate(timeout=120) for machine in machines]
    return [(machine.returncode, *text) for machine, text in zip(machines, said, strict=True)]


def well(results: list[tuple]) -> list[str]:
    assert all(code == 0 for code, _, _ in results), "\n".join(
        f"{out[-1500:]}\n{err[-2500:]}" for _, out, err in results
    )
    return [out for _, out, _ in results]


def errors(results: list[tuple]) -> list[str]:
    """What both machines said that went wrong."""
    assert all(code != 0 for code, _, _ in results)
    return [line for _, _, err in results for line in err.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two machines with the same data, which have trained for two epochs, and the same on one in `one`."""
    folder = tmp_path_factory.mktemp("machines")
    for name in ("m0", "m1", "one"):
        draw_shapes(folder / name / "data", {"train": 40, "val": 21})
    (folder / "m1" / "runs" / "detect" / "exp").mkdir(parents=True)  # of somebody else; it must be left alone
    consoles = well(both(folder, [DETECT, *TRAIN, "--epochs", 2], accelerate=True))
    assert consoles[1] == ""
    assert "processes  2 processes on cpu" in consoles[0]
    succeed(2, DETECT, *TRAIN, "--epochs", 2, cwd=folder / "one")
    return folder


def same(a: Path, b: Path) -> None:
    """Two runs ended with the same bits, and name the same images wherever each machine has them."""
    states = [state_of(run) for run in (a, b)]
    for part in ("model", "ema", "images"):
        assert all(torch.equal(states[0][part][name], value) for name, value in states[1][part].items())
    assert json.loads((a / "metrics.json").read_text()) == json.loads((b / "metrics.json").read_text())
    rows = [list(csv.DictReader((run / "results.csv").open())) for run in (a, b)]
    assert len(rows[0]) == len(rows[1]) > 0
    for one, other in zip(*rows, strict=True):
        timed = ("time", "seconds", "speed", "memory", "images_per_s", "data_wait", "step")
        names = [name for name in one if not any(word in name for word in timed)]
        assert any("AP" in name for name in names)
        assert {name: one[name] for name in names} == {name: other[name] for name in names}


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_two_machines_train_what_one_trains_and_leave_files_where_they_belong(machines: Path):
    same(machines / "m0" / "runs" / "detect" / "exp", machines / "one" / "runs" / "detect" / "exp")
    assert files(machines / "m1" / "runs") == ["detect/exp2/logs/rank1.log"]
    assert "logs/rank1.log" not in files(machines / "m0" / "runs" / "detect" / "exp")
    assert files(machines / "m0" / "runs" / "detect" / "exp")[:2] == [".lock", "config.json"]


def test_they_evaluate_what_one_evaluates(machines: Path):
    best = machines / "m0" / "runs" / "detect" / "exp" / "weights" / "best.pt"
    (machines / "m1" / "best.pt").write_bytes(best.read_bytes())
    options = ["--data", "data/shapes/shapes.yaml", "--no-plots", "--workers", 0, "--save-dir", "val"]
    well(both(machines, [VALIDATE, "--weights", best, *options], [VALIDATE, "--weights", "best.pt", *options]))
    for name in ("metrics.json", "predictions.json"):
        found = (machines / "m0" / "val" / name).read_bytes()
        assert found == (best.parent.parent / name).read_bytes()
    assert files(machines / "m1" / "val") == ["logs/rank1.log"]


@pytest.mark.slow
def test_a_run_goes_on_on_two_machines_on_one_and_back(machines: Path, tmp_path: Path):
    """The second machine has no folder of the run, and later one that is stale."""
    for name in ("m0", "m1", "one"):
        shutil.copytree(machines / name, tmp_path / name)
    shutil.rmtree(tmp_path / "m1" / "runs")
    run = ["--resume", "runs/detect/exp", "--data", "data/shapes/shapes.yaml"]
    well(both(tmp_path, [DETECT, *run, "--epochs", 3]))
    succeed(2, DETECT, *run, "--epochs", 3, cwd=tmp_path / "one")
    same(tmp_path / "m0" / "runs" / "detect" / "exp", tmp_path / "one" / "runs" / "detect" / "exp")
    assert files(tmp_path / "m1" / "runs") == ["detect/exp/logs/rank1.log"]
    stale = tmp_path / "m1" / "runs" / "detect" / "exp"
    shutil.copytree(machines / "m0" / "runs" / "detect" / "exp", stale, dirs_exist_ok=True)
    before = {name: (stale / name).read_bytes() for name in files(stale) if "logs" not in name}
    for name in ("m0", "one"):  # on one machine of two processes
        succeed(2, DETECT, *run, "--epochs", 4, cwd=tmp_path / name)
    well(both(tmp_path, [DETECT, *run, "--epochs", 5]))
    succeed(2, DETECT, *run, "--epochs", 5, cwd=tmp_path / "one")
    same(tmp_path / "m0" / "runs" / "detect" / "exp", tmp_path / "one" / "runs" / "detect" / "exp")
    assert {name: (stale / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_what_differs_between_the_machines_is_named(machines: Path, tmp_path: Path):
    for name in ("m0", "m1"):
        shutil.copytree(machines / name / "data", tmp_path / name / "data")
    first = [DETECT, *TRAIN, "--epochs", 1]
    said = errors(both(tmp_path, first, [DETECT, *TRAIN, "--epochs", 1, "--lr0", 0.02, "--workers", 1]))
    assert len(said) == 1
    assert said[0].startswith("error: --lr0 is 0.01 on rank 0 (")
    assert "and 0.02 on rank 1 (" in said[0]
    image = sorted((tmp_path / "m1" / "data" / "shapes" / "images" / "val").iterdir())[3]
    image.write_bytes(image.read_bytes() + b" ")
    said = errors(both(tmp_path, first))
    assert len(said) == 1
    assert (
        f"First that differs: images/val/{image.name}, {image.stat().st_size - 1} bytes and {image.stat().st_size}"
        in said[0]
    )
    image.unlink()
    said = errors(both(tmp_path, first))
    assert len(said) == 1
    assert "21 on " in said[0]
    assert "20 on " in said[0]
    assert f"{image.name}, " in said[0]
    assert not (tmp_path / "m0" / "runs").exists()


@pytest.fixture
def copies(machines: Path, tmp_path: Path) -> Path:
    """Two machines that have the data, and no run."""
    for name in ("m0", "m1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").symlink_to(machines / name / "data")
    return tmp_path


def test_a_machine_that_fails_before_they_have_met_ends_the_other(copies: Path):
    port, begun = free_port(), time.monotonic()
    first = start(0, port, [DETECT, *TRAIN, "--epochs", 1], copies / "m0")
    second = start(1, port, [DETECT, *TRAIN, "--epochs", 1, "--batch", 0], copies / "m1")
    assert "error: --batch is 0; it must be between" in second.communicate(timeout=60)[1]
    _, err = first.communicate(timeout=60)
    assert time.monotonic() - begun < 40
    assert first.returncode != 0
    assert "error: " not in err.split("Traceback")[0]  # it is said on the other
    assert not (copies / "m0" / "runs").exists()


@pytest.mark.slow
def test_the_doctor_sees_both_machines(copies: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")  # else it says that each of the two leaves cores idle
    console, other = well(both(copies, [ROOT / "train" / "doctor.py", "--workers", 0]))
    assert other == ""
    assert re.search(r"^rank +0 +1$", console, re.MULTILINE)
    assert "32 MB in" in console
    assert "nothing wrong found" in console


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(copies: Path):
    port, sleeps = free_port(), copies / "sleeps.py"
    sleeps.write_text("import time; time.sleep(100)")
    first = start(0, port, [DETECT, *TRAIN, "--epochs", 1, "--hang-timeout", 4], copies / "m0")
    second = start(1, port, [sleeps], copies / "m1")
    _, err = first.communicate(timeout=60)
    second.terminate()
    second.communicate(timeout=60)
    assert first.returncode != 0
    assert err.count("error: Of 2 processes 1 have met within 4 s (--hang-timeout); rank 1 did not come") == 1
    assert not (copies / "m0" / "runs").exists()


@pytest.mark.slow
def test_a_machine_that_never_comes_is_waited_for_as_long_as_the_launcher_is_told(copies: Path):
    launcher = [*ACCELERATE, "--machine_rank", "0", "--main_process_port", free_port(), "--rdzv_conf", "timeout=4"]
    done = subprocess.run(
        [sys.executable, *map(str, [*launcher, DETECT, *TRAIN])], cwd=copies / "m0", capture_output=True, text=True,
        timeout=60, env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "1/2 clients joined" in done.stderr.splitlines()[-1]


def test_a_machine_that_dies_ends_the_other(copies: Path):
    port = free_port()
    ranks = [start(i, port, [DETECT, *TRAIN, "--epochs", 500], copies / f"m{i}") for i in (0, 1)]
    stdout = ranks[0].stdout
    assert stdout is not None
    for line in stdout:
        if line.startswith("epoch 2/500"):
            break
    begun = time.monotonic()
    for process in [*subprocess.check_output(["pgrep", "-P", str(ranks[1].pid)], text=True).split(), ranks[1].pid]:
        os.kill(int(process), signal.SIGKILL)
    ranks[1].wait(timeout=10)
    _, err = ranks[0].communicate(timeout=60)
    assert time.monotonic() - begun < 15
    assert ranks[0].returncode != 0
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
    status = json.loads((copies / "m0" / "runs" / "detect" / "exp" / "status.json").read_text())
    assert (status["state"], status["rank"]) == ("failed", 1)


SRUN = """#!/bin/bash
# What SLURM's does, for two nodes of this computer: the command on each, the signals of a job step to all of it.
shift  # --kill-on-bad-exit=1
for node in 0 1; do SLURM_NODEID=$node "$@" & pids="$pids $!"; done
trap 'kill -TERM $pids' TERM
trap 'kill -USR1 $pids' USR1
echo $$ > srun.pid
code=0
for pid in $pids; do wait $pid || code=$?; done
for pid in $pids; do wait $pid || code=$?; done  # a signal ends the first wait
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> scontrol.txt; fi
"""


@pytest.mark.slow
def test_the_batch_file_of_the_readme_is_preempted_and_goes_on(machines: Path, tmp_path: Path):
    text = (ROOT / "README.md").read_text()
    batch = "#!/bin/bash\n#SBATCH" + text.split("```bash\n#!/bin/bash\n#SBATCH")[1].split("```")[0]
    batch = batch.replace("GPUS=8", "GPUS=1").replace("--batch 256 --mixed-precision bf16", "$MORE")
    batch = batch.replace("--data coco.yaml --model yolov8n.pt", "")
    (tmp_path / "train.sbatch").write_text(batch)
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("train", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").symlink_to(machines / "m0" / "data")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "YOLO_", "ACCELERATE_"))}
    environment |= {"SLURM_JOB_ID": str(free_port() % 10000), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    environment |= {"SLURM_CPUS_PER_TASK": "1", "MORE": " ".join([*TRAIN, "--epochs", "500"])}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for attempt, words in enumerate(("tiny.yaml from scratch", "tiny.yaml, resumed after ")):
        job = subprocess.Popen(
            ["bash", "train.sbatch"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert job.stdout is not None
        said = []
        for line in job.stdout:
            said.append(line)
            if sum(one.startswith("epoch") and "  train  " in one for one in said) == 2:  # one epoch is saved
                break
        assert any(words in line for line in said), "".join(said) + job.stderr.read()  # type: ignore[union-attr]
        os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
        job.communicate(timeout=60)
        assert (tmp_path / "scontrol.txt").read_text().count(f"requeue {environment['SLURM_JOB_ID']}") == attempt + 1
    assert files(tmp_path / "runs")[0].startswith(f"job{environment['SLURM_JOB_ID']}/exp/")
    assert len(list((tmp_path / "runs").glob("*/*"))) == 1
