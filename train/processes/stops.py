"""A training that is told to end: all ranks stop after the same step, with their state saved, and say the same.

Whichever rank was told, by a signal or by --time-limit, tells the others through the store, for a collective of its own
in each step would cost more. Before that rank contributes to the all-reduce of a step it writes which step is the last;
every rank looks after each step. On the CPU that is the same step: no rank passes its all-reduce before all have
contributed. A GPU's host runs ahead of it, but no rank's host comes to the end of a step before the device is done with
the step before, so that there it is the next one.
"""

import contextlib
import json
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from train.processes import signals
from train.processes.exits import End, end_now, saving, say
from train.processes.signals import Ended, end_by
from train.processes.store import connect, lost, tell

HEARD = 2.0  # seconds between two looks whether another rank was told
AGAIN = 0.3  # seconds after which a second Ctrl-C is one: a launcher may hand on what the terminal has sent, too
BOUND = 10.0  # seconds that a validation, a picture or a gather may go on; a step may take its time


class Stop:
    """What this rank has been told, and what the ranks have agreed on.

    Args:
        accelerator: of the run.
    """

    def __init__(self, accelerator: Accelerator):
        self.process = os.getpid()
        self.lag = 0 if accelerator.device.type == "cpu" else 1
        self.device_step: Any = None  # an event: the device is done with the step before
        self.store = connect()
        self.begun = self.over = False  # there is something to save; there is nothing to wait for any more
        self.asked: End | None = None  # this rank was told, or has heard that another was
        self.stepping = False  # it is within a step, or saves
        self.since = self.told = time.monotonic()  # it is not; it was told
        self.cuts = self.hard = False  # an exception may cut off the main thread: what it does, or all

    # What the training says ---------------------------------------------------------------------------------------
    def begin(self) -> None:
        """There is something to save: from here on a signal lets the step end."""
        if self.begun:
            return
        self.begun = True
        reader, self.writer = signals.listen(self._handle)
        self.thread = threading.Thread(target=self._run, args=(reader, connect()), name="stop", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """The run has ended: end the thread, which must not be in the store when Python ends."""
        if self.begun:
            self.over = True
            os.write(self.writer, b"\0")
            self.thread.join()

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """Steps are taken, which are not cut off."""
        self.stepping = True
        try:
            yield
        finally:
            self.stepping, self.since = False, time.monotonic()

    def announce(self, step: int) -> None:
        """This rank is about to contribute to the gradients of this step: if it was told, it says which is the last."""
        if self.asked is not None and self.store is not None:
            last = json.dumps({"step": step + self.lag, "end": asdict(self.asked)})
            with contextlib.suppress(RuntimeError):  # the first machine is gone, which ends this rank
                self.store.compare_set("stop", "", last)  # the first to say it decides

    def after(self, step: int) -> End | None:
        """How the run ends where this step was the last one: the same on all ranks."""
        if self.lag and self.store is not None:
            if self.device_step is not None:
                self.device_step.synchronize()  # it is done: the loss of this step has waited for it
            self.device_step = torch.Event()
            self.device_step.record()
        end = self.asked if self.store is None else self._agreed(step)
        if end is not None:
            saving.set()
        return end

    def _agreed(self, step: int) -> End | None:
        for _ in range(2):
            try:
                if not self.store.check(["stop"]):
                    return None
                agreed = json.loads(self.store.get("stop"))
                return End(**agreed["end"]) if step >= agreed["step"] else None
            except RuntimeError:  # it was slow for once, or the first machine is gone, which ends this rank
                self.store = connect()
                if self.store is None:
                    raise
        return None

    def agree(self) -> None:
        """Between two steps: end all ranks if one was told (collective).

        Raises:
            Ended: the same on all ranks.
        """
        told = [end for end in gather_object([self.asked]) if end is not None]
        if told:
            saving.set()
            raise Ended(told[0])

    @contextlib.contextmanager
    def cutting(self) -> Iterator[None]:
        """The main thread computes by itself, and may be cut off.

        Raises:
            Ended: it was told to end.
        """
        self.cuts = True
        try:
            if self.asked is not None:
                raise Ended(self.asked)
            yield
        finally:
            self.cuts = False

    # What comes from outside --------------------------------------------------------------------------------------
    def _handle(self, number: int, _: FrameType | None) -> None:
        """In the main thread, as soon as it runs Python."""
        if os.getpid() != self.process:  # a worker, which its rank ends
            return
        if self.asked is None:
            self._ask(end_by(number))
        elif self._again(number):
            self.hard = True
        if self.hard or self.cuts:
            self.cuts = False
            if self.hard:
                saving.clear()
                signals.deafen()
            raise Ended(self.asked)  # type: ignore[arg-type]

    def _again(self, number: int) -> bool:
        """Whether this is a Ctrl-C after this rank was told. torchrun, whose wait a second one has ended, hands it on
        as SIGTERM, which it also sends when other ranks have ended, to one that closes W&B: that one is deaf by then.
        """
        interrupted = self.asked is not None and self.asked.code == end_by(signal.SIGINT).code
        handed_on = interrupted and number == signal.SIGTERM and signal.getsignal(number) == self._handle
        return (handed_on or number == signal.SIGINT) and time.monotonic() - self.told > AGAIN

    def _ask(self, end: End) -> None:
        self.told = time.monotonic()
        self.asked = end
        saving.set()

    def _run(self, reader: int, store: Any) -> None:
        """In a thread of its own: hear what is told while the main thread waits for others, tell them, keep time."""
        passed_on, handed_on, bound = False, False, BOUND
        while not self.over:
            ready, _, _ = select.select([reader], [], [], HEARD if self.asked is None else 0.5)
            number = os.read(reader, 1)[0] if ready else 0
            if self.asked is None and number in signals.SIGNALS:
                self._ask(end_by(number))
            if not passed_on:
                self._pass_on(store)
            if not (passed_on := self.asked is not None):
                continue
            now = time.monotonic()
            if self._again(number):
                self.hard, bound = True, 2.0
            if not self.hard and (before := lost(store)) and before.state == "failed":  # the launcher ends the others
                self.asked, self.hard, bound = before, True, signals.GRACE
            if (self.cuts or self.hard) and not handed_on:  # the main thread may not know it yet
                handed_on, self.told = True, now
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            if (self.hard or not self.stepping) and now - max(self.since, self.told) > bound:
                end, first = tell(self.asked, store)
                if first and end.state != "failed":
                    say(end.reason, end.code)
                end_now(end)

    def _pass_on(self, store: Any) -> None:
        """What this rank was told to the others, what they were told to this rank."""
        with contextlib.suppress(RuntimeError):  # the first machine is gone
            if store is not None and self.asked is not None:
                store.compare_set("stopping", "", json.dumps(asdict(self.asked)))
            elif store is not None and store.check(["stopping"]):
                self._ask(End(**json.loads(store.get("stopping"))))
