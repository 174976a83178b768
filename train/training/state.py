"""What a run is made of, as it is held in memory; `train/training/saves.py` keeps it, `resume.py` brings it back."""

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from train.config.errors import InputError
from train.config.options import TrainConfig
from train.evaluation.evaluate import Evaluation
from train.model.build import ModelEMA
from train.model.loss import end_of_epoch, set_length
from train.training.meter import Meter, Window

MEASURES = ("AP", "0.1 AP50 + 0.9 AP")  # of the best epoch: now, and of runs that began before 8.4's
FORMAT = 2  # of a saved state; 1 had the ends of epochs alone
PLAIN = (
    "rows",
    "epoch",
    "batches",
    "length",
    "picked",
    "best_epoch",
    "best_fitness",
    "best_ap",
    "last_ap",
    "wandb_id",
    "best",
)


@dataclass
class TrainState:
    """What a run is made of between two steps, beside its configuration and data."""

    detector: DetectionModel
    model: nn.Module  # the detector, as Accelerate prepared it
    ema: ModelEMA
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    rows: list[dict[str, Any]] = field(default_factory=list)  # of results.csv
    epoch: int = -1  # the last one that is finished: trained, validated, in a row
    batches: int = 0  # of the next one that are trained on, up to a step's end
    length: int = 0  # epochs of the run as --time has planned them; 0 where it has not
    picked: str = ""  # the optimizer
    best_epoch: int = -1  # none yet
    best_fitness: float = -math.inf
    measure: str = MEASURES[0]  # of the best epoch, by its own name
    best_ap: float = -1.0
    last_ap: float = -1.0  # of the last validation
    lost: list[int] = field(default_factory=list)  # training images that can no longer be read, see `LostImages`
    wandb_id: str = ""  # of the W&B run, which a resumed training goes on with
    before: tuple[int, float, float] = (-1, -math.inf, -1.0)  # the three before the last best epoch
    best: str = ""  # hash of the file best.pt that belongs to this state
    whole: Window | None = None  # what the epoch has measured so far
    since: Window | None = None  # of it, what no line has told yet
    started: float = 0.0  # when the epoch began by time.perf_counter, or would have, had the run never been interrupted
    elapsed: float = 0.0  # seconds of the epoch when the state was saved

    @property
    def where(self) -> str:
        """How far the run has come, in words."""
        return f"batch {self.batches} of epoch {self.epoch + 2}" if self.batches else f"epoch {self.epoch + 1}"

    @property
    def seconds(self) -> float:
        """Since the epoch began."""
        return time.perf_counter() - self.started

    def begin(self) -> None:
        """An epoch begins, or goes on."""
        if not self.batches:
            self.whole = self.since = None
        self.started = time.perf_counter() - self.elapsed

    def measured(self, window: Window) -> None:
        """Add what was measured to the epoch's."""
        self.whole = self.whole + window if self.whole else window
        self.since = self.since + window if self.since else window

    def finish(self, epoch: int) -> None:
        """The epoch has been trained; what follows is its validation."""
        self.epoch, self.batches, self.elapsed = epoch, 0, 0.0

    def note(self, result: Evaluation) -> None:
        """Take over what the validation of the epoch that has just finished says of the best epoch."""
        self.last_ap, fitness = result.metrics["AP"], result.fitness
        if self.measure != MEASURES[0]:
            fitness = 0.1 * result.metrics["AP50"] + 0.9 * result.metrics["AP"]
        if fitness > self.best_fitness:
            self.before = self.best_epoch, self.best_fitness, self.best_ap
            self.best_epoch, self.best_fitness, self.best_ap = self.epoch, fitness, result.metrics["AP"]

    def forget(self) -> None:
        """The best epoch could not be saved: the one before it is the best that there is."""
        self.best_epoch, self.best_fitness, self.best_ap = self.before

    def content(self, config: TrainConfig, meter: Meter, images: dict[str, Any]) -> dict[str, Any]:
        """All that the next step depends on, as tensors and plain values (collective: losses are those of all ranks).

        Args:
            config: of the run as it was given.
            meter: with what has been measured since the last line.
            images: what the data set was when it was read, see `fingerprint`.

        Raises:
            FloatingPointError: on all ranks, where a loss since the last line is not a finite number.
        """
        pending = meter.pending()
        scaler = self.accelerator.scaler
        within = self.batches > 0  # an epoch
        windows = {
            name: asdict(w) if w and within else None for name, w in (("whole", self.whole), ("since", self.since))
        }
        elapsed = self.seconds if within else 0.0
        content: dict[str, Any] = {name: getattr(self, name) for name in PLAIN} | windows | {"measure": self.measure}
        content |= {"format": FORMAT, "pending": pending, "elapsed": elapsed, "options": asdict(config)}
        content |= {
            "lost": self.lost,
            "images": images,
            "architecture": self.detector.yaml,
            "names": self.detector.names,
        }
        content |= {"model": self.detector.state_dict(), "ema": self.ema.ema.state_dict()}
        content |= {"updates": self.ema.updates, "optimizer": self.optimizer.state_dict()}
        return content | {"scaler": scaler and scaler.state_dict()}

    def load(self, saved: dict[str, Any], meter: Meter) -> None:
        """Take over what `read_run` has read, and empty it: the weights need not stay in memory twice.

        Raises:
            InputError: its parts do not fit each other.
        """
        try:
            self.detector.load_state_dict(saved.pop("model"))
            self.ema.ema.load_state_dict(saved.pop("ema"))
            self.ema.updates = saved["updates"]
            self._load_optimizer(saved.pop("optimizer"))
            if (scaler := saved["scaler"]) and self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(scaler)
            picked = self.picked
            for name in PLAIN:
                setattr(self, name, saved[name])
            self.picked = self.picked or picked
            self.lost, self.measure = saved.get("lost", []), saved.get("measure", MEASURES[1])  # older states lack both
            self.elapsed = saved["elapsed"]
            ranks = self.accelerator.num_processes
            for name in ("whole", "since"):
                setattr(self, name, Window(**saved[name]).over(ranks) if saved[name] else None)
            meter.resume(saved["pending"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                "--resume: the parts of the saved state do not fit each other. Start a new run from the weights: "
                "--model …/weights/last.pt"
            ) from None
        if self.length:
            set_length(self.detector, self.length)
        for _ in range(self.epoch + 1):
            end_of_epoch(self.detector)

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        """The moments as the device and the memory order of this run have them, wherever they were saved."""
        for theirs, own in zip(saved["param_groups"], self.optimizer.param_groups, strict=True):
            if "fused" in own:
                theirs["fused"] = own["fused"]  # belongs to the device
        self.optimizer.load_state_dict(saved)
        # A fused step takes moments and weights for the same elements where they lie at the same place in memory.
        for parameter, slots in self.optimizer.state.items():
            for name, value in slots.items():
                if torch.is_tensor(value) and value.dim() and value.shape == parameter.shape:
                    slots[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
