"""status.json in the run's folder: how the run stands, for people, schedulers and the next run.

state is running, finished, failed, preempted (SIGTERM: to be started again) or interrupted (Ctrl-C: not to be). Beside
it stand the reason and the rank whose it is, the epoch, host and pid of the main process, and the times when it was
started, updated (at least each minute) and ended, in seconds since 1970. `running` says little by itself: see `alive`.
"""

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from train.processes.files import whole_file

FILE = "status.json"
BEAT = 30.0  # seconds between two updates
STALE = 120.0  # seconds after which a run that has not been updated is dead
TOLD = "YOLO_ACCELERATE_TOLD"  # names the folder in which ranks tell our launcher what it needs to know


def begin(folder: Path) -> None:
    """The run in this folder begins; on the main process."""
    now = time.time()
    status = {"state": "running", "reason": "", "rank": None, "epoch": None}
    _write(folder, status | {"host": platform.node(), "pid": os.getpid(), "started": now, "updated": now})
    tell_launcher("run", str(folder.absolute()))


def tell_launcher(what: str, text: str) -> None:
    """Leave a note for our launcher, where it has started this process: `run` is the run's folder, `said` the exit code
    of which the cause has been said.
    """
    if folder := os.environ.get(TOLD):
        with contextlib.suppress(OSError):
            (Path(folder) / what).write_text(text, errors="surrogateescape")


def update(folder: Path, **facts: Any) -> None:
    """The run is alive, and this is new of it; on the main process. Nothing is changed of a run that has ended."""
    with _alone(folder):
        status = read(folder)
        if status.get("state") == "running" and status.get("pid") == os.getpid():
            _write(folder, status | facts | {"updated": time.time()})


def end(folder: Path, state: str, reason: str = "", rank: int | None = None) -> None:
    """The run has ended so; on the main process, or where that is gone on the launcher."""
    with _alone(folder):
        status = read(folder)
        if status.get("state") == "running":
            now = time.time()
            _write(folder, status | {"state": state, "reason": reason, "rank": rank, "updated": now, "ended": now})


def read(folder: Path) -> dict[str, Any]:
    """What status.json says; empty where there is none that can be read."""
    try:
        status = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def alive(status: dict[str, Any]) -> bool:
    """Whether the run that says so is running: not where its process is gone, or has said nothing for long."""
    if status.get("state") != "running" or not isinstance(updated := status.get("updated"), int | float):
        return False
    if status.get("host") == platform.node() and isinstance(pid := status.get("pid"), int):
        try:  # a process of that number that is younger is another
            return lives(pid) and psutil.Process(pid).create_time() <= status.get("started", 0)
        except (psutil.Error, TypeError, ValueError, OverflowError):
            return False
    return time.time() - updated < STALE


def lives(pid: int) -> bool:
    """Whether a process of this machine runs, and is not only waiting for its parent to hear of its end."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # another user's
        return True


def _write(folder: Path, status: dict[str, Any]) -> None:
    with contextlib.suppress(OSError), whole_file(folder / FILE) as draft:  # a full disk is said elsewhere
        draft.write_text(json.dumps(status, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other thread or process of this machine changes the status meanwhile."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:  # the folder is gone
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
