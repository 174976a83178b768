"""One thread beside the work of each rank: it breaks long silences, and it ends a run that hangs, saying who and where.

Nothing here is collective. The ranks' threads tell each other where the ranks stand through the store, which answers
whatever the main threads do. A rank hangs when it makes no progress where progress is expected, or when its thread is
silent, too: its process is frozen, or its machine is gone. A main process that computes for long is not silent.
"""

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

from train.processes import status
from train.processes.exits import BOUND, End, end_now, say
from train.processes.logs import log_stream, run_folder
from train.processes.store import connect, introduce, kill, tell, told

HEARTBEAT = 30.0  # seconds without a line after which silent work is mentioned
POSTED = 2.0  # seconds between two notes of where a rank stands, and two looks how the others are
SUSPENDED = 5.0  # seconds without a look of its own after which a process has been suspended
SILENT = 10.0  # seconds without a note that are no hang, whatever --hang-timeout says: the machine may be busy
SLOW = 10  # a step may take so many times the slowest so far before it counts as a hang
FAREWELL = BOUND + 1  # seconds in which a rank may end by itself when another has ended the run


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
        self.heard: tuple[list | None, float] = (None, self.since)  # the next rank's last words, and when they were new
        self.beaten = self.since  # when status.json was updated
        self.store = connect()
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                introduce(self.store)
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
        if self.expected:
            self.slowest = max(self.slowest, now - self.last_progress)
        self.last_progress, self.place = now, (self.place[0], count, stage, words)

    def end(self) -> None:
        """The work is over; what follows is not watched."""
        self.silent, self.expected = "", False

    def close(self) -> None:
        """End the thread; this rank's silence is none from now on."""
        self.ended.set()
        self.thread.join()
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.set(f"place/{self.rank}", "null")  # not deleted, for another may be about to get it

    # The thread -------------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        posted, last = 0.0, time.monotonic()
        while not self.ended.wait(0.25):
            now = time.monotonic()
            if now - last > SUSPENDED:  # this process was suspended: nobody could make progress, and nobody was heard
                self.last_progress += now - last
                self.heard = (self.heard[0], self.heard[1] + now - last)
            last, silent = now, self.silent
            if self.rank == 0 and silent and now - max(self.since, self.last_line) >= HEARTBEAT:
                self.last_line = now
                self.say(f"still {silent}, {now - self.since:.0f} s")
            if self.rank == 0 and now - self.beaten >= status.BEAT and (folder := run_folder()) is not None:
                self.beaten = now
                status.update(folder)
            if self.expected and self.timeout and now - self.last_progress > max(self.timeout, SLOW * self.slowest):
                self._hangs(now - self.last_progress)
            if self.store is not None and now - posted >= POSTED:
                posted = now
                self._look_around(now)

    def _look_around(self, now: float) -> None:
        """Tell the others where this rank stands, and see how they are."""
        try:
            end = told(self.store)
            alarm = self._post("place", "")  # another rank's time is up
            silence = self._silence(now)
        except RuntimeError:
            self.store = connect()
            if self.store is not None:  # it was only slow
                return
            # The first machine has ended. So it has at the end of a run, too, where this rank is soon done as well.
            end = End("failed", "the store of the first machine is gone: its processes have ended", self.rank, 1)
            if not self.ended.wait(FAREWELL):
                say(f"error: {end.reason}", end.code)
                end_now(end)
            return
        if end is not None and end.rank != self.rank and not self.ended.wait(FAREWELL):
            end_now(end)  # this rank may be in a collective with the one that has ended, which does not return
        if alarm:
            self._hangs(now - self.last_progress)
        elif self.timeout and silence > max(self.timeout, SILENT):
            self._hangs(silence)

    def _silence(self, now: float) -> float:
        """Seconds since the next rank's thread has said anything."""
        words, since = self.heard
        new = self._posted("place", (self.rank + 1) % self.ranks)
        if new != words or new is None:  # it has not begun yet, or it has closed its watch
            self.heard = (new, now)
            return 0.0
        return now - since

    def _post(self, kind: str, frame: str) -> bool:
        """Tell the other ranks where this one stands; whether one of them has sounded the alarm."""
        self.store.set(f"{kind}/{self.rank}", json.dumps([*self.place, frame, time.time()]))
        return self.store.check(["alarm"])

    def _hangs(self, seconds: float) -> None:
        """Write every thread's stack to this rank's log, say which ranks did not arrive, and end this process."""
        end = End("failed", f"no step finished for {seconds:.0f} s (--hang-timeout)", self.rank, 1)
        try:
            end = self._tell(seconds, end)
        finally:
            end_now(end)

    def _tell(self, seconds: float, end: End) -> End:
        """The stacks to the log, an alarm to the other ranks, and, from the first to notice, the verdict."""
        frames = sys._current_frames()[threading.main_thread().ident or 0]
        ours = [f for f in traceback.extract_stack(frames) if f"{os.sep}train{os.sep}" in f.filename]
        frame = (
            f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno}, {ours[-1].name}" if ours else "outside train/"
        )
        logging.getLogger("train").error(f"{end.reason}; this rank stands at {self.place[3]} {frame}")
        log = log_stream()
        faulthandler.dump_traceback(file=log or sys.stderr, all_threads=True)
        first = True
        if self.store is not None:
            self.store.set("alarm", "")
            self._post("hang", frame)
            first = self.store.add("hanging", 1) == 1
        if not first:  # the process of the first may live on a store that this one holds
            with contextlib.suppress(RuntimeError):
                end = told(self.store, 5 * POSTED) or end
            return end
        late, silent, verdict = self._verdict(seconds)
        some = ", ".join(map(str, late[:8]))
        end = End("failed", f"{end.reason}; rank{'s'[: len(late) > 1]} {some} did not arrive", end.rank, 1)
        end, _ = tell(end, self.store)
        say(verdict, end.code)
        kill(silent, self.store)  # which are frozen, and would hold their memory until the launcher's patience is over
        return end

    def _posted(self, kind: str, rank: int) -> list | None:
        key = f"{kind}/{rank}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def _verdict(self, seconds: float) -> tuple[list[int], list[int], str]:
        """Which ranks the others wait for: those that do not answer, else those that have come least far; of them those
        that do not answer; and the verdict for people.
        """
        places: dict[int, list] = {self.rank: [*self.place, "", 0]}
        silent: list[int] = []
        if self.store is not None:
            before = {rank: self._posted("place", rank) for rank in range(self.ranks)}
            time.sleep(1.4 * POSTED)  # in which every rank that lives posts again, or notices the hang itself
            for rank in range(self.ranks):
                hang, place = self._posted("hang", rank), self._posted("place", rank)
                places[rank] = hang or place or [0, 0, 0, "an unknown place", "", 0]
                if not hang and place == before[rank]:
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
        return late, silent, "\n".join(lines)
