"""What ends a script from outside: Ctrl-C, SIGTERM, SIGHUP. None is swallowed, each leaves a line, none a traceback."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from train.processes.exits import End, end_now

GRACE = 8.0  # seconds that the script has to end by itself
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(BaseException):
    """The process was told to end by this signal."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def in_words(number: int) -> str:
    """What the signal did."""
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


def exit_code(number: int) -> int:
    """3 for SIGTERM, by which schedulers preempt: the run is to be started again. Else as shells have it."""
    return 3 if number == signal.SIGTERM else 128 + number


def end_by(number: int) -> End:
    """How the run ended, as far as this process knows."""
    rank = os.environ.get("RANK", "0")
    state = "preempted" if number == signal.SIGTERM else "interrupted"
    return End(state, in_words(number), int(rank) if rank.isdecimal() else 0, exit_code(number))


def during_imports() -> None:
    """End at once, with a line from one process of the machine: nothing has begun yet."""
    for number in SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup ignores SIGHUP
            signal.signal(number, lambda number, _: _end(number))


def during_work(explain: Callable[[int], End]) -> None:
    """Raise Ended in the main thread; end the process after GRACE seconds where that did not end it.

    Args:
        explain: says, and tells who listens, what the signal means for the run: it may be the consequence of something
            else.
    """
    main = os.getpid()

    def end(number: int, _: FrameType | None) -> None:
        if os.getpid() != main:  # a worker that was forked from here; torch takes another code for a failure of its own
            os._exit(0)
        deafen()
        raise Ended(number)

    handled = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, end)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python calls the handler in the main thread, which may be in a collective or a device's call for long; it tells
    # this thread at once. A worker that is forked from here must not write into the same pipe.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_backstop, args=(reader, handled, explain), daemon=True).start()


def deafen() -> None:
    """The end has begun: a signal must not cut it off. What holds it up is ended by the backstop all the same.

    SIGCHLD: torch would call it an error that the signal has ended the workers, too. No SIG_IGN, of which Python
    complains where a signal is under way.
    """
    for number in (*SIGNALS, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)


def _backstop(reader: int, handled: list[signal.Signals], explain: Callable[[int], End]) -> None:
    """Wait for a signal, then for GRACE seconds, then end the process, with a line: the main thread has said none."""
    while (number := os.read(reader, 1)[0]) not in handled:
        pass
    time.sleep(GRACE)
    end_now(explain(number))


def _end(number: int) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, f"{in_words(number)}\n".encode())
    end_now(end_by(number))
