"""Everything a run says: console lines, one log file per rank, results.csv and result files.

All ranks call these methods at the same places with the same numbers; the main process alone prints, writes and tracks.
"""

import csv
import json
import logging
import logging.handlers
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from train.checkpoint import TrainState, whole_file
from train.coco import COLUMNS, METRICS, Evaluation, diagnose, metric_names
from train.config import EvalConfig, TrainConfig
from train.data import TrainSet
from train.labels import Labels
from train.optim import Schedule
from train.plots import draw_batch, draw_evaluation, draw_labels, draw_page, draw_results, same_images
from train.processes import on_main, processes
from train.track import Tracking, versions
from train.watch import Watch

LINES, STEPS = 8, 10  # unless --log-interval is given: most lines of losses in an epoch, least steps between two
DRAWN = 20.0  # seconds between two drawings of the pictures that change with the epochs
NO_TERMINAL = ("JPY_PARENT_PID", "KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG", "CI")
SLOWER = 1.2  # times the median of the ranks


@dataclass
class Window:
    """What was measured between two points of a training, over all ranks."""

    losses: dict[str, float]  # sums over the images
    images: int
    steps: int
    grad_norm: float  # mean over the steps; not a number where none was finite, as fp16 may begin
    seconds: list[float]  # by rank: since the last point; of them waiting for data; of them in the model's forward
    waits: list[float]
    forwards: list[float]
    memory: list[float]  # by rank: bytes, at the highest

    def __add__(self, other: "Window") -> "Window":
        """Both, one after the other."""
        both: dict[str, Any] = {"losses": {name: value + other.losses[name] for name, value in self.losses.items()}}
        both |= {"images": self.images + other.images, "steps": self.steps + other.steps}
        norms = [(part.grad_norm, part.steps) for part in (self, other) if math.isfinite(part.grad_norm)]
        both["grad_norm"] = sum(n * k for n, k in norms) / sum(k for _, k in norms) if norms else math.nan
        for name in ("seconds", "waits", "forwards"):
            both[name] = [a + b for a, b in zip(getattr(self, name), getattr(other, name), strict=True)]
        return Window(memory=other.memory, **both)

    def means(self) -> dict[str, float]:
        """Mean losses over the images."""
        return {name: value / self.images for name, value in self.losses.items()}


