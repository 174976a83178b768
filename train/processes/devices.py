"""What this machine has and what the launcher says: devices, precision, memory, the number of processes."""

import os
import resource
import sys
import time
from dataclasses import dataclass

import psutil
import torch

from train.config.errors import InputError
from train.config.options import Precision

YES, NO = ("1", "true", "yes", "on", "t", "y"), ("0", "false", "no", "off", "f", "n", "")  # as Accelerate has it


def launched(variable: str, default: int) -> int:
    """A number that torchrun or accelerate launch tell each process they start: WORLD_SIZE, RANK, LOCAL_RANK, …"""
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        raise InputError(f"{variable} is {value!r}; a launcher sets it to a whole number. Unset it, or use a launcher.")
    return int(value)


def local_processes() -> int:
    """Processes of this run on this machine."""
    return launched("LOCAL_WORLD_SIZE", 1)


def device_type() -> str:
    """`cuda`, `mps`, `cpu`, …: the kind of device this run uses; ACCELERATE_USE_CPU=true asks for the CPU."""
    value = os.environ.get("ACCELERATE_USE_CPU", "false").lower()
    if value not in (*YES, *NO):
        raise InputError(f"ACCELERATE_USE_CPU is {value!r}; it must be true or false.")
    if value in YES or not torch.accelerator.is_available():
        return "cpu"
    return torch.accelerator.current_accelerator().type  # type: ignore[union-attr]


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@dataclass(frozen=True)
class Usage:
    """How long the cores have been in use at one moment, in seconds."""

    clock: float
    busy: float  # all cores that this process may use, by anybody
    own: float  # by this process

    @classmethod
    def now(cls) -> "Usage":
        """Read the counters."""
        every = psutil.cpu_times(percpu=True)
        mine = [every[core] for core in cores() if core < len(every)]
        idle = sum(times.idle + getattr(times, "iowait", 0) for times in mine)
        return cls(time.perf_counter(), sum(map(sum, mine)) - idle, time.process_time())

    def others_since(self, before: "Usage") -> float:
        """Cores that others have kept busy: neither this process nor its fellow ranks, which do as much as this one."""
        own = (self.own - before.own) * local_processes()
        return max(self.busy - before.busy - own, 0) / max(self.clock - before.clock, 1e-9)


def shared_cores(busy: float, number: int, host: str) -> str:
    """What it means that other processes keep so many of the cores busy, and the mend."""
    return (
        f"Other processes keep {busy:.1f} of the {number} cores of {host} busy. Threads of two trainings on the same "
        "cores wait for each other, many times slower than one after the other. Let one end first, give each cores of "
        "its own (taskset -c 0-3 …), or set OMP_NUM_THREADS=1 for both."
    )


def check_devices(wanted: int, device: str) -> None:
    """Raise InputError where this machine has fewer devices than the processes that are to run on it."""
    if device == "mps" and wanted > 1:
        raise InputError(f"{wanted} processes were asked for, but Apple's MPS trains in one. Start one process.")
    if device in ("cpu", "mps"):
        return
    seen = torch.accelerator.device_count()
    if wanted > seen:
        raise InputError(
            f"{wanted} GPU processes were asked for, but PyTorch sees {seen} {device.upper()} device{'s'[: seen != 1]} "
            f"({visible()}). Type GPUS={seen}, or CPUS={wanted} for processes on the CPU."
        )


def processes(number: int) -> str:
    """`1 process`, `2 processes`."""
    return "1 process" if number == 1 else f"{number} processes"


def visible() -> str:
    """Which GPUs CUDA may see, in words."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "CUDA_VISIBLE_DEVICES is not set" if value is None else f"CUDA_VISIBLE_DEVICES={value!r}"


def pick_precision(wanted: Precision | None, device: str) -> tuple[str, str]:
    """Resolve `--mixed_precision` to Accelerate's value and say why.

    `auto` is bf16 where the hardware computes it, fp16 on CUDA devices that have tensor cores but no bf16 (T4, V100),
    else fp32.
    """
    if wanted is None:
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launcher not in ("bf16", "fp16", "no"):
            raise InputError(
                f"The launcher asks for {launcher}, which these scripts do not train in. Say --mixed-precision auto."
            )
        wanted, reason = launcher, "the launcher's" if launcher != "no" else "the default"  # type: ignore[assignment]
    elif wanted != "auto":
        reason = "asked for"
    elif device == "cuda":
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            wanted, reason = "bf16", f"{name} computes bf16"
        elif capability >= (7, 0):
            wanted, reason = "fp16", f"{name} computes fp16 fast but has no bf16"
        else:
            wanted, reason = "no", f"{name} has neither bf16 nor tensor cores"
    elif device == "cpu" and _cpu_has_fast_bf16() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        wanted, reason = "bf16", "this CPU computes bf16"
    else:
        wanted, reason = "no", f"this {device.upper()} has no fast bf16"
    if wanted == "fp16" and device == "cpu":
        raise InputError("--mixed_precision is fp16, which the CPU does not compute. Say bf16, no or auto.")
    assert wanted is not None
    return wanted, reason


def _cpu_has_fast_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that PyTorch has reserved on the GPU, or this process's highest resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
