"""One thread beside the work of each rank: it breaks long silences, and it ends a run that hangs, saying who and where.

Nothing here is collective. Ranks that hang tell each other where they stand through the store that torch.distributed
started with, which answers whatever the ranks' main threads do.
"""

import faulthandler
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

import torch

from train.processes.scratch import clean_up

HEARTBEAT = 30.0  # seconds without a line after which silent work is mentioned
POSTED = 5.0  # seconds between two notes of where a rank stands
SLOW = 10  # a step may take so many times the slowest so far before it counts as a hang


def shared_store() -> Any:
    """The store that the ranks met at, by a connection of its own; None on one process."""
    if not torch.distributed.is_initialized():
        return None
    store = torch.distributed.distributed_c10d._get_default_store()
    # The main thread may be blocked inside a call of the store, which would hold that connection.
    return store.clone() if hasattr(store, "clone") else store


def is_first(what: str) -> bool:
    """Whether this rank is the first to say so; False, too, where the store is gone because others have ended."""
    try:
        store = shared_store()
        return store is None or store.add(f"train/{what}", 1) == 1
    except RuntimeError:
        return False


class Watch:
    """Knows what this rank is doing.

    Args:
        rank, ranks: of this process.
        timeout: seconds without progress, while progress is expected, that count as a hang; raised by itself where
            steps are slow. 0 for no hang detection.
        say: gives a line to the console, from the main process.
    """

    def __init__(self, rank: int, ranks: int, timeout: float, say: Callable[[str], None]):
        self.rank, self.ranks, self.timeout, self.say = rank, ranks, timeout, say
        self.silent = ""  # work that says nothing, for people
        self.since = self.last_line = self.last_progress = time.monotonic()
        self.expected = False  # whether progress is
        self.place: tuple[int, int, int, str] = (0, 0, 0, "the start")  # piece of work, batch, stage of it, in words
        self.slowest = 0.0
        self.ended = threading.Event()
        self.store = shared_store()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()

    # What the rank says of itself: plain assignments, so that they cost nothing in a step -----------------------------
    def begin(self, silent: str, progress: bool = False) -> None:
        """Work starts that may be silent for long; with `progress` it calls `at` again and again."""
        self.silent, self.since = silent, time.monotonic()
        self.place = (self.place[0] + 1, 0, 0, silent)
        self.last_progress, self.expected = self.since, progress

    def at(self, count: int, stage: int, words: str) -> None:
        """The rank has come to this stage of this batch or step."""
        now = time.monotonic()
        self.slowest = max(self.slowest, now - self.last_progress)
        self.last_progress, self.place = now, (self.place[0], count, stage, words)

    def end(self) -> None:
        """The work is over; what follows is not watched."""
        self.silent, self.expected = "", False

    def close(self) -> None:
        """End the thread."""
        self.ended.set()
        self.thread.join()

    # The thread -------------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        posted, last = 0.0, time.monotonic()
        while not self.ended.wait(0.25):
            now = time.monotonic()
            if now - last > POSTED:  # this process was suspended: nobody could make progress
                self.last_progress += now - last
            last, silent = now, self.silent
            if self.rank == 0 and silent and now - max(self.since, self.last_line) >= HEARTBEAT:
                self.last_line = now
                self.say(f"still {silent}, {now - self.since:.0f} s")
            if self.expected and self.timeout and now - self.last_progress > max(self.timeout, SLOW * self.slowest):
                self._hangs(now - self.last_progress)
            if self.store is not None and now - posted >= POSTED:
                posted = now
                if self._post("place", ""):  # another rank's time is up
                    self._hangs(now - self.last_progress)

    def _post(self, kind: str, frame: str) -> bool:
        """Tell the other ranks where this one stands; whether one of them has sounded the alarm."""
        try:
            self.store.set(f"train/{kind}/{self.rank}", json.dumps([*self.place, frame, time.time()]))
            return self.store.check(["train/alarm"])
        except RuntimeError:  # the ranks are ending
            self.store = None
            return False

    def _hangs(self, seconds: float) -> None:
        """Write every thread's stack to this rank's log, say which ranks did not arrive, and end this process."""
        try:
            self._tell(seconds)
        finally:
            clean_up()
            os._exit(1)

    def _tell(self, seconds: float) -> None:
        """The stacks to the log, an alarm to the other ranks, and, from the first to notice, the verdict."""
        frames = sys._current_frames()[threading.main_thread().ident or 0]
        ours = [f for f in traceback.extract_stack(frames) if f"{os.sep}train{os.sep}" in f.filename]
        frame = (
            f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno}, {ours[-1].name}" if ours else "outside train/"
        )
        logging.getLogger("train").error(
            f"no step finished for {seconds:.0f} s (--hang-timeout); this rank stands at {self.place[3]} {frame}"
        )
        log = log_stream()
        faulthandler.dump_traceback(file=log or sys.stderr, all_threads=True)
        if self.store is not None:
            self.store.set("train/alarm", "")
        is_first("failed")  # so that a rank that loses its connection when another ends does not say that it failed
        if self.store is not None:
            self._post("hang", frame)
        if self.store is None or is_first("hanging"):
            print(self._verdict(seconds), file=sys.stderr, flush=True)
        else:
            time.sleep(2 * POSTED)  # the process of the first may live on a store that this one holds

    def _posted(self, kind: str, rank: int) -> list | None:
        key = f"train/{kind}/{rank}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def _verdict(self, seconds: float) -> str:
        """Which ranks the others wait for: those that do not answer, else those that have come least far."""
        places: dict[int, list] = {self.rank: [*self.place, "", 0]}
        silent: list[int] = []
        if self.store is not None:
            before = {rank: self._posted("place", rank) for rank in range(self.ranks)}
            time.sleep(1.4 * POSTED)  # in which every rank that lives posts again, or notices the hang itself
            for rank in range(self.ranks):
                told, place = self._posted("hang", rank), self._posted("place", rank)
                places[rank] = told or place or [0, 0, 0, "an unknown place", "", 0]
                if not told and place == before[rank]:
                    silent.append(rank)
        least = min(place[:3] for place in places.values())
        late = silent or [rank for rank, place in places.items() if place[:3] == least]
        lines = [f"error: no step finished for {seconds:.0f} s (--hang-timeout {self.timeout:g}). Did not arrive:"]
        for rank in late:
            *_, words, frame, _ = places[rank]
            where = f"; it does not answer and was last seen at {words}" if rank in silent else f", at {words}"
            lines.append(f"  rank {rank} of {self.ranks}{where}{f' ({frame})' if frame else ''}")
        if (log := log_stream()) is not None:
            folder = os.path.dirname(log.name)
            lines.append(f"The stacks of all threads are in the ranks' logs in {folder}.")
        return "\n".join(lines)


def log_stream() -> TextIO | None:
    """This rank's open log file, where there is one."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            return handler.stream  # type: ignore[return-value]
    return None
