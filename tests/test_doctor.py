"""The doctor finds what is provoked, and nothing else."""

import copy
import re
from typing import Any

import pytest

from tests.conftest import ROOT, launch, succeed
from train.doctor import Options, facts, findings

DOCTOR = ROOT / "train" / "doctor.py"


@pytest.fixture
def gpus() -> list[dict[str, Any]]:
    """What two healthy ranks on two GPUs would see: this machine's facts with GPUs that it does not have."""
    seen = facts(Options(mixed_precision="no"))
    seen |= {"driver": "550.1", "CUDA of torch": "12.8", "GPUs seen": 2, "NCCL": True, "ranks on this host": 2}
    seen |= {
        "busy with others": 0.0,
        "disk": 1e12,
        "cores": 16,
        "threads": 8,
        "shared memory": 8e9,
        "open files": 65536,
    }
    return [copy.deepcopy(seen) | {"rank": i, "device": f"cuda:{i}", "uuid": f"GPU-{i}"} for i in range(2)]


def test_healthy_ranks_have_no_finding(gpus):
    assert findings(gpus, Options()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"CUDA of torch": "none: a CPU build", "device": "cpu"}, "is a CPU build. Install one for CUDA"),
        ({"GPUs seen": 0, "device": "cpu", "CUDA_VISIBLE_DEVICES": ""}, "PyTorch sees no GPU"),
        ({"GPUs seen": 1}, "2 processes were started on .* which has 1 GPUs for them. Start 1: GPUS=1"),
        ({"uuid": "GPU-0"}, "Ranks 0, 1 are on one GPU"),
        ({"NCCL": False}, "has no NCCL"),
        ({"shared memory": 64e6}, r"/dev/shm on .* has 64 MB free; 8 workers .* --shm-size"),
        ({"threads": 16}, "2 ranks of 16 threads share the 16 cores.*OMP_NUM_THREADS=8"),
        ({"device": "cpu", "threads": 1}, "leave most of the 16 cores .* idle .*OMP_NUM_THREADS=8"),
        ({"open files": 256}, "allows 256 open files.*ulimit"),
        ({"disk": 1e9}, r"1\.0 GB are free for .*runs/detect.*name another disk with --project"),
        ({"run folder fault": "The folder x cannot be made: / cannot be written to."}, "cannot be written to"),
        ({"device": "cpu", "busy with others": 9.0}, r"Other processes keep 9\.0 of the 16 cores .* OMP_NUM_THREADS=1"),
        ({"precision fault": "bf16 was asked for, which T4 does not compute. Say fp16, or auto."}, "Say fp16"),
    ],
)
def test_each_provoked_fault_is_found_with_its_mend(gpus, change: dict[str, Any], message: str):
    found = findings([seen | change for seen in gpus], Options())
    assert len(found) == 1, found
    assert re.search(message, found[0])


def test_a_name_that_leads_nowhere_is_found_on_several_machines(gpus):
    for i, seen in enumerate(gpus):
        seen |= {"host": f"node{i}", "ranks on this host": 1, "address": ("127.0.1.1", "10.0.0.2")[i], "threads": 16}
    (found,) = findings(gpus, Options())
    assert "The name node0 leads to 127.0.1.1, by which other machines cannot reach it. Set GLOO_SOCKET_IFNAME" in found


def test_different_versions_are_found(gpus):
    gpus[1]["torch"] = "2.6.0"
    (found,) = findings(gpus, Options())
    assert "different versions of torch" in found


def test_two_ranks_here(tmp_path):
    console = succeed(2, DOCTOR, cwd=tmp_path)
    for fact in ("rank", "host", "pid", "device", "driver", "CUDA_VISIBLE_DEVICES", "threads", "open files", "torch"):
        assert sum(line.startswith(fact.ljust(22)) for line in console.splitlines()) == 1, fact
    assert "32 MB in" in console
    assert ", right" in console
    assert "nothing wrong found" in console


def test_what_this_machine_lacks_is_found(tmp_path):
    done = launch(2, DOCTOR, "--mixed-precision", "fp16", cwd=tmp_path, OMP_NUM_THREADS="4096")
    assert done.returncode == 1
    assert done.stdout.count("wrong: --mixed_precision is fp16, which the CPU does not compute") == 1
    assert len(re.findall(r"wrong: 2 ranks of \d+ threads share the \d+ cores", done.stdout)) == 1


def test_more_gpus_than_there_are_is_said_before_the_launch(tmp_path):
    launcher = ROOT / "train" / "processes" / "launcher.py"
    done = launch(1, launcher, "--gpus", 64, "--", DOCTOR, cwd=tmp_path, ACCELERATE_USE_CPU=None)
    assert done.returncode == 2
    assert "64" in done.stderr
    assert "GPU" in done.stderr
