"""What the ranks tell each other beside their collectives: who they are, how far they are, and how the run ended.

It goes through the store that the launcher (or the first rank) keeps for torch.distributed, by connections of our own,
so that it can be asked whatever the main threads do, and also before the ranks have met. Nothing here is collective,
and nothing waits for long: who is asked may be gone.
"""

import contextlib
import json
import os
import platform
import signal
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch

from train.processes.devices import launched
from train.processes.exits import End
from train.processes.status import lives

ANSWERS = timedelta(seconds=3)  # in which the store must


def connect() -> Any:
    """A connection to the store; None on one process, or where nobody answers."""
    if launched("WORLD_SIZE", 1) == 1:
        return None
    with contextlib.suppress(RuntimeError, ValueError, KeyError):  # RuntimeError: torch.distributed's errors are
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(host, port, is_master=False, timeout=ANSWERS, wait_for_workers=False)
        # What an earlier attempt of a launcher that starts again has left is not this one's.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return torch.distributed.PrefixStore(f"train/{attempt}", store)
    return None


def introduce(store: Any) -> None:
    """Say which process this rank is, so that the others can see whether it lives."""
    store.set(f"process/{launched('RANK', 0)}", json.dumps([platform.node(), os.getpid()]))


def tell(end: End, store: Any) -> tuple[End, bool]:
    """Tell the other ranks how the run ended. What counts is what the first of them says: it, and whether it is this.

    Where nobody can be asked, every rank is the first.
    """
    with contextlib.suppress(RuntimeError):
        if store is not None and store.add("ended", 1) > 1:
            store.wait(["end"], ANSWERS)
            return End(**json.loads(store.get("end"))), False
        if store is not None:
            store.set("end", json.dumps(asdict(end)))
    return end, True


def told(store: Any, seconds: float = 0.0) -> End | None:
    """How the run ended, if a rank says so within so many seconds.

    Raises:
        RuntimeError: the store is gone.
    """
    until = time.monotonic() + seconds
    while store is not None:
        if store.check(["end"]):
            return End(**json.loads(store.get("end")))
        if time.monotonic() >= until:
            return None
        time.sleep(0.05)
    return None


def lost(store: Any) -> End | None:
    """The end of a run that has ended already, or of which a rank has been killed: on this machine, without a word."""
    with contextlib.suppress(RuntimeError):
        if end := told(store):
            return end
    for rank, process in gone(store).items():
        ranks = launched("WORLD_SIZE", 1)
        reason = f"rank {rank} of {ranks} on {platform.node()} is gone (process {process}), perhaps out of memory"
        return End("failed", reason, rank, 1)
    return None


def gone(store: Any) -> dict[int, int]:
    """Ranks of this machine whose processes have ended, with the processes' numbers."""
    return {rank: pid for rank, pid in _processes_here(store).items() if not lives(pid)}


def kill(ranks: list[int], store: Any) -> None:
    """Kill those of these ranks that run on this machine."""
    for rank, pid in _processes_here(store).items():
        if rank in ranks:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _processes_here(store: Any) -> dict[int, int]:
    """The process of each rank of this machine that has introduced itself."""
    found: dict[int, int] = {}
    with contextlib.suppress(RuntimeError):
        for rank in range(launched("WORLD_SIZE", 1) if store is not None else 0):
            if store.check([f"process/{rank}"]):
                host, pid = json.loads(store.get(f"process/{rank}"))
                if host == platform.node():
                    found[rank] = pid
    return found
