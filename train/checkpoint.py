"""Files that are there whole or not at all: checkpoints that `ultralytics.YOLO` loads, and everything beside them."""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.coco import Evaluation
from train.config import InputError, TrainConfig
from train.model import ModelEMA, as_checkpoint, end_of_epoch


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; what was written there becomes `path` when the block ends without error."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@dataclass
class TrainState:
    """What a run is made of between two epochs, beside its configuration and data."""

    model: nn.Module  # without the wrapping of Accelerate
    ema: ModelEMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    rows: list[dict[str, Any]]  # of results.csv
    epoch: int = -1  # the last one that is finished
    best_epoch: int = -1  # none yet
    best_fitness: float = -math.inf
    best_ap: float = -1.0
    last_ap: float = -1.0  # of the last validation
    wandb_id: str = ""  # of the W&B run, which a resumed training goes on with

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
        plain = ("rows", "epoch", "best_epoch", "best_fitness", "best_ap", "last_ap", "wandb_id")
        state = {name: getattr(self, name) for name in plain}
        state |= {"model": self.model.state_dict(), "ema": self.ema.ema.state_dict(), "updates": self.ema.updates}
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
            raise InputError(
                f"The checkpoint of epoch {self.epoch + 1} could not be written to {folder}, where {free:.2f} GB are "
                f"free ({str(error).splitlines()[0]}). Free some space, or name another disk with --project."
            ) from None

    def load(self, file: Path) -> None:
        """Take over what state.pt holds. It is plain tensors and values and is read as such."""
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state.pop("model"))
        self.ema.ema.load_state_dict(state.pop("ema"))
        self.ema.updates = state.pop("updates")
        self.optimizer.load_state_dict(state.pop("optimizer"))
        if (scaler := state.pop("scaler")) and self.scaler:
            self.scaler.load_state_dict(scaler)
        self.rows[:] = state.pop("rows")
        for name, value in state.items():
            setattr(self, name, value)
        for _ in range(self.epoch + 1):
            end_of_epoch(self.model)


def check_resume(config: TrainConfig) -> None:
    """Raise InputError where the run cannot be gone on with."""
    if not config.resume:
        return
    weights = Path(config.resume) / "weights"
    missing = [name for name in ("last.pt", "state.pt") if not (weights / name).is_file()]
    if missing:
        raise InputError(f"--resume {config.resume}: there is no {weights / missing[0]}; no epoch was finished there.")


def new_folder(project: Path, name: str, exactly: str = "") -> Path:
    """Make `project`/`name`, or name2, name3, … where it is taken; or `exactly` that folder. Call it on one process.

    Raises:
        InputError: the folder cannot be made.
    """
    folder = Path(exactly) if exactly else project / name
    number = 1
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        while not exactly and (folder.exists() or not _made(folder)):
            number += 1
            folder = project / f"{name}{number}"
        if exactly:
            folder.mkdir(exist_ok=True)
        return folder.resolve()
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be made: {error}. Name another, or free this one.") from None


def _made(folder: Path) -> bool:
    """Make the folder; False where another run has just made it."""
    try:
        folder.mkdir()
        return True
    except FileExistsError:
        return False
