"""What nobody needs to wait for: pictures, what W&B shows, files of a state. Threads of the main process do it.

They are given snapshots, which nothing changes any more and which lie in the host's memory: they touch no device and
take part in no collective. matplotlib and the trackers are used by one thread at a time; files have another.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

BOUND = 10.0  # seconds that an end waits for what is being written
_started: list["Aside"] = []  # a process has one for its files, and one for pictures and trackers


class Aside:
    """Does what it is given, one after the other, beside the main thread.

    Args:
        at_once: do it in the main thread instead, where training draws from Python's and NumPy's global generators,
            which no other thread may draw from between.
    """

    def __init__(self, at_once: bool):
        self.at_once = at_once
        self.jobs: queue.Queue[tuple[Callable[[], Any], Future]] = queue.Queue()
        self.failure: BaseException | None = None

    def do(self, job: Callable[[], Any]) -> Future:
        """Have this done; what it refers to stays in memory until then, so `wait` before the next large one.

        Returns:
            what has its result.

        Raises:
            Exception: that an earlier job has raised.
        """
        self.check()
        done: Future = Future()
        if self.at_once:
            done.set_result(job())
            return done
        if self not in _started:
            _started.append(self)
            # A daemon, since an error must not wait for it; `finish` does where the run was told to end.
            threading.Thread(target=self._run, name="aside", daemon=True).start()
        self.jobs.put((job, done))
        return done

    def check(self) -> None:
        """Raise what a job has raised."""
        if self.failure is not None:
            raise self.failure

    def wait(self) -> None:
        """Wait until all is done.

        Raises:
            Exception: that a job has raised.
        """
        self.jobs.join()
        self.check()

    def _run(self) -> None:
        # Of this thread alone. A second team of OpenMP threads, which stays, has both teams sleep at each of their
        # barriers where there are not cores for all: training took a third longer from the first save on.
        import torch  # not above, since early.py imports this file before anything that takes seconds

        torch.set_num_threads(1)
        while True:
            job, done = self.jobs.get()
            try:
                if self.failure is not None:
                    raise self.failure
                done.set_result(job())
            except BaseException as error:
                self.failure = error
                done.set_exception(error)
            finally:
                del job, done  # and what they refer to
                self.jobs.task_done()


def finish() -> None:
    """The run ends, whatever for: what it has been given to save is saved first, if that takes no longer than BOUND."""
    for aside in _started:
        until = time.monotonic() + BOUND
        while aside.jobs.unfinished_tasks and time.monotonic() < until:  # `join` has no bound
            time.sleep(0.01)
        if aside.failure is not None:
            logging.getLogger("train").error("what was done beside the training failed", exc_info=aside.failure)
