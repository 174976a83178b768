"""How every script begins and ends: its options, what it says of an error and by which rank, its exit code."""

import contextlib
import logging
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterator

import torch

from train.config.errors import InputError
from train.config.options import C
from train.config.reading import Kept, parse
from train.config.words import printable
from train.processes import signals
from train.processes.devices import launched
from train.processes.scratch import clean_up
from train.processes.watch import is_first, log_stream


def run(main: Callable[[C], None], kind: type[C], description: str, kept: Kept | None = None) -> None:
    """Read the options and run a script's main with them.

    An error is said once: by the rank that failed first, with its number and the path of its log, where the traceback
    is. What a person can mend is one message. Exit codes: 0 done, 2 bad input, 130 Ctrl-C, 128 + its number for another
    signal, 1 anything else, a loss that is no longer a number included.
    """
    code = 0
    try:
        signals.during_work()
        _never_fail_to_print()
        code = _finished(main, kind, description, kept)
    except signals.Ended as end:
        code = signals.exit_code(end.number)
        logging.getLogger("train").warning(signals.in_words(end.number))
        _say_first(signals.in_words(end.number))
    if torch.distributed.is_initialized():  # left open, its threads may abort the process at exit
        torch.distributed.destroy_process_group()
    sys.exit(code)


def _finished(main: Callable[[C], None], kind: type[C], description: str, kept: Kept | None) -> int:
    """Run it; the exit code."""
    logging.getLogger("train").addHandler(logging.NullHandler())  # else logging prints what no file takes yet
    try:
        with said_once():
            config, warnings = parse(kind, description, kept=kept)
            print("\n".join(map(printable, warnings)), end="\n" * bool(warnings), file=sys.stderr)
        main(config)
    except (InputError, FloatingPointError) as error:
        message = printable(_own_words(error), newlines=True)
        logging.getLogger("train").error(message)
        _say_first(f"error: {message}")
        return 2 if isinstance(error, InputError) else 1
    except Exception as error:
        logging.getLogger("train").exception("this rank failed")
        _say_first(_failure(error))
        if launched("WORLD_SIZE", 1) > 1:  # nothing that waits for the other ranks may stand in the way of the exit
            logging.shutdown()
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            clean_up()
            os._exit(1)
        return 1
    return 0


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


def _say_first(text: str) -> None:
    """Say it on standard error, unless another rank has said that it failed: that one's error is the cause."""
    if torch.distributed.is_initialized():
        if not is_first("failed"):
            return
    elif os.environ.get("LOCAL_RANK", "0") != "0":
        return
    with contextlib.suppress(OSError):  # nobody reads it
        print(text, file=sys.stderr, flush=True)


def _failure(error: Exception) -> str:
    """An unforeseen error for the console; the whole traceback where there is no log yet."""
    rank, ranks = launched("RANK", 0), launched("WORLD_SIZE", 1)
    what = printable(f"{type(error).__name__}: {error}", newlines=True)
    lines = [f"error: rank {rank} of {ranks} on {platform.node()} failed: {what}"]
    if (log := log_stream()) is None:
        return "\n".join(["".join(traceback.format_exception(error)), *lines])
    ours = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}train{os.sep}" in f.filename]
    if ours:
        lines.append(f"  at {ours[-1].filename}:{ours[-1].lineno}, in {ours[-1].name}: {ours[-1].line}")
    return "\n".join([*lines, f"  the traceback is in {log.name}"])
