"""Everything a run says: console lines, one log file per rank, results.csv, result files and trackers (W&B).

All ranks call these methods at the same places with the same numbers; the main process alone prints, writes and tracks.
"""

import csv
import json
import logging
import logging.handlers
import os
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from train.checkpoint import TrainState, whole_file
from train.coco import METRICS, Evaluation, diagnose, metric_names
from train.config import EvalConfig, TrainConfig
from train.data import TrainSet
from train.labels import Labels
from train.optim import Schedule
from train.plots import draw_evaluation
from train.processes import on_main, processes

PACKAGES = ("torch", "torchvision", "accelerate", "ultralytics", "hotcoco", "pycocotools", "wandb", "numpy")


class Report:
    """The voice of one run. Lines that are said before the run has a folder go to its logs once it has one."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.folder = Path()
        self.rows: list[dict[str, Any]] = []  # of results.csv
        self.begun = time.perf_counter()
        self.images = 0  # trained on, over all ranks
        self.bar: tqdm | None = None
        self.logger = logging.getLogger("train")
        self.early = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
        self.handlers: list[logging.Handler] = [self.early]
        logging.getLogger().addHandler(self.early)
        self.logger.setLevel(logging.INFO)
        logging.captureWarnings(True)  # Python's warnings go to the logs of the ranks that gave them
        library = logging.getLogger("ultralytics")
        library.handlers = [self.early]  # its own handler prints colour codes
        library.setLevel(logging.INFO)

    def say(self, line: str) -> None:
        """A line on the console, from the main process, and in the log of every rank."""
        self.logger.info(line)
        if self.bar is None:
            self.accelerator.print(line, flush=True)
        else:
            self.bar.write(line)

    def open(self, folder: Path, config: EvalConfig) -> None:
        """Start the rank's log and write config.json, now that all ranks know the run's folder."""
        self.folder = folder
        (folder / "logs").mkdir(parents=True, exist_ok=True)  # parents: on another machine
        log = logging.FileHandler(folder / "logs" / f"rank{self.accelerator.process_index}.log", encoding="utf-8")
        log.setFormatter(
            logging.Formatter(f"%(asctime)s rank{self.accelerator.process_index} %(levelname)s %(message)s")
        )
        self.early.setTarget(log)
        self.early.flush()
        for logger in (logging.getLogger(), logging.getLogger("ultralytics")):
            logger.addHandler(log)
            logger.removeHandler(self.early)
        self.handlers = [log]
        if self.accelerator.is_main_process:
            versions = {d.name.lower(): d.version for d in distributions() if d.name.lower() in PACKAGES}
            versions["python"] = platform.python_version()
            self._write("config.json", json.dumps(asdict(config) | {"versions": versions}, indent=2))

    def _write(self, name: str, text: str) -> None:
        with whole_file(self.folder / name) as draft:
            draft.write_text(text, encoding="utf-8")

    def faults(self, faults: list[str]) -> None:
        """Say how many images are left out, and list them with the reasons in the run's folder."""
        if faults:
            if self.accelerator.is_main_process:
                self._write("faults.txt", "\n".join(faults) + "\n")
            self.say(
                f"warning: {len(faults)} images are left out; {self.folder / 'faults.txt'} says why. First: {faults[0]}"
            )

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

    # Training ---------------------------------------------------------------------------------------------------------
    def banner(
        self,
        config: TrainConfig,
        precision: str,
        origin: str,
        data: str,
        schedule: Schedule,
        train: TrainSet,
        val: list[Labels],
    ) -> None:
        """What is about to happen: processes, precision, model, data, the arithmetic of the batch."""
        self.processes(config, precision)
        self.say(f"model      {origin}")
        self.say(f"data       {data}: {_counts(train.scanned)} to train on, {_counts(val)} to validate on")
        ranks, accumulated = self.accelerator.num_processes, schedule.full_accumulation
        self.say(
            f"batch      {config.batch} images over {processes(ranks)} x {accumulated} accumulated = "
            f"{config.batch * accumulated} a step; {schedule.batches} batches an epoch, {config.epochs} epochs"
        )
        optimizer = f"{schedule.optimizer}, lr {schedule.lr0:g}, weight decay {schedule.weight_decay:.3g}"
        self.say(f"optimizer  {optimizer}" + (" (picked: --optimizer auto)" if config.optimizer == "auto" else ""))
        if train.albumentations:
            self.say("augment    Albumentations is installed, so Ultralytics adds its blur, grey and CLAHE")
        if config.sync_bn and (ranks == 1 or self.accelerator.device.type != "cuda"):
            self.say("warning: --sync-bn is ignored; it needs several CUDA processes")
        self.say(f"run        {self.folder}")

    def epoch_starts(self, epoch: int, epochs: int, steps: int) -> None:
        """Start the epoch's clock and, on a terminal, its progress bar."""
        self.started = self.last_line = time.perf_counter()
        self.where, self.steps, self.images = f"epoch {epoch + 1}/{epochs}", steps, 0
        if self.accelerator.is_main_process and sys.stdout.isatty():
            self.bar = tqdm(total=steps, desc=self.where, unit="step", leave=False, dynamic_ncols=True, file=sys.stdout)

    def no_time_left(self, hours: float | None) -> bool:
        """Whether another epoch as long as this one would end after so many hours: the main process's clock decides."""
        now = time.perf_counter()
        self.training = now - self.started
        late = hours is not None and now - self.begun + (now - self.started) > hours * 3600
        return on_main(self.accelerator, lambda: late)

    def step_done(self) -> None:
        """Move the bar, where there is one."""
        if self.bar is not None:
            self.bar.update()

    def losses(self, step: int, losses: dict[str, float], lr: float, images: int, global_step: int) -> None:
        """A line of losses within the epoch: means over all ranks and over the images since the last line."""
        now = time.perf_counter()
        rate = images / (now - self.last_line)
        self.last_line = now
        self.images += images
        if step < self.steps:  # the epoch's own line follows its last step
            line = f"{self.where}  step {step}/{self.steps}  {_numbers(losses)}  lr {lr:.3g}  {rate:.0f} images/s"
            self.say(line + self._memory())
            tracked = {f"train/{name}": value for name, value in losses.items()}
            self.accelerator.log({**tracked, "lr": lr, "images_per_s": rate}, step=global_step)

    def _memory(self) -> str:
        if self.accelerator.device.type != "cuda":
            return ""
        return f"  {torch.cuda.max_memory_reserved() / 1e9:.1f} GB"

    def epoch(
        self,
        losses: dict[str, float],
        optimizer: torch.optim.Optimizer,
        result: Evaluation | None,
        state: TrainState,
        config: TrainConfig,
    ) -> None:
        """The epoch's line of losses and, where it was validated, its lines of metrics; its row in results.csv, whose
        validation columns are blank otherwise; its point in the trackers.
        """
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        step, val = state.ema.updates, config.val_name
        row: dict[str, Any] = {"epoch": state.epoch + 1, "global_step": step}
        row |= {"seconds": round(time.perf_counter() - self.started, 3)}
        row["images_per_s"] = round(self.images / self.training, 2)
        row |= {f"train/{name}": value for name, value in losses.items()}
        row |= {f"{val}/{name}": result.losses[name] if result else None for name in losses}
        row |= {f"{val}/{name}": result.metrics[name] if result else None for name in metric_names(config.max_dets)}
        row |= {f"lr/pg{i}": group["lr"] for i, group in enumerate(optimizer.param_groups)}
        self.rows.append(row)
        self.say(f"{self.where}  train  {_numbers(losses)}  {self.images} images in {self.training:.1f} s")
        if result:
            shown = _numbers(result.losses | {name: result.metrics[name] for name in ("P", "R", *METRICS[:3])})
            self.say(
                f"{self.where}  {val}    {shown}  {result.images} images"
                f"  (best AP {state.best_ap:.4g} in epoch {state.best_epoch + 1})"
            )
            self.timing(result)
        if self.accelerator.is_main_process:
            self._write_csv()
        self.accelerator.log({name: value for name, value in row.items() if value is not None}, step=step)

    def timing(self, result: Evaluation) -> None:
        """Where the time of a validation went."""
        parts = [f"{stage} {slowest:.2f} ({mean:.2f})" for stage, (slowest, mean) in result.seconds.items()]
        self.say(f"validation took, in s, slowest rank (mean): {', '.join(parts)}")

    def _write_csv(self) -> None:
        with whole_file(self.folder / "results.csv") as draft, open(draft, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)

    # Evaluation -------------------------------------------------------------------------------------------------------
    def evaluation(self, evaluation: Evaluation, truth: dict[str, Any], config: EvalConfig) -> None:
        """COCO's table on the console; metrics, predictions and truth as JSON, unrounded; pictures."""
        for line in _table(evaluation, config):
            self.say(line)
        diagnosis = None
        if config.plots:
            diagnosis = on_main(self.accelerator, lambda: diagnose(truth, evaluation.detections))  # collective
            if diagnosis is None:
                self.say("hotcoco is not installed: no confusion matrix, no TIDE errors")
            elif any(diagnosis["tide"].values()):
                lost = "  ".join(f"{kind} {share:.3f}" for kind, share in diagnosis["tide"].items())
                self.say(f"AP50 lost to errors (TIDE): {lost}")
        if not self.accelerator.is_main_process:
            return
        prefix = "subset_" if config.subset else ""
        metrics: dict[str, Any] = {f"{prefix}{name}": value for name, value in evaluation.metrics.items()}
        metrics |= {"per_class": evaluation.per_class, "images": evaluation.images, "boxes": evaluation.boxes}
        metrics |= {"tide": diagnosis["tide"]} if diagnosis else {}
        rows = [
            {"image_id": int(row[0]), "category_id": int(row[6]), "bbox": row[1:5], "score": row[5]}
            for row in evaluation.detections.tolist()
        ]
        self._write("predictions.json", json.dumps(rows))
        self._write("ground_truth.json", json.dumps(truth))
        self._write("metrics.json", json.dumps(metrics, indent=2))
        if config.plots:
            draw_evaluation(evaluation, truth, diagnosis, self.folder)

    # Trackers ---------------------------------------------------------------------------------------------------------
    def start_trackers(self, config: TrainConfig) -> None:
        """Start the trackers on the main process. One that fails is a warning; it never ends the training."""
        self.accelerator.project_configuration.logging_dir = str(self.folder)
        values = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(config).items()}
        failure, place = "", ""
        try:
            wandb_here = "wandb" in config.trackers and self.accelerator.is_main_process
            options = {"wandb": _wandb_options(self.folder)} if wandb_here else {}
            self.accelerator.init_trackers("yolo-accelerate", config=values, init_kwargs=options)
            place = _wandb_place(self.accelerator.get_tracker("wandb", unwrap=True)) if wandb_here else ""
        except Exception as error:
            failure = str(error)
        failure, place = on_main(self.accelerator, lambda: (failure, place))
        if failure:
            self.accelerator.trackers = []
            self.say(f"warning: the trackers did not start and stay off: {failure}")
        elif place:
            self.say(f"wandb      {place}")

    def close(self) -> None:
        """Finish the trackers and the logs."""
        self.accelerator.end_training()
        for handler in self.handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()


