"""`--profile N`: where the time of N steps and of the ends of epochs goes, and each rank's trace of the steps.

The parts are laps of the host. While it looks, a rank waits for its device at the end of each part, so that a part has
the time of its own work; what ranks wait for each other in a backward begins when the last gradient of a rank is there.
Accelerate brings a batch to the device before it hands it over: that is in "data wait", "copy" is the way to floats.
"""

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

WARM = 3  # steps that are passed over: the first ones allocate memory and choose kernels
PARTS = (
    "data wait", "copy", "forward", "loss", "backward", "all-reduce", "optimizer", "EMA", "measuring", "report",
    "checkpoint", "validation",
)  # fmt: skip


@dataclass
class Laps:
    """What was looked at."""

    count: int = 0  # steps, or ends of epochs
    wall: float = 0.0  # seconds from the first to the last moment of each
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


class Profile:
    """Looks at the steps after the first few, and at the ends of epochs from then on; of no steps it does nothing.

    Args:
        accelerator: of the run.
        model: the one that is trained, without Accelerate's wrapping.
        steps: to look at.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, steps: int):
        self.accelerator, self.model, self.wanted = accelerator, model, steps
        self.steps, self.ends = Laps(), Laps()
        self.laps: Laps | None = None  # those that are being added to
        self.begun = self.since = 0.0
        self.part = "report"
        self.passed = 0  # steps
        self.device_waits = accelerator.device.type != "cpu"
        self.trace: Any = None
        self.tracing = False
        self.hooks: list[Any] = []
        self.label: AbstractContextManager = nullcontext()
        self.last_gradient: Any = None  # seconds or an event of the device

    # What the training says ---------------------------------------------------------------------------------------
    def at(self, part: str) -> None:
        """What comes from here on is this part."""
        if self.laps is None:
            return
        now, shared = self._now()
        self.laps.seconds[self.part] += now - self.since - shared
        self.laps.seconds["all-reduce"] += shared
        self.part, self.since = part, now
        if self.tracing:
            self.label.__exit__(None, None, None)
            self.label = torch.profiler.record_function(part)
            self.label.__enter__()

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What is done in here is this part."""
        before = self.part
        self.at(part)
        try:
            yield
        finally:
            self.at(before)

    def stepped(self) -> None:
        """An optimizer step is over, with what was saved and said of it."""
        self.passed += 1
        if self.laps is not None:
            self.steps.count += 1
            if self.steps.count == self.wanted:
                self._look_at(None)
                self._stop_trace()
        elif self.passed == WARM and self.wanted:
            self._start_trace()
            self._look_at(self.steps)

    def epoch_begins(self) -> None:
        """What follows are steps."""
        self._look_at(self.steps if self.tracing else None)

    def epoch_ends(self) -> None:
        """What follows are no steps, but the end of an epoch."""
        self._look_at(self.ends if self.steps.count and self.wanted else None)

    def result(self, stages: dict[str, float], ends: bool) -> tuple[Laps, Laps] | None:
        """The end of an epoch is over. Once all steps have been looked at: they, and the ends of epochs, as means over
        the ranks (collective).

        Args:
            stages: seconds of the validation's.
            ends: whether no step is to come.
        """
        last = self.steps.count == self.wanted or ends
        if self.laps is self.ends:
            self.ends.count += 1
            for stage, seconds in stages.items():
                part = f"validation: {stage}"
                self.ends.seconds[part] = self.ends.seconds.get(part, 0.0) + seconds
                self.ends.seconds["validation"] -= seconds
            if last:  # else it ends where the next epoch begins
                self._look_at(None)
        if not self.wanted or not last:
            return None
        self._stop_trace()
        self.wanted = 0
        for laps in (self.steps, self.ends):
            own = torch.tensor([laps.wall, *laps.seconds.values()], device=self.accelerator.device)
            laps.wall, *seconds = self.accelerator.reduce(own, reduction="mean").tolist()
            laps.seconds = dict(zip(laps.seconds, seconds, strict=True))
        return self.steps, self.ends

    def write(self, folder: Path) -> None:
        """Write this rank's trace of the steps."""
        folder.mkdir(parents=True, exist_ok=True)
        self.trace.export_chrome_trace(str(folder / f"rank{self.accelerator.process_index}.json.gz"))
        self.trace = None  # it is large

    # Clocks -------------------------------------------------------------------------------------------------------
    def _look_at(self, laps: Laps | None) -> None:
        """Begin to add to these; what comes next is waiting for data in a step, and a report after an epoch."""
        self.at("report")
        if self.laps is not None:
            self.laps.wall += self.since - self.begun
        self.laps, self.part = laps, "data wait" if laps is self.steps else "report"
        if laps is not None:  # else nothing waits for the device
            self.begun = self.since = self._now()[0]

    def _now(self) -> tuple[float, float]:
        """The time when the device is done; of the last part the seconds in which ranks have waited for each other."""
        end = self._mark()
        if self.device_waits:
            torch.accelerator.synchronize()
        now, last = time.perf_counter(), self.last_gradient
        self.last_gradient = None
        if last is None or self.part != "backward":
            return now, 0.0
        return now, last.elapsed_time(end) / 1000 if self.device_waits else end - last

    def _mark(self) -> Any:
        if not self.device_waits:
            return time.perf_counter()
        event = torch.Event(self.accelerator.device, enable_timing=True)
        event.record()
        return event

    def _note_gradient(self, _: torch.Tensor) -> None:
        self.last_gradient = self._mark()

    def _start_trace(self) -> None:
        if self.accelerator.num_processes > 1:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.hooks = [parameter.register_post_accumulate_grad_hook(self._note_gradient) for parameter in trained]
        os.environ["KINETO_LOG_LEVEL"] = "6"  # Ultralytics says 5, at which it prints that it begins and ends
        self.trace = torch.profiler.profile()
        self.trace.start()
        self.tracing = True

    def _stop_trace(self) -> None:
        if not self.tracing:
            return
        self.tracing = False
        self.label.__exit__(None, None, None)
        self.label = nullcontext()
        self.trace.stop()
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
