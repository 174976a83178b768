"""Experiment trackers: all of Accelerate's get the numbers, the W&B run also tables, charts and pictures.

Only the main process tracks. Whatever fails here is one warning; it neither ends a training nor keeps it waiting.
W&B takes 0.3 s to import, so its modules are imported where it is used.
"""

import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator

import train
from train.config.options import TrainConfig
from train.evaluation.coco import diagnose
from train.evaluation.evaluate import Evaluation
from train.evaluation.truth import Truth
from train.processes.aside import Aside
from train.processes.collectives import on_main
from train.reporting.repository import git_state
from train.reporting.results import versions
from train.training.state import TrainState

T = TypeVar("T")
PROJECT = "yolo-accelerate"
RICH = 25  # tables, charts and pictures come at most about so often in a run


class Tracking:
    """The trackers of one run; without any, its methods do nothing.

    Args:
        accelerator: holds the trackers.
        say: gives a line to the console.
        aside: hands the trackers what they get, once they have started.
        wandb: whether W&B will be used; its import and its service then start beside the reading of the data.
    """

    def __init__(self, accelerator: Accelerator, say: Callable[[str], None], aside: Aside, wandb: bool = False):
        self.accelerator, self.say, self.aside = accelerator, say, aside
        self.run: Any = None  # of W&B, on the main process
        self.shown = -math.inf  # the last epoch that tables, charts and pictures were sent after
        # Else W&B reports to its makers at exit, offline runs included, and waits for a network that is not there.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # Its service starts before the run has a folder; what it caches is of no use to another run.
        os.environ.setdefault("WANDB_CACHE_DIR", os.path.join(train.scratch.name, "wandb"))
        self.warming = threading.Thread(target=_warm, daemon=True)
        if wandb and accelerator.is_main_process:
            self.warming.start()

    def start(self, config: TrainConfig, folder: Path, wandb_id: str) -> str:
        """Start the trackers and say where the W&B run is (collective).

        Args:
            config: names the trackers and says what W&B is told.
            folder: of the run; the trackers write there.
            wandb_id: of the W&B run that is gone on with; empty for a new one.

        Returns:
            the id of the W&B run, empty where there is none.
        """
        self.config, self.folder = config, folder
        self.accelerator.project_configuration.logging_dir = str(folder)
        os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))  # else in the home folder
        lines, wandb_id = on_main(self.accelerator, lambda: self._start(wandb_id))
        for line in lines:
            self.say(line)
        return wandb_id

    def _start(self, wandb_id: str) -> tuple[list[str], str]:
        if not self.config.used_trackers:
            return [], ""
        lines: list[str] = []
        started: list[Any] = []
        values = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(self.config).items()}
        values |= {"command": " ".join(sys.argv), "git": git_state(), "processes": self.accelerator.num_processes}
        values |= {f"{package}_version": number for package, number in versions().items()}
        for name in self.config.used_trackers:
            attempts: list[dict[str, Any]] = [{}]
            reason = ""
            if name == "wandb":
                self.warming.join()
                try:
                    from train.reporting import wandb_start  # imports W&B: 0.3 s

                    attempts, reason = wandb_start.attempts(self.config, self.folder, wandb_id)
                except Exception as error:
                    attempts, reason = [], str(error) or type(error).__name__
                lines += [f"warning: {reason}"] if reason and attempts else []
            used, failure = self._first_that_starts(name, attempts, values)
            if failure := failure or ("" if attempts else reason):
                failure = " ".join(failure.split())
                lines.append(f"warning: {name} did not start and stays off: {failure[:300]}")
                continue
            started += self.accelerator.trackers
            if used > 0:
                lines.append("warning: W&B refused the run (a wrong key?); it is kept offline")
        self.accelerator.trackers = started
        if any(tracker.name == "wandb" for tracker in started):
            self.run = self.accelerator.get_tracker("wandb", unwrap=True)
            lines += wandb_start.introduce(self.run, self.folder)
        return lines, self.run.id if self.run else ""

    def _first_that_starts(self, name: str, attempts: list[dict], values: dict[str, Any]) -> tuple[int, str]:
        """Start a tracker with the first of these options that it takes; which ones, and why not where none is.

        Args:
            name: of the tracker.
            attempts: options to try one after the other.
            values: the configuration that it shows.
        """
        project = self.config.wandb_project or os.environ.get("WANDB_PROJECT") or PROJECT
        failure = ""
        for number, attempt in enumerate(attempts):
            self.accelerator.log_with, self.accelerator.trackers = [name], []
            try:
                self.accelerator.init_trackers(project, config=values, init_kwargs={name: attempt})
                return number, ""
            except Exception as error:
                failure = f"{failure}; {error}" if failure and str(error) not in failure else str(error)
        return 0, failure

    def log(self, values: dict[str, float], step: int) -> None:
        """One row of numbers; `step` rises from call to call."""
        if self.accelerator.trackers:
            # W&B would keep the row in memory until the next
            commit = {"wandb": {"commit": True}}
            self._later(lambda: self.accelerator.log(values, step=step, log_kwargs=commit))

    def _later(self, work: Callable[[], Any]) -> None:
        """In the order in which it is asked for; not by the main thread."""
        self.aside.do(lambda: self._safely(work))

    def _safely(self, work: Callable[[], T]) -> T | None:
        """Whatever goes wrong with a tracker ends the tracking, not the training."""
        try:
            return work()
        except Exception as error:
            self.say(f"warning: the trackers failed and are off from here on: {error}")
            self.accelerator.trackers, self.run = [], None
            return None

    def epoch(
        self, state: TrainState, speed: dict[str, float], result: Evaluation | None, truth: Truth, last: bool
    ) -> None:
        """An epoch's numbers, and at most RICH times a run what W&B shows beyond numbers.

        Args:
            state: after the epoch, whose row it has.
            speed: throughput, waits and gradient norm of the epoch.
            result: the validation, if there was one.
            truth: of the split.
            last: whether this may be the last epoch.
        """
        if not self.accelerator.trackers:
            return
        row = state.rows[-1]
        if self.run is not None:
            now = replace(state, rows=[*state.rows])  # the state goes on
            rich = result if last or row["epoch"] - self.shown >= self.config.epochs / RICH else None
            diagnosis = None
            if rich is not None:
                self.shown = row["epoch"]
                # Not by the thread: what hotcoco prints is caught by exchanging the standard output of all threads.
                diagnosis = self._safely(lambda: diagnose(truth, rich.detections))
            self._later(lambda: self._show(now, rich, truth, diagnosis))
        numbers = {name: value for name, value in row.items() if value is not None} | speed | {"lr": row["lr/pg0"]}
        self.log(numbers, row["global_step"])

    def _show(
        self, state: TrainState, result: Evaluation | None, truth: Truth, diagnosis: dict[str, Any] | None
    ) -> None:
        """What W&B shows beyond numbers, with the epoch's row; tables and charts where there is a result to show."""
        if self.run is None:  # it has failed meanwhile
            return
        from train.reporting import wandb_page  # imports W&B: 0.3 s

        rows, val = state.rows, self.config.val_name
        epoch = rows[-1]["epoch"]
        shown: dict[str, Any] = {}
        if result:
            shown |= wandb_page.charts(rows, val) | wandb_page.tables(result, truth, val, diagnosis)
        if len(rows) == 1:
            shown |= wandb_page.first_pictures(self.folder)
        if shown:
            step = rows[-1]["global_step"]
            self.run.log(wandb_page.as_files(self.run, shown, step), step=step, commit=False)
        if state.best_epoch == state.epoch:
            self.run.summary["best/AP"], self.run.summary["best/epoch"] = state.best_ap, epoch

    def close(self, state: TrainState | None) -> None:
        """Hand best.pt and last.pt to W&B as versions of one model, and finish the trackers."""
        self.aside.wait()
        if self.run is not None and state is not None:
            self._safely(lambda: self._log_model(state))
        self._safely(self.accelerator.end_training)

    def _log_model(self, state: TrainState) -> None:
        from train.reporting import wandb_page  # imports W&B: 0.3 s

        wandb_page.log_model(self.run, self.folder / "weights", state)


def _warm() -> None:
    """What takes long the first time: a second, that nobody needs to wait for."""
    with contextlib.suppress(Exception):  # it comes again where it is told
        import wandb  # 0.3 s

        from train.reporting import wandb_start

        os.environ.setdefault("WANDB_BASE_URL", wandb_start.own_server())
        wandb.setup()
