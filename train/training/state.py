"""What a run is made of, saved so that `ultralytics.YOLO` loads it and a killed run goes on."""

import math
import os
import platform
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from train.config.errors import InputError
from train.config.options import TrainConfig
from train.evaluation.evaluate import Evaluation
from train.model.build import ModelEMA
from train.model.loss import end_of_epoch
from train.model.weights import as_checkpoint
from train.processes import status
from train.processes.files import whole_file

PLAIN = ("rows", "epoch", "best_epoch", "best_fitness", "best_ap", "last_ap", "wandb_id")


@dataclass
class TrainState:
    """What a run is made of between two epochs, beside its configuration and data."""

    detector: DetectionModel
    model: nn.Module  # the detector, as Accelerate prepared it
    ema: ModelEMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    rows: list[dict[str, Any]] = field(default_factory=list)  # of results.csv
    epoch: int = -1  # the last one that is finished
    best_epoch: int = -1  # none yet
    best_fitness: float = -math.inf
    best_ap: float = -1.0
    last_ap: float = -1.0  # of the last validation
    wandb_id: str = ""  # of the W&B run, which a resumed training goes on with

    def note(self, result: Evaluation) -> None:
        """Take over what the validation of the epoch that has just finished says of the best epoch."""
        self.last_ap = result.metrics["AP"]
        if result.fitness > self.best_fitness:
            self.best_epoch, self.best_fitness, self.best_ap = self.epoch, result.fitness, result.metrics["AP"]

    def save(self, config: TrainConfig, result: Evaluation | None, folder: Path) -> None:
        """Write last.pt for Ultralytics, best.pt where this epoch is the best, and state.pt to resume from.

        Args:
            config: with what validation depends on resolved; kept in the checkpoints.
            result: of this epoch, where it was validated.
            folder: where to.

        Raises:
            InputError: the disk is full, or the folder cannot be written.
        """
        metrics = {f"{config.val_name}/{name}": value for name, value in result.metrics.items()} if result else {}
        checkpoint = as_checkpoint(self.ema.ema, asdict(config), self.epoch, metrics)
        checkpoint["wandb_id"] = self.wandb_id
        state = {name: getattr(self, name) for name in PLAIN}
        state |= {"model": self.detector.state_dict(), "ema": self.ema.ema.state_dict(), "updates": self.ema.updates}
        state |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler and self.scaler.state_dict()}
        try:
            with whole_file(folder / "last.pt") as draft:
                torch.save(checkpoint, draft)
            if self.best_epoch == self.epoch:
                with whole_file(folder / "best.pt") as draft:
                    try:
                        os.link(folder / "last.pt", draft)
                    except OSError:  # a file system without links
                        shutil.copyfile(folder / "last.pt", draft)
            with whole_file(folder / "state.pt") as draft:
                torch.save(state, draft)
        except (OSError, RuntimeError) as error:  # RuntimeError: how torch's writer says that the disk is full
            free = shutil.disk_usage(folder).free / 1e9
            reason = getattr(error, "strerror", None) or "the disk is full, or a limit is reached"
            raise InputError(
                f"The checkpoint of epoch {self.epoch + 1} could not be written to {folder}, where {free:.2f} GB are "
                f"free ({reason}). Free some space, or name another disk with --project."
            ) from None

    def load(self, saved: dict[str, Any]) -> None:
        """Take over what `read_state` has read, and empty it: the weights need not stay in memory twice.

        Raises:
            InputError: it is of another model than last.pt.
        """
        try:
            self.detector.load_state_dict(saved.pop("model"))
            self.ema.ema.load_state_dict(saved.pop("ema"))
            self.ema.updates = saved.pop("updates")
            self._load_optimizer(saved.pop("optimizer"))
            if (scaler := saved.pop("scaler")) and self.scaler:
                self.scaler.load_state_dict(scaler)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                "--resume: state.pt does not fit last.pt. Start a new run from the weights: --model …/weights/last.pt"
            ) from None
        for name in PLAIN:
            setattr(self, name, saved.pop(name))
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


def read_state(config: TrainConfig) -> dict[str, Any]:
    """What state.pt holds of the run that `--resume` names: plain tensors and values, read as such.

    Raises:
        InputError: the run cannot be gone on with.
    """
    run, weights = Path(config.resume), Path(config.resume) / "weights"
    missing = [name for name in ("last.pt", "state.pt") if not (weights / name).is_file()]
    if missing:
        raise InputError(f"--resume {run}: there is no {weights / missing[0]}; no epoch was finished there.")
    told = status.read(run)
    if told.get("host") == platform.node() and status.alive(told):  # of another machine nobody can tell
        raise InputError(f"--resume {run}: the run is still running, as process {told['pid']}. Let it end, or end it.")
    for path in (run, *run.iterdir(), *weights.iterdir(), *(run / "logs").glob("*")):
        if path != run and path.is_symlink():  # it would be written through to wherever it leads
            raise InputError(
                f"--resume {run}: {path} is a link to {os.readlink(path)}, and would be written to. Put the file "
                "itself there, or remove it."
            )
    if not all(os.access(folder, os.W_OK | os.X_OK) for folder in (run, weights)):
        raise InputError(
            f"--resume {run}: the folder cannot be written to. Copy it and go on in the copy: "
            f"mkdir -p runs/detect && cp -r {run} runs/detect/ and --resume runs/detect/{run.name}"
        )
    try:
        saved = torch.load(weights / "state.pt", map_location="cpu", weights_only=True)
        {name: saved[name] for name in (*PLAIN, "model", "ema", "updates", "optimizer", "scaler")}
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise InputError(
            f"--resume {run}: {weights / 'state.pt'} is damaged ({type(error).__name__}). Start a new run from the "
            f"weights: --model {weights / 'last.pt'}"
        ) from None
    if not all(type(saved[name]) is int for name in ("epoch", "best_epoch", "updates")):
        raise InputError(f"--resume {run}: {weights / 'state.pt'} is damaged: its epochs are no numbers.")
    done = saved["epoch"] + 1
    if config.epochs < done:
        raise InputError(
            f"--epochs is {config.epochs}, but {done} epochs of {run} are done; --epochs {done + 10}, say."
        )
    return saved


def nothing_left(config: TrainConfig, saved: dict[str, Any]) -> bool:
    """Whether a run that is gone on with is finished: its epochs or its patience are over, and it is measured."""
    over = saved["epoch"] + 1 >= config.epochs or saved["epoch"] - saved["best_epoch"] >= config.patience
    return over and (Path(config.resume) / "metrics.json").is_file()