def _wandb_options(folder: Path) -> dict[str, Any]:
    """Options of wandb.init: offline where there is no key, without asking; WANDB_MODE is honoured."""
    import wandb  # half a second, so only where it is used

    options: dict[str, Any] = {"dir": str(folder), "name": folder.name, "settings": wandb.Settings(silent=True)}
    if not os.environ.get("WANDB_MODE"):
        try:
            known = wandb.login(prompt=False)
        except Exception:  # a key, but nobody there to check it
            known = False
        if not known:
            options["mode"] = "offline"
    return options


def _wandb_place(run: Any) -> str:
    """Where a W&B run is to be found."""
    if run.disabled:
        return "disabled by WANDB_MODE"
    return f"offline; to send it: wandb sync {Path(run.dir).parent}" if run.offline else run.url


def _counts(labels: list[Labels]) -> str:
    return f"{len(labels)} images with {sum(len(entry.cls) for entry in labels)} boxes"


def _numbers(values: dict[str, float]) -> str:
    return "  ".join(f"{name.removesuffix('_loss')} {value:.4g}" for name, value in values.items())


def _table(evaluation: Evaluation, config: EvalConfig) -> list[str]:
    """The metrics of all classes and of each, and AP and AR by size, as console lines."""
    m = evaluation.metrics
    images = f"{evaluation.images} images" + (" (a subset)" if config.subset else "")
    columns = ("images", "boxes", "P", "R", "F1", "AP50", "AP75", "AP")
    everything = m | {"images": evaluation.images, "boxes": evaluation.boxes}
    lines = [f"{'class':20}" + "".join(f"{name:>8}" for name in columns)]
    occurring = {name: values for name, values in evaluation.per_class.items() if values["boxes"]}
    for name, values in ({"all": everything} | occurring).items():
        numbers = "".join(f"{values[c]:8d}" if c in columns[:2] else f"{values[c]:8.3f}" for c in columns)
        lines.append(f"{name[:19]:20}{numbers}")
    if never := len(evaluation.per_class) - len(occurring):
        lines.append(f"{never} of {len(evaluation.per_class)} classes do not occur here and do not count")
    names = metric_names(config.max_dets)
    for sizes, label in ((names[3:6], "AP small, medium, large"), (names[9:12], "AR small, medium, large")):
        lines.append(f"{label:44}" + "".join(f"{m[name]:8.3f}" for name in sizes))
    counts = ", ".join(map(str, config.max_dets))
    lines.append(f"{f'AR at {counts} detections an image':44}" + "".join(f"{m[name]:8.3f}" for name in names[6:9]))
    lines.append(f"AP {m['AP']:.4f} on {images} of {config.split}")
    if m["AP"] < 0:
        lines.append("AP is -1: these images have no labelled object.")
    return lines
