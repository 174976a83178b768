"""How a process ends when not all is well: soon, with its code, whatever its peers and its own threads do."""

import atexit
import contextlib
import logging
import multiprocessing
import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import NoReturn

from train.processes import aside, status
from train.processes.logs import run_folder
from train.processes.scratch import clean_up

saving = threading.Event()  # this process was told to end, and does so after its step, when it has saved
BOUND = 5.0  # seconds that libraries may take to end, of which W&B waits for its server


@dataclass(frozen=True)
class End:
    """How a run ended: what all its ranks say of it."""

    state: str  # failed, preempted or interrupted, as in status.json
    reason: str  # one line
    rank: int  # whose reason it is
    code: int  # the exit code


def say(text: str, code: int) -> None:
    """The last words of a run on standard error; our launcher is told that they were spoken, and its exit code."""
    with contextlib.suppress(OSError):  # nobody reads it
        print(text, file=sys.stderr, flush=True)
    status.tell_launcher("said", str(code))


def leave(end: End) -> NoReturn:
    """End this process from its main thread. The process group is not shut down: that may wait for peers that are gone.

    What was registered for the exit is done: workers are ended, W&B's run is closed, temporary files go.
    """
    note(end)
    end_workers()  # else each is waited for before W&B is
    threading.Thread(target=_bound, args=(end,), daemon=True).start()
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    end_now(end)


def end_now(end: End) -> NoReturn:
    """End this process from any thread, and its workers with it."""
    note(end)
    if saving.is_set() or end.state == "failed":  # and not where it was told twice
        aside.finish()
    end_workers()
    with contextlib.suppress(Exception):
        logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    clean_up()
    os._exit(end.code)


def end_workers() -> None:
    """End the loaders' workers, which hold nothing that is to be kept."""
    for worker in multiprocessing.active_children():
        worker.kill()


def note(end: End) -> None:
    """The main process keeps in the run's folder how it ended; the first time counts."""
    if os.environ.get("RANK", "0") == "0" and (folder := run_folder()) is not None:
        status.end(folder, end.state, end.reason, end.rank)


def _bound(end: End) -> None:
    time.sleep(BOUND)
    end_now(end)
