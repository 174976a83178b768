"""The cores that this process may use, what others do with them, and what is to be done about that."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from train.processes.devices import launched, local_processes
from train.processes.room import CGROUPS, OWN_CGROUPS, control_groups


def cores() -> list[int]:
    """The cores that the system may run this process on: which ones, but not how much of them."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def core_count() -> int:
    """How many cores all processes of this run on this machine may use together.

    The fewest of those the system allows (affinity), what a container may use of them (cgroup quotas of both versions,
    as Docker and Kubernetes set them) and what SLURM gave the task.
    """
    limits = [len(cores()), *(int(quota) for quota in _quotas(CGROUPS, OWN_CGROUPS))]
    if os.environ.get("SLURM_CPUS_PER_TASK", "").isdecimal():
        limits.append(launched("SLURM_CPUS_PER_TASK", 0))
    return max(min(limits), 1)


def cores_of_rank() -> int:
    """This process's share of them; 0 where there are fewer cores than processes."""
    return core_count() // local_processes()


def _quotas(cgroups: Path, own: Path) -> Iterator[float]:
    """Cores that this process's control groups and those around them may use, where there is a limit."""
    for place in control_groups(cgroups, own, "cpu"):
        yield from _quota(place)


def _quota(group: Path) -> Iterator[float]:
    """The limit of one control group, if it has one: of version 2 in one file, of version 1 in two."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = map(float, " ".join((group / name).read_text() for name in names).split())
        except (OSError, ValueError):  # there is no such file, or it says `max`
            continue
        if quota > 0 and period > 0:  # -1: no limit
            yield quota / period


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
