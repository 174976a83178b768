"""How every script begins and ends: its options, what it says of an error and by which rank, its exit code."""

import contextlib
import logging
import os
import platform
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from typing import Any

import torch

from train.config.errors import InputError
from train.config.options import C
from train.config.reading import Kept, parse
from train.config.words import printable
from train.processes import aside, signals
from train.processes.devices import launched, local_processes
from train.processes.exits import End, end_workers, leave, note, saving, say
from train.processes.logs import log_stream, run_folder
from train.processes.parent import LAUNCHER
from train.processes.store import connect, lost, tell, told
from train.processes.watch import POSTED

HEARD = POSTED + 1.0  # seconds after which the watches of all ranks have heard how the run ended


def run(main: Callable[[C], None], kind: type[C], description: str, kept: Kept | None = None) -> None:
    """Read the options and run a script's main with them.

    However it ends, that is said once: by the rank that was the cause, with its number and the path of its log, where
    the traceback is; where that could not speak any more, by a rank that is left. What a person can mend is one
    message. Exit codes: 0 done, 2 bad input, 3 SIGTERM, SIGUSR1 or --time-limit, 130 Ctrl-C, 129 SIGHUP, 1 anything
    else, a loss that is no longer a number included.
    """
    try:
        signals.during_work(_ended_by)
        _never_fail_to_print()
        end = _ended(main, kind, description, kept)
        if end is not None:
            signals.deafen()
            aside.finish()
    except signals.Ended as ended:
        signals.deafen()
        if saving.is_set():
            aside.finish()
        logging.getLogger("train").warning(ended.end.reason)
        end = _ended_by(ended.end, saving.is_set())
    if end is None:
        if torch.distributed.is_initialized():  # left open, its threads may abort the process at exit
            torch.distributed.destroy_process_group()
        sys.exit(0)
    if launched("WORLD_SIZE", 1) == 1 and not _tracked():
        note(end)
        end_workers()
        sys.exit(end.code)
    if launched("WORLD_SIZE", 1) > local_processes():
        time.sleep(HEARD)  # the launcher of the first machine keeps the store, and ends with its processes
    leave(end)


def _tracked() -> bool:
    """Whether a W&B run is open, which may wait for its server for a minute when Python exits."""
    return getattr(sys.modules.get("wandb"), "run", None) is not None


def _ended(main: Callable[[C], None], kind: type[C], description: str, kept: Kept | None) -> End | None:
    """Run it; how it ended, if it did not end well."""
    rank = launched("RANK", 0)
    logging.getLogger("train").addHandler(logging.NullHandler())  # else logging prints what no file takes yet
    try:
        with said_once():
            config, warnings = parse(kind, description, kept=kept)
            print("\n".join(map(printable, warnings)), end="\n" * bool(warnings), file=sys.stderr)
        main(config)
    except (InputError, FloatingPointError) as error:
        message = printable(_own_words(error), newlines=True)
        logging.getLogger("train").error(message)
        code = 2 if isinstance(error, InputError) else 1
        return _said(End("failed", message, rank, code), f"error: {message}", connect())
    except Exception as error:
        signals.ignore_workers()
        logging.getLogger("train").exception("this rank failed")
        store = connect()
        died = _dead_worker(error)
        if launched("WORLD_SIZE", 1) > 1 and not died and (before := _lost(error, store)):
            return _said(before, _in_place_of_the_launcher(before), store)
        what = printable(f"{type(error).__name__}: {error}", newlines=True)
        if isinstance(error, torch.OutOfMemoryError):
            what = _out_of_memory(error)
        return _said(End("failed", died or what, rank, 1), _failure(error, died or what), store)
    return None


def _said(end: End, text: str, store: Any) -> End:
    """Tell the other ranks how the run ended, and people, unless another rank was first: that one's is the cause."""
    whole, first = tell(end, store)
    if first and text and (store is not None or os.environ.get("LOCAL_RANK", "0") == "0"):
        say(text, end.code)
    return whole


