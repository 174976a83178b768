"""The voice of a script: what it has to say goes to the console, the logs, the run's files and pictures.

All ranks call these methods at the same places with the same numbers; the main process alone prints, writes and draws.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from train.config.options import EvalConfig
from train.evaluation.coco import diagnose
from train.evaluation.evaluate import Evaluation
from train.processes.collectives import on_main
from train.processes.devices import processes
from train.reporting import lines
from train.reporting.console import Console
from train.reporting.plots import draw_evaluation
from train.reporting.results import Results


class Report:
    """What a script speaks to.

    Args:
        accelerator: of the run.
        config: of the run, with what the device decides filled in.
    """

    def __init__(self, accelerator: Accelerator, config: EvalConfig):
        self.accelerator, self.config = accelerator, config
        self.console = Console(accelerator, config)
        self.watch = self.console.watch

    def say(self, line: str) -> None:
        """A line on the console and in the log of every rank."""
        self.console.say(line)

    def open(self, folder: Path, config: EvalConfig) -> None:
        """Start the rank's log and write config.json, now that all ranks know the run's folder."""
        self.folder = folder
        self.console.open_logs(folder)
        self.results = Results(folder, self.accelerator.is_main_process)
        self.results.config(config)
        self.draws = config.plots and self.results.writes

    def faults(self, faults: list[str]) -> None:
        """Say how many images are left out, and list them with the reasons in the run's folder."""
        if faults:
            self.results.write("faults.txt", "\n".join(faults) + "\n")
            where = self.folder / "faults.txt"
            self.say(f"warning: {len(faults)} images are left out; {where} says why. First: {faults[0]}")

    def processes(self, config: EvalConfig, precision: str) -> None:
        """How many processes on which device, and what they compute in."""
        accelerator = self.accelerator
        ranks, device = accelerator.num_processes, accelerator.device.type
        name = torch.cuda.get_device_name() if device == "cuda" else device
        threads = f", {torch.get_num_threads()} threads each" if device == "cpu" else ""
        backend = f", {accelerator.state.backend}" if ranks > 1 else ""
        order = ", channels-last" if config.channels_last else ""
        self.say(f"processes  {processes(ranks)} on {name}{threads}{backend}")
        self.say(f"precision  {accelerator.mixed_precision.replace('no', 'fp32')} ({precision}){order}")

    def reading(self, images: Iterable[Any], total: int) -> Iterator[Any]:
        """The images whose labels this rank reads, under a bar on a terminal."""
        return self.console.counted(images, total, "reading labels", "image")

    def watched(self, loader: DataLoader, silent: str) -> Iterator[dict[str, Any]]:
        """The loader's batches, under a bar on a terminal, noting how far this rank has come."""
        self.watch.begin(silent, progress=True)
        for i, batch in enumerate(self.console.counted(loader, len(loader), silent, "batch")):
            self.watch.at(i, 1, f"batch {i + 1}, {silent}")
            yield batch
        self.watch.begin(silent)  # gather and metric: no progress to see

    def timing(self, result: Evaluation) -> None:
        """Where the time of a validation went."""
        self.watch.end()
        self.say(lines.timing_line(result))

    def evaluation(self, evaluation: Evaluation, truth: dict[str, Any], config: EvalConfig) -> None:
        """COCO's table on the console; metrics, predictions and truth as JSON; pictures (collective)."""
        for line in lines.table(evaluation, config):
            self.say(line)
        diagnosis = None
        if config.plots:
            diagnosis = on_main(self.accelerator, lambda: diagnose(truth, evaluation.detections))  # collective
            if diagnosis is None:
                self.say("hotcoco is not installed: no confusion matrix, no TIDE errors")
            elif any(diagnosis["tide"].values()):
                lost = "  ".join(f"{kind} {share:.3f}" for kind, share in diagnosis["tide"].items())
                self.say(f"AP50 lost to errors (TIDE): {lost}")
        self.results.evaluation(evaluation, truth, diagnosis["tide"] if diagnosis else None, config.subset)
        if self.draws:
            draw_evaluation(evaluation, truth, diagnosis, self.folder)

    def close(self) -> None:
        """Finish the watch and the logs."""
        self.watch.end()
        self.console.close()
