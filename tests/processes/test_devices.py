"""What a process may use: cores, precisions, launchers' modes."""

import os
from pathlib import Path

import pytest
import torch

from train.config.errors import InputError
from train.processes import cores, devices, room
from train.processes.cores import core_count, cores_of_rank
from train.processes.devices import check_launcher, lacks, pick_precision


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 16 cores, and the folder that its control groups are mounted in."""
    monkeypatch.setattr(cores, "cores", lambda: list(range(16)))
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "OWN_CGROUPS", tmp_path / "own")
    for name in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_without_limits_it_is_the_affinity(machine: Path, monkeypatch: pytest.MonkeyPatch):
    assert core_count() == 16
    group(machine / "a", cpu__max="max 100000\n")
    (machine / "own").write_text("0::/a\n")
    assert core_count() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert cores_of_rank() == 5


@pytest.mark.parametrize(
    ("own", "groups", "count"),
    [
        ("0::/\n", {".": {"cpu__max": "250000 100000\n"}}, 2),  # a container: its group is the root
        ("0::/pod/box\n", {"pod": {"cpu__max": "400000 100000"}, "pod/box": {"cpu__max": "max 100000"}}, 4),
        ("0::/../../other\n", {".": {"cpu__max": "50000 100000"}}, 1),  # less than a core
        (
            "4:memory:/a\n3:cpu,cpuacct:/docker/123\n",  # version 1, of which the path is the host's
            {"cpu": {"cpu__cfs_quota_us": "600000", "cpu__cfs_period_us": "100000"}},
            6,
        ),
        ("3:cpu:/a\n0::/\n", {"cpu/a": {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}}, 16),
    ],
)
def test_quotas_of_containers_count(machine: Path, own: str, groups: dict[str, dict[str, str]], count: int):
    (machine / "own").write_text(own)
    for name, files in groups.items():
        group(machine / name, **files)
    assert core_count() == count


@pytest.mark.parametrize(
    ("own", "groups", "left"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {".": {"memory__max": "max\n", "memory__current": "5\n", "memory__stat": ""}}, None),
        (
            "0::/pod/box\n",
            {
                "pod": {"memory__max": "5000", "memory__current": "4000", "memory__stat": "a 9\ninactive_file 500\n"},
                "pod/box": {"memory__max": "9000", "memory__current": "1000", "memory__stat": "inactive_file 0\n"},
            },
            1500,  # the pod's, which gives up what it has only read
        ),
        (
            "4:memory:/a\n0::/\n",
            {
                "memory": {
                    "memory__limit_in_bytes": "3000", "memory__usage_in_bytes": "4000",
                    "memory__stat": "total_inactive_file 10\n",
                }
            },
            0,
        ),
    ],
)  # fmt: skip
def test_a_containers_limit_of_memory_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, groups: dict[str, dict[str, str]], left: int | None
):
    monkeypatch.setattr(room, "CGROUPS", tmp_path)
    monkeypatch.setattr(room, "OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(own)
    for name, files in groups.items():
        group(tmp_path / name, **files)
    if left is None:
        assert room.memory() > 10**8
    else:
        assert room.memory() == left


def test_what_slurm_gave_the_task_counts(machine: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert core_count() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cores_of_rank() == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_affinity_counts():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert core_count() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_bf16_is_refused_where_the_ranks_own_gpu_has_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ("A100", "Tesla T4")[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((8, 0), (7, 5))[index])
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert pick_precision("bf16", "cuda") == ("bf16", "asked for")
    assert pick_precision("auto", "cuda") == ("bf16", "A100 computes bf16")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.own_gpu() == 1
    with pytest.raises(InputError, match="--mixed_precision is bf16, which Tesla T4 does not compute"):
        pick_precision("bf16", "cuda")
    assert pick_precision("auto", "cuda") == ("fp16", "Tesla T4 computes fp16 fast but has no bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(InputError, match="which Tesla T4 does not compute"):
        pick_precision(None, "cuda")
    assert lacks("fp16", "cuda") == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 0))
    assert pick_precision("auto", "cuda")[0] == "no"


@pytest.mark.parametrize(
    ("amx", "avx", "intel", "precision"),
    [(True, True, True, "bf16"), (False, True, False, "bf16"), (False, True, True, "no"), (False, False, False, "no")],
)
def test_bf16_is_picked_on_a_cpu_that_is_faster_in_it(monkeypatch, amx: bool, avx: bool, intel: bool, precision: str):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(devices, "_is_intel", lambda: intel)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert pick_precision("auto", "cpu")[0] == precision


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DEEPSPEED"),
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "asks for MEGATRON_LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "asks for PARALLELISM_CONFIG"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps: 4, .* Say --nbs"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", r"asks for torch.compile \(dynamo_backend: INDUCTOR\)"),
    ],
)
def test_modes_that_would_change_the_loss_are_refused(monkeypatch, variable: str, value: str, message: str):
    check_launcher()
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=message):
        check_launcher()