class Report:
    """The voice of one run. Lines that are said before the run has a folder go to its logs once it has one."""

    def __init__(self, accelerator: Accelerator, config: EvalConfig):
        self.accelerator, self.config = accelerator, config
        self.folder = Path()
        self.rows: list[dict[str, Any]] = []  # of results.csv
        self.begun = time.perf_counter()
        self.drawn = -DRAWN
        self.bar: tqdm | None = None
        # A notebook's `!command` and some CI runners give their commands a terminal that nobody looks at as one.
        terminal = sys.stdout.isatty() and not any(name in os.environ for name in NO_TERMINAL)
        wants_bar = config.progress == "bar" or (config.progress == "auto" and terminal)
        self.shows_bar = wants_bar and accelerator.is_main_process
        # https://no-color.org and https://force-color.org
        self.colours = bool(os.environ.get("FORCE_COLOR")) or (terminal and not os.environ.get("NO_COLOR"))
        level = getattr(logging, config.log_level.upper())
        self.logger = logging.getLogger("train")
        self.early = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
        self.handlers: list[logging.Handler] = [self.early]
        logging.getLogger().addHandler(self.early)
        logging.captureWarnings(True)  # Python's warnings go to the logs of the ranks that gave them
        self.logger.setLevel(level)
        for name in ("ultralytics", "torch", "accelerate"):  # to the logs; their own handlers print, on every rank
            library = logging.getLogger(name)
            library.handlers, library.propagate = [], True
            library.setLevel(level if name == "ultralytics" else max(level, logging.WARNING))
        self.watch = Watch(accelerator.process_index, accelerator.num_processes, config.hang_timeout, self._heartbeat)
        self.tracking = Tracking(accelerator, self.say, "wandb" in getattr(config, "trackers", ()))

    def say(self, line: str) -> None:
        """A line on the console, from the main process, and in the log of every rank."""
        self.logger.log(logging.WARNING if line.startswith("warning:") else logging.INFO, line)
        self._show(line)

    def _show(self, line: str) -> None:
        self.watch.last_line = time.monotonic()
        if self.colours and line.startswith("warning:"):
            line = f"\x1b[33m{line}\x1b[0m"
        if not self.accelerator.is_main_process:  # accelerator.print would say it once on each machine
            return
        if self.bar is None:
            print(line, flush=True)
        else:
            self.bar.write(line)

    def _heartbeat(self, line: str) -> None:
        if self.config.progress != "off":
            self.say(line)

    def open(self, folder: Path, config: EvalConfig) -> None:
        """Start the rank's log and write config.json, now that all ranks know the run's folder."""
        self.folder = folder
        rank = self.accelerator.process_index
        (folder / "logs").mkdir(parents=True, exist_ok=True)  # parents: on another machine
        files = [folder / "logs" / f"rank{rank}.log"]
        if config.log_file and self.accelerator.is_main_process:
            files.append(Path(config.log_file))
            files[-1].parent.mkdir(parents=True, exist_ok=True)
        logs = [logging.FileHandler(file, encoding="utf-8") for file in files]
        for log in logs:
            log.setFormatter(logging.Formatter(f"%(asctime)s rank{rank} %(levelname)s %(message)s"))
            for record in self.early.buffer:
                log.handle(record)
        logging.getLogger().removeHandler(self.early)
        for log in logs:
            logging.getLogger().addHandler(log)
        self.early.buffer.clear()
        self.handlers = [*logs]
        self._write("config.json", json.dumps(asdict(config) | {"versions": versions()}, indent=2))

    def _write(self, name: str, text: str) -> None:
        """A file of the run's folder, from the main process."""
        if not self.accelerator.is_main_process:
            return
        with whole_file(self.folder / name) as draft:
            draft.write_text(text, encoding="utf-8")

    def faults(self, faults: list[str]) -> None:
        """Say how many images are left out, and list them with the reasons in the run's folder."""
        if faults:
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

    def watched(self, loader: Iterable[dict], silent: str) -> Iterator[dict]:
        """The loader's batches, noting how far this rank has come; for work that says nothing itself."""
        self.watch.begin(silent, progress=True)
        for i, batch in enumerate(loader):
            self.watch.at(i, 1, f"batch {i + 1}, {silent}")
            yield batch
        self.watch.begin(silent)  # gather and metric: no progress to see

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
        if config.plots and self.accelerator.is_main_process:
            draw_labels(train.scanned, train.data["names"], self.folder)
        self.names = train.data["names"]

    def start_trackers(self, config: TrainConfig, state: TrainState) -> None:
        """Start the trackers; the id of the W&B run goes into the run's folder and its checkpoints (collective)."""
        state.wandb_id = self.tracking.start(config, self.folder, state.wandb_id) or state.wandb_id
        if state.wandb_id:
            self._write("wandb_id.txt", state.wandb_id + "\n")

    def epoch_starts(self, epoch: int, epochs: int, steps: int) -> None:
        """Start the epoch's clock and, on a terminal, its progress bar."""
        self.started = time.perf_counter()
        self.epoch_number, self.steps = epoch + 1, steps
        self.where = f"epoch {epoch + 1}/{epochs}"
        self.whole: Window | None = None  # the epoch so far
        self.window: Window | None = None  # since the last line
        self.watch.begin("waiting for the first batch", progress=True)
        if self.shows_bar:
            self.bar = tqdm(
                total=steps, desc=self.where, unit="step", leave=False, dynamic_ncols=True, file=sys.stdout,
                colour="green" if self.colours else None,
            )  # fmt: skip

    def training_batch(self, i: int, batch: dict[str, Any]) -> None:
        """Draw one of the first batches of the main process, with its boxes."""
        if self.accelerator.is_main_process and self.config.plots:
            draw_batch(batch, self.names, self.folder / f"train_batch{i}.jpg")

    def step_done(self) -> None:
        """The first step ends the silence; each moves the bar, where there is one."""
        self.watch.silent = ""
        if self.bar is not None:
            self.bar.update()

    def measured(self, step: int, window: Window, lr: float, global_step: int) -> None:
        """A line of losses where one is due: means over all ranks and images since the last line, global throughput,
        memory and data wait of the worst rank. The bar and the trackers get every measurement.
        """
        self.whole = self.whole + window if self.whole else window
        since = self.window = self.window + window if self.window else window
        if self.bar is not None:
            rate = window.images / max(window.seconds)
            self.bar.set_postfix_str(f"{_numbers(window.means())} lr {lr:.3g} {rate:.0f} images/s")
        if step == self.steps:  # the epoch's own line follows its last step
            return
        tracked = {f"train/{name}": value for name, value in window.means().items()} | _speed(window)
        tracked |= {"epoch": self.epoch_number - 1 + step / self.steps, "global_step": global_step, "lr": lr}
        self.tracking.log(tracked, global_step)
        mark = max(-(-self.steps // LINES), STEPS)
        if self.config.log_interval is None and step // mark == (step - window.steps) // mark:
            return
        self.window = None
        left = (self.steps - step) * max(self.whole.seconds) / step
        line = f"{self.where}  step {step}/{self.steps}  {_numbers(since.means())}  lr {lr:.3g}"
        line += f"  {since.images / max(since.seconds):.0f} images/s  {_worst(since)}  eta {_clock(left)}"
        if self.shows_bar or self.config.progress == "off":
            self.logger.info(line)
        else:
            self.say(line)

    def trained(self) -> None:
        """The epoch's last step is done: its line of losses, its times by rank in the logs, and who is slow."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        whole = self.whole
        assert whole is not None
        self.watch.end()
        self.training = time.perf_counter() - self.started
        rate = f"{whole.images / self.training:.0f} images/s"
        self.say(
            f"{self.where}  train  {_numbers(whole.means())}  {whole.images} images in {self.training:.1f} s, {rate}"
            f"  {_worst(whole)}"
        )
        own = [(wait + forward) / whole.steps for wait, forward in zip(whole.waits, whole.forwards, strict=True)]
        for rank, seconds in enumerate(whole.seconds):
            self.logger.info(
                f"{self.where}  rank {rank}: {seconds / whole.steps:.4f} s a step, of it {own[rank]:.4f} s its own "
                f"(data wait {whole.waits[rank] / whole.steps:.4f} s, forward {whole.forwards[rank] / whole.steps:.4f})"
            )
        median = statistics.median(own)
        slow = [rank for rank, seconds in enumerate(own) if seconds > SLOWER * median]
        if slow:
            named = ", ".join(
                f"rank {rank} by {own[rank] / median - 1:.0%} (data wait {whole.waits[rank] / whole.steps:.3f} s, "
                f"forward {whole.forwards[rank] / whole.steps:.3f} s a step)"
                for rank in slow
            )
            self.say(f"warning: slower than the median rank: {named}")

    def no_time_left(self, hours: float | None) -> bool:
        """Whether another epoch as long as this one would end after so many hours: the main process's clock decides."""
        now = time.perf_counter()
        late = hours is not None and now - self.begun + (now - self.started) > hours * 3600
        return on_main(self.accelerator, lambda: late)

    def epoch(
        self,
        optimizer: torch.optim.Optimizer,
        result: Evaluation | None,
        state: TrainState,
        truth: dict[str, Any],
        config: TrainConfig,
        last: bool,
    ) -> None:
        """The epoch's lines of metrics, where it was validated; its row in results.csv, whose validation columns are
        blank otherwise; pictures; its point in the trackers.
        """
        assert self.whole is not None
        losses, val = self.whole.means(), config.val_name
        row: dict[str, Any] = {"epoch": state.epoch + 1, "global_step": state.ema.updates}
        row |= {"seconds": round(time.perf_counter() - self.started, 3)}
        row |= {"images_per_s": round(self.whole.images / self.training, 2)}
        row |= {"peak_memory_gb": round(max(self.whole.memory) / 1e9, 3)}
        row |= {f"train/{name}": value for name, value in losses.items()}
        row |= {f"{val}/{name}": result.losses[name] if result else None for name in losses}
        row |= {f"{val}/{name}": result.metrics[name] if result else None for name in metric_names(config.max_dets)}
        row |= {f"lr/pg{i}": group["lr"] for i, group in enumerate(optimizer.param_groups)}
        self.rows.append(row)
        if result:
            shown = _numbers(result.losses | {name: result.metrics[name] for name in ("P", "R", *METRICS[:3])})
            self.say(
                f"{self.where}  {val}    {shown}  {result.images} images"
                f"  (best AP {state.best_ap:.4g} in epoch {state.best_epoch + 1})"
            )
            self.timing(result)
        if self.accelerator.is_main_process:
            self._write_csv()
            if config.plots and (last or time.perf_counter() - self.drawn > DRAWN):
                draw_results(self.rows, val, self.folder / "results.png")
                if result:
                    same = [(image, "") for image in same_images(truth)]
                    draw_page(result.detections, truth, same, self.folder / "val_batch.jpg")
                self.drawn = time.perf_counter()
            self.tracking.epoch(row, self.rows, _speed(self.whole), result, state, truth, config, self.folder, last)

    def timing(self, result: Evaluation) -> None:
        """Where the time of a validation went."""
        self.watch.end()
        parts = [f"{stage} {slowest:.2f} ({mean:.2f})" for stage, (slowest, mean) in result.seconds.items()]
        self.say(f"validation took, in s, slowest rank (mean): {', '.join(parts)}")

    def _write_csv(self) -> None:
        with whole_file(self.folder / "results.csv") as draft, open(draft, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[-1]))
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

    def close(self, state: TrainState | None = None) -> None:
        """Finish the trackers, the watch and the logs."""
        self.watch.end()
        self.tracking.close(self.folder, state)
        self.watch.close()
        for handler in self.handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()


def _counts(labels: list[Labels]) -> str:
    return f"{len(labels)} images with {sum(len(entry.cls) for entry in labels)} boxes"


def _worst(window: Window) -> str:
    """Data wait and memory of the ranks that have most of it."""
    wait, holder = _argmax(window.waits), _argmax(window.memory)
    share = window.waits[wait] / max(window.seconds[wait], 1e-9)
    return f"data wait {share:.0%} (rank {wait})  {window.memory[holder] / 1e9:.2f} GB (rank {holder})"


def _speed(window: Window) -> dict[str, float]:
    """Throughput of all ranks, seconds a step of the slowest and the median rank, longest data wait, gradient norm."""
    norm = {"train/grad_norm": window.grad_norm} if math.isfinite(window.grad_norm) else {}
    return norm | {
        "speed/images_per_s": window.images / max(window.seconds),
        "speed/step_slowest_rank": max(window.seconds) / window.steps,
        "speed/step_median_rank": statistics.median(window.seconds) / window.steps,
        "speed/data_wait_worst_rank": max(window.waits) / window.steps,
        "speed/memory_gb_worst_rank": max(window.memory) / 1e9,
    }


def _argmax(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _numbers(values: dict[str, float]) -> str:
    return "  ".join(f"{name.removesuffix('_loss')} {value:.4g}" for name, value in values.items())


def _table(evaluation: Evaluation, config: EvalConfig) -> list[str]:
    """The metrics of all classes and of each, and AP and AR by size, as console lines."""
    m = evaluation.metrics
    images = f"{evaluation.images} images" + (" (a subset)" if config.subset else "")
    everything = m | {"images": evaluation.images, "boxes": evaluation.boxes}
    lines = [f"{'class':20}" + "".join(f"{name:>8}" for name in COLUMNS)]
    occurring = {name: values for name, values in evaluation.per_class.items() if values["boxes"]}
    for name, values in ({"all": everything} | occurring).items():
        numbers = "".join(f"{values[c]:8d}" if c in COLUMNS[:2] else f"{values[c]:8.3f}" for c in COLUMNS)
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