def _ended_by(end: End, saved: bool = False) -> End:
    """What a signal means: that the run is to end, or that the launcher ends it since a rank is gone.

    Args:
        end: by the signal.
        saved: whether the run has saved what it has done.
    """
    store = connect()
    if before := lost(store):
        return _said(before, _in_place_of_the_launcher(before), store)
    # Of the machine where the state is; another has a folder with its logs alone.
    folder = run_folder() if saved and launched("RANK", 0) < local_processes() else None
    return _said(end, f"{end.reason}; go on with --resume {folder}" if folder else end.reason, store)


def _in_place_of_the_launcher(end: End) -> str:
    """What is to be said of a rank that was killed: nothing under our launcher, which says it itself."""
    return "" if LAUNCHER in os.environ else f"error: {end.reason}"


def _lost(error: Exception, store: Any) -> End | None:
    """The end of a run in which this rank has lost the connection to another, which may say itself why."""
    if not re.search(r"gloo|nccl|[cC]onnection (closed|reset|refused)|[sS]ocket|Broken pipe", f"{type(error)} {error}"):
        return None
    end = None
    with contextlib.suppress(RuntimeError):
        end = told(store, seconds=2.0)
    end = end or lost(store)
    if end is None:
        rank, ranks = launched("RANK", 0), launched("WORLD_SIZE", 1)
        first = str(error).strip().splitlines()[0][:200]
        reason = f"rank {rank} of {ranks} on {platform.node()} has lost its connection to another rank: {first}"
        end = End("failed", printable(reason), rank, 1)
    return end


def _out_of_memory(error: BaseException) -> str:
    """What does not fit, and which option makes it smaller."""
    evaluating = any(f"{os.sep}evaluation{os.sep}" in f.filename for f in traceback.extract_tb(error.__traceback__))
    flag = "--val-batch (validation; it is by process)" if evaluating else "--batch, or --imgsz or the model"
    return f"the GPU is out of memory ({str(error).splitlines()[0].split('. ')[0]}). Lower {flag}"


def _dead_worker(error: Exception) -> str:
    """How a loader's worker has ended, and which option keeps the next one alive; empty if the error is another.

    torch says it where its handler of SIGCHLD is in time. Else the rank meets a queue or a connection whose other end
    is gone, and the worker's exit code alone tells why.
    """
    frames = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    workers = {worker for loader in frames for worker in getattr(loader, "_workers", ())}
    if isinstance(error, EOFError | OSError):  # may come a moment before the worker's end
        wait([worker.sentinel for worker in workers], timeout=1.0)
    codes = [worker.exitcode for worker in workers if (worker.exitcode or 0) < 0]
    if codes:
        how = f"is killed by signal: {signal.strsignal(-codes[0])}"
    elif said := re.search(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (.*)", str(error)):
        how = said[1]
    else:
        return ""
    if "Bus error" in how:
        more = "in a container give it more: docker run --shm-size=8g"
        return f"a loader's worker found /dev/shm full. Lower --workers or --batch; {more}"
    if "Killed" in how:
        cause = "was killed (signal 9), as the system does where memory is short"
        return f"a loader's worker {cause}. Lower --workers, or leave out --cache ram"
    return f"a loader's worker {how.strip().rstrip('.')}. --workers 0 loads in the ranks themselves, and shows why"


def _never_fail_to_print() -> None:
    """Streams that are closed, as under cron, become silent; what an encoding lacks is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for as long as the process lives
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _own_words(error: BaseException) -> str:
    """An error's message; of one that a loader's worker raised, without the traceback that torch puts before it."""
    return str(error).rpartition(f"{type(error).__name__}: ")[2].strip()


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Before the processes know each other: only the first process of each machine prints."""
    if launched("LOCAL_RANK", 0) == 0:
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _failure(error: Exception, what: str) -> str:
    """An unforeseen error for the console; the whole traceback where there is no log yet."""
    rank, ranks = launched("RANK", 0), launched("WORLD_SIZE", 1)
    lines = [f"error: rank {rank} of {ranks} on {platform.node()} failed: {what}"]
    if (log := log_stream()) is None:
        return "\n".join(["".join(traceback.format_exception(error)), *lines])
    ours = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}train{os.sep}" in f.filename]
    if ours:
        lines.append(f"  at {ours[-1].filename}:{ours[-1].lineno}, in {ours[-1].name}: {ours[-1].line}")
    return "\n".join([*lines, f"  the traceback is in {log.name}"])
