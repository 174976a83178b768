"""Files that are there whole or not at all: checkpoints that `ultralytics.YOLO` loads, and everything beside them."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from train.config import InputError, TrainConfig
from train.model import as_checkpoint


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


def save(
    model: nn.Module, config: TrainConfig, epoch: int, metrics: dict[str, float], folder: Path, best: bool
) -> None:
    """Write `folder`/last.pt, and best.pt as a hard link to it (a copy where the file system has no links)."""
    try:
        with whole_file(folder / "last.pt") as draft:
            torch.save(as_checkpoint(model, asdict(config), epoch, metrics), draft)
        if best:
            with whole_file(folder / "best.pt") as draft:
                try:
                    os.link(folder / "last.pt", draft)
                except OSError:
                    shutil.copyfile(folder / "last.pt", draft)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch's writer says that the disk is full
        free = shutil.disk_usage(folder).free / 1e9
        raise InputError(
            f"The checkpoint of epoch {epoch + 1} could not be written to {folder}, where {free:.2f} GB are free "
            f"({str(error).splitlines()[0]}). Free some space, or name another disk with --project."
        ) from None


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
