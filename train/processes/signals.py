"""What ends a script from outside: Ctrl-C, SIGTERM, SIGUSR1, SIGHUP, and its own --time-limit, which is an alarm.

None is swallowed, each leaves a line, none a traceback. Here each ends the process at once; a training, once it has
something to save, takes them otherwise: see `train/processes/stops.py`.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import psutil

from train.processes.exits import End, end_now

GRACE = 8.0  # seconds that the script has to end by itself
PREEMPTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)  # the run is to be started again
SIGNALS = (signal.SIGINT, signal.SIGHUP, *PREEMPTS)


class Ended(BaseException):
    """The process was told to end, and how the run has ended thereby."""

    def __init__(self, end: End):
        super().__init__(end)
        self.end = end


def in_words(number: int) -> str:
    """What the signal did."""
    own = {signal.SIGINT: "interrupted", signal.SIGALRM: "the time is up (--time-limit)"}
    return own.get(signal.Signals(number), f"ended by {signal.Signals(number).name}")


def end_by(number: int) -> End:
    """How the run ended, as far as this process knows: with code 3 where a scheduler wants its place, else as shells
    have it.
    """
    rank = os.environ.get("RANK", "0")
    state, code = ("preempted", 3) if number in PREEMPTS else ("interrupted", 128 + number)
    return End(state, in_words(number), int(rank) if rank.isdecimal() else 0, code)


def limit(seconds: float) -> None:
    """Have this process told to end so many seconds after it was started; at once where they are over."""
    age = time.time() - psutil.Process().create_time()
    signal.setitimer(signal.ITIMER_REAL, max(seconds - age, 1e-3))


def hold() -> None:
    """Have signals wait until the script that takes this process's place calls `during_imports`: the new Python knows
    them not yet, and would end without a line or with a traceback.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def during_imports() -> None:
    """End at once, with a line from one process of the machine: nothing has begun yet."""
    for number in SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup ignores SIGHUP
            signal.signal(number, lambda number, _: _end(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def during_work(explain: Callable[[End], End]) -> None:
    """Raise Ended in the main thread; end the process after GRACE seconds where that did not end it.

    Args:
        explain: says, and tells who listens, what the signal means for the run: it may be the consequence of something
            else.
    """
    main = os.getpid()

    def end(number: int, _: FrameType | None) -> None:
        if os.getpid() == main:  # and no worker that was forked from here and does not know its parent yet
            deafen()
            raise Ended(end_by(number))

    reader, _ = listen(end)
    threading.Thread(target=_backstop, args=(reader, explain), daemon=True).start()


def listen(handler: Callable[[int, FrameType | None], None]) -> tuple[int, int]:
    """Handle the signals in the main thread, and have their numbers written to a pipe, whose ends are returned: to read
    and to write.

    Python calls the handler in the main thread, which may be in a collective or a device's call for long; whoever reads
    the pipe is told at once.
    """
    for number in SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup ignores SIGHUP
            signal.signal(number, handler)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # A worker that is forked from here must not write into the same pipe.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    return reader, writer


def deafen() -> None:
    """The end has begun: a signal must not cut it off. What holds it up is ended by the backstop all the same.

    No SIG_IGN, of which Python complains where a signal is under way.
    """
    ignore_workers()
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)


def ignore_workers() -> None:
    """The end of a loader's worker is no error any more: the signal has ended the workers, too, or the error is being
    told. torch's handler of SIGCHLD would raise another wherever the main thread is, once, and here at the latest.
    """
    for _ in range(2):
        with contextlib.suppress(RuntimeError):
            signal.signal(signal.SIGCHLD, lambda *_: None)


def _backstop(reader: int, explain: Callable[[End], End]) -> None:
    """Wait for a signal, then for GRACE seconds, then end the process, with a line: the main thread has said none."""
    while (number := os.read(reader, 1)[0]) not in SIGNALS:
        pass
    time.sleep(GRACE)
    end_now(explain(end_by(number)))


def _end(number: int) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, f"{in_words(number)}\n".encode())
    end_now(end_by(number))
