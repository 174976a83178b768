"""Real launches: every way of starting gives the right number of ranks; and canaries for what Accelerate does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import DETECT, ROOT, launch, succeed
from train.config.errors import InputError
from train.processes import launcher
from train.processes.devices import check_devices, check_launcher, pick_precision
from train.processes.launcher import launch_options

SAYS_RANKS = ROOT / "tests" / "workers" / "ranks.py"


def said(command: list[str], **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    done = subprocess.run(
        command, env=clean | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(torch.accelerator.is_available(), reason="these commands would take the GPU")
@pytest.mark.parametrize(
    ("command", "ranks"),
    [
        ([], 1),
        (["-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/accelerate_configs/cpu.yaml"], 1),
        (["-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/accelerate_configs/multi_cpu.yaml"], 2),
        pytest.param(
            ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"], 2,
            marks=pytest.mark.slow,
        ),
        (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], 2),
    ],
)  # fmt: skip
def test_every_launcher_gives_its_number_of_ranks(command: list[str], ranks: int):
    out = said([sys.executable, *command, str(SAYS_RANKS)])
    assert sorted(line for line in out.splitlines() if line.startswith("rank")) == [
        f"rank {rank} of {ranks}, sum {sum(range(ranks))}, on cpu" for rank in range(ranks)
    ]


def test_an_error_on_the_main_process_ends_all_ranks_and_is_said_once(tmp_path: Path):
    done = launch(2, SAYS_RANKS, "fail", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: only the main process knows") == 1
    assert "rank 1 still here" not in done.stdout


def test_ranks_that_do_not_add_up_are_an_error(tmp_path: Path):
    # Two processes were announced, but the state was made as one before: what happens under a foreign launcher.
    done = subprocess.run(
        [sys.executable, str(SAYS_RANKS), "alone"],
        env=os.environ | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                         "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "started 2 processes, but Accelerate counts 1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--cpus", "two"], {}, "error: CPUS is 'two'; it must be a whole number."),
        (["--cpus", "0"], {}, "error: CPUS is 0; it must be 1 or more."),
        (["--gpus", "1", "--cpus", "1"], {}, "error: GPUS=1 and CPUS=1 were both given; give one."),
        (["--cpus", "2"], {"OMP_NUM_THREADS": "abc"}, "error: OMP_NUM_THREADS is 'abc'; it must be a whole number"),
        (["--gpus", ""], {"ACCELERATE_USE_CPU": "maybe"}, "error: ACCELERATE_USE_CPU is 'maybe'; it must be true or"),
    ],
)
def test_the_launcher_speaks_in_the_words_of_make(arguments, environment, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launcher", *arguments, "--", "script.py"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        launcher.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(message)


def test_what_a_foreign_launcher_may_ask_for(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match=r"asks for fp8, .* Say --mixed-precision auto"):
        pick_precision(None, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="MASTER_ADDR is not set"):
        check_launcher()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(InputError, match="WORLD_SIZE is 'many'; a launcher sets it to a whole number"):
        check_launcher()


def test_a_launchers_number_that_is_none_is_said(tmp_path: Path):
    done = launch(1, DETECT, "--epochs", 0, cwd=tmp_path, WORLD_SIZE="many")
    assert done.returncode == 2
    assert done.stderr.startswith("error: WORLD_SIZE is 'many'; a launcher sets it to a whole number. Unset it.")
    assert done.stderr.count("\n") == 1


def test_launch_options(monkeypatch):
    monkeypatch.setattr(launcher, "device_type", lambda: "cpu")
    monkeypatch.setattr(launcher, "core_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert launch_options(None, None) == ({}, [])
    assert launch_options(None, 2)[0] == {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "4"}
    assert launch_options(None, 2)[1][-2:] == ["--num_processes", "2"]
    with pytest.raises(InputError, match=r"sees no GPU \(CUDA_VISIBLE_DEVICES='3'\).*CPUS=2"):
        launch_options(2, None)
    with pytest.raises(InputError, match="both given"):
        launch_options(1, 1)
    monkeypatch.setattr(launcher, "device_type", lambda: "cuda")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"PyTorch sees 1 CUDA device \(CUDA_VISIBLE_DEVICES='3'\). Type GPUS=1"):
        launch_options(2, None)
    assert launch_options(None, None) == ({}, [])
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert launch_options(None, None)[1][-2:] == ["--num_processes", "4"]
    monkeypatch.setattr(launcher, "device_type", lambda: "mps")
    with pytest.raises(InputError, match="MPS trains in one"):
        check_devices(2, "mps")
    assert launch_options(None, None) == ({}, [])


def test_precision(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert pick_precision(None, "cpu") == ("no", "the default")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert pick_precision(None, "cpu") == ("bf16", "the launcher's")
    assert pick_precision("no", "cpu") == ("no", "asked for")
    with pytest.raises(InputError, match="fp16, which the CPU does not compute"):
        pick_precision("fp16", "cpu")


def test_gather_for_metrics_keeps_one_element_per_rank_after_a_loop(tmp_path: Path):
    out = succeed(2, SAYS_RANKS, "gather", cwd=tmp_path)
    assert "gathered [[0], [1, 1]]" in out
    assert "rank 0 was handed [[0], [1, 1]]\n" in out
    assert "rank 1 was handed []\n" in out


def test_the_launcher_leaves_the_threads_and_settings_alone(tmp_path: Path):
    script = tmp_path / "says.py"
    script.write_text("import os; print(os.environ.get('OMP_NUM_THREADS'), os.environ.get('YOLO_CONFIG_DIR'))")
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "YOLO_CONFIG_DIR")}
    command = [sys.executable, "-m", "train.processes.launcher", "--gpus", "", "--cpus", "", "--", str(script)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["None", "None"]
