"""The voice of a script: what it has to say goes to the console, the logs, the run's files and pictures.

All ranks call these methods at the same places with the same numbers; the main process alone prints, writes and draws.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from shlex import quote
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from train.config.errors import InputError
from train.config.options import EvalConfig
from train.data.labels import Labels
from train.evaluation.coco import diagnose
from train.evaluation.detections import KINDS
from train.evaluation.evaluate import Evaluation
from train.evaluation.truth import Truth
from train.processes import status
from train.processes.collectives import on_main
from train.processes.devices import processes
from train.processes.logs import run_folder
from train.reporting import lines
from train.reporting.console import Console
from train.reporting.results import Results


def plots() -> ModuleType:
    """The module that draws. It imports matplotlib, which takes 0.3 s: not where --help is asked for."""
    from train.reporting import plots

    return plots


class Report:
    """What a script speaks to.

    Args:
        accelerator: of the run.
        config: of the run, with what the device decides filled in.
    """

    def __init__(self, accelerator: Accelerator, config: EvalConfig):
        self.accelerator, self.config = accelerator, config
        self.begun = time.perf_counter()
        self.console = Console(accelerator, config)
        self.watch = self.console.watch
        self.warned: set[str] = set()

    def say(self, line: str) -> None:
        """A line on the console and in the log of every rank."""
        self.console.say(line)

    def open(self, folder: Path, config: EvalConfig) -> None:
        """Start the rank's log and write config.json, now that all ranks know the run's folder."""
        self.folder = folder
        self.console.open_logs(folder)
        self.results = Results(folder, self.accelerator.is_main_process)
        if self.results.writes:
            status.begin(folder)
        self.results.config(config)
        self.draws = config.plots and self.results.writes

    def going_on(self, what: str, work: Callable[[], Any]) -> None:
        """Do what a run can do without, such as a picture: where it fails that is said once, and the run goes on."""
        try:
            work()
        except Exception as error:
            if what not in self.warned:
                self.warned.add(what)
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                self.say(f"warning: {what} could not be written ({reason}); the run goes on")
                self.console.logger.info("the traceback", exc_info=not isinstance(error, OSError))

    def faults(self, data: str, *labels: Labels) -> None:
        """Say how many images are left out, listing them with the reasons in the run's folder, and how many objects, as
        far as the index knows: nothing is read for it (collective).

        Args:
            data: the option, by which the check of the data set is started.
            labels: of the splits that are used.
        """

        def write() -> tuple[int, int, str]:
            if found := [fault for one in labels for fault in one.faults]:
                self.going_on("faults.txt", lambda: self.results.write("faults.txt", "\n".join(found) + "\n"))
            return len(found), sum(one.dropped for one in labels), found[0] if found else ""

        images, objects, first = on_main(self.accelerator, write)
        told = [f"{images} images ({self.folder / 'faults.txt'} says why)"] * (images > 0)
        told += [f"{objects} objects without a size or there twice"] * (objects > 0)
        if told:
            check, more = f"python train/check_data.py {quote(data)}", f" First: {first}" * (images > 0)
            self.say(f"warning: left out are {' and '.join(told)}; {check} lists all that is wrong.{more}")

    def processes(self, config: EvalConfig, precision: str) -> None:
        """How many processes on which device, and what they compute in."""
        accelerator = self.accelerator
        ranks, device = accelerator.num_processes, accelerator.device.type
        name = torch.cuda.get_device_name() if device == "cuda" else device
        threads = f", {torch.get_num_threads()} threads each" if device == "cpu" else ""
        backend = f", {accelerator.state.backend}" if ranks > 1 else ""
        order = ", channels-last" if config.channels_last else ""
        self.say(f"processes  {processes(ranks)} on {name}{threads}{backend}")
        tf32 = device == "cuda" and accelerator.mixed_precision == "no" and torch.cuda.is_tf32_supported()
        name = accelerator.mixed_precision.replace("no", "fp32, TF32 in convolutions" if tf32 else "fp32")
        self.say(f"precision  {name} ({precision}){order}")

    def reading(self, images: Iterable[Any], total: int) -> Iterator[Any]:
        """The images whose labels this rank reads, under a bar on a terminal."""
        return self.console.counted(images, total, "reading labels", "image")

    def caching(self, images: Iterable[Any], total: int) -> Iterator[Any]:
        """The images that this rank decodes for the cache, under a bar on a terminal."""
        return self.console.counted(images, total, "caching images", "image")

    def watched(self, loader: DataLoader, silent: str) -> Iterator[dict[str, Any]]:
        """The loader's batches, under a bar on a terminal, noting how far this rank has come."""
        self.watch.begin(silent, progress=True)
        for i, batch in enumerate(self.console.counted(loader, len(loader), silent, "batch")):
            self.watch.at(i, 1, f"batch {i + 1}, {silent}")
            yield batch
        self.watch.begin(silent)  # gather and metric: no progress to see

    def taken(self) -> str:
        """How long all has taken, in words."""
        return f"took {lines.clock(time.perf_counter() - self.begun)} (h:min:s)"

    def timing(self, result: Evaluation) -> None:
        """Where the time of a validation went."""
        self.watch.end()
        self.say(lines.timing_line(result))

    def evaluation(self, evaluation: Evaluation, truth: Truth, config: EvalConfig) -> None:
        """Metrics, predictions and truth as JSON, then COCO's table on the console, then pictures (collective)."""
        self.keep_results(lambda: self.results.evaluation(evaluation, truth, config.subset))
        found: list[dict[str, Any] | None] = [None]
        detections = evaluation.detections
        looks = config.plots and not {"bbox", "segm"}.isdisjoint(evaluation.iou_types)
        if looks:

            def look() -> None:
                found[0] = on_main(self.accelerator, lambda: diagnose(truth, detections))  # collective

            self.going_on("the diagnosis of errors", look)  # an error is every rank's
        diagnosis = found[0]
        tide = diagnosis["tide"] if diagnosis else None
        if tide is not None:
            self.going_on("results", lambda: self.results.tide(tide))
        for line in lines.table(evaluation, config):
            self.say(line)
        if looks and diagnosis is None:
            self.say("hotcoco is not installed: no confusion matrix, no TIDE errors")
        before, word, _ = KINDS["segm" if "segm" in evaluation.iou_types else "bbox"]
        if tide and evaluation.metrics[f"{before}AP50"] > 0:  # of nothing nothing can be lost
            lost = "  ".join(f"{kind} {value:.3f}" for kind, value in tide.items())
            self.say(f"{word}AP50 lost to errors (TIDE): {lost}")
        if self.draws:
            self.going_on("pictures", lambda: plots().draw_evaluation(evaluation, truth, diagnosis, self.folder))

    def keep_results(self, work: Callable[[], Any]) -> None:
        """Write what the script is for: where it cannot be written, that is an error of every rank (collective)."""

        def write() -> None:
            try:
                work()
            except OSError as error:
                raise InputError(
                    f"The results could not be written to {self.folder} ({error.strerror or error}). Free some space, "
                    "or name another folder with --save-dir."
                ) from None

        on_main(self.accelerator, write)

    def close(self) -> None:
        """Finish the watch and the logs."""
        self.watch.end()
        if self.accelerator.is_main_process and (folder := run_folder()) is not None:
            status.end(folder, "finished")
        self.console.close()
