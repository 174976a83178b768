"""The files that a run is kept in: when they are due, how they are written, and how they are found whole again.

In weights/ lie state_<step>.pt, the newest two, from which --resume goes on, and last.pt and best.pt for
`ultralytics.YOLO`. Each file is whole or not there, and each state knows by its hash which best.pt is its own: whatever
kills a run between two of these writes, `settle` finds that one among best.pt, best_next.pt (there until the state is
written that needs it) and best_before.pt (there as long as the older state needs it).
"""

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from train.config.options import TrainConfig
from train.config.words import seconds_of
from train.evaluation.evaluate import Evaluation
from train.model.weights import as_checkpoint
from train.processes.aside import Aside
from train.processes.collectives import on_main
from train.processes.files import DRAFT, draft_of, whole_file
from train.training.engine import Progress, check_finite
from train.training.meter import Meter
from train.training.state import TrainState

KEPT = 2  # states
BESTS = ("best.pt", "best_next.pt", "best_before.pt", "last.pt")  # among which a state finds its best.pt


class Saves:
    """Saves a run while it goes on. Its methods are collective; the main process writes, from a copy, while all go on.

    Args:
        state: of the run.
        meter: of the run.
        config: as it was given.
        images: what the data set was when it was read, see `fingerprint`.
        folder: weights/ in the run's folder, the main process's.
    """

    def __init__(
        self,
        state: TrainState,
        meter: Meter,
        config: TrainConfig,
        images: dict[str, Any],
        folder: Path,
    ):
        self.state, self.meter, self.config, self.images = state, meter, config, images
        self.folder, self.aside = folder, Aside(at_once=config.workers == 0)  # its own: a tracker's network may be slow
        self.writing: Future | None = None  # what is being written; None on the other ranks
        self.under_way = self.of_best = False  # something is; it has the best epoch so far
        interval = config.save_interval
        self.every = int(interval) if str(interval).isdecimal() else 0  # steps
        self.seconds = 0.0 if self.every else seconds_of(str(interval))
        self.spent = 0.0  # seconds of the main process since the last save
        self.bests = [state.best]  # hashes of the best.pt of the newest states

    def due(self, progress: Progress) -> bool:
        """Whether the state is to be saved after this step: the same on all ranks. At an epoch's end it is anyway.

        Minutes are those of the main process, which all ranks know from what they have measured together.

        Raises:
            Exception: that writing the last save has raised, and should not have.
        """
        self.aside.check()
        self.spent += progress.window.seconds[0] if progress.window else 0.0
        over = progress.global_step % self.every == 0 if self.every else self.spent >= self.seconds
        return over and progress.step < progress.steps

    def save(self, validated: TrainConfig | None = None, result: Evaluation | None = None) -> str:
        """Copy the state, and after an epoch its checkpoint, and begin to write them (collective).

        Args:
            validated: after an epoch, the configuration with what validation depends on, which is kept in it.
            result: then, of its validation, if there was one.

        Returns:
            what `settle` says of the save before.

        Raises:
            FloatingPointError: a loss since the last line, or a weight, is not a finite number.
        """
        self.spent = 0.0
        with self.meter.profile.within("checkpoint"):
            failed, state = self.settle(), self.state
            content = state.content(self.config, self.meter, self.images)
            self.under_way, self.of_best = True, validated is not None and state.best_epoch == state.epoch

            def begin() -> None:
                check_finite(state.ema.ema)
                checkpoint = self._checkpoint(validated, result) if validated is not None else None
                self.writing = self.aside.do(partial(self._write, copied(content), checkpoint, self.of_best))

            on_main(state.accelerator, begin)
        return failed

    def settle(self) -> str:
        """Wait until what was saved last is written (collective).

        Returns:
            why it could not be; empty where it could, or where nothing was begun.
        """
        if not self.under_way:
            return ""
        self.under_way = False
        failed = on_main(self.state.accelerator, lambda: self.writing.result() if self.writing is not None else "")
        if failed and self.of_best:
            self.state.forget()
        return failed

    def _checkpoint(self, validated: TrainConfig, result: Evaluation | None) -> dict[str, Any]:
        metrics = {f"{validated.val_name}/{name}": value for name, value in result.metrics.items()} if result else {}
        checkpoint = as_checkpoint(self.state.ema.ema, asdict(validated), self.state.epoch, metrics)
        return checkpoint | {"wandb_id": self.state.wandb_id}

    def _write(self, content: dict[str, Any], checkpoint: dict[str, Any] | None, of_best: bool) -> str:
        """Beside the training: only `state.best`, and what is in this class, belongs to it."""
        state, folder = self.state, self.folder
        try:
            if checkpoint is not None:
                content["best"] = self._write_last(checkpoint, of_best)
            write_state(folder, content)
            self.bests = [content["best"], *self.bests][:KEPT]
            if state.best != content["best"]:
                state.best = content["best"]
                settle(folder, state.best)
            if len(set(self.bests)) == 1:
                (folder / "best_before.pt").unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: how torch's writer says that the disk is full
            free = shutil.disk_usage(folder).free / 1e9
            reason = getattr(error, "strerror", None) or "the disk is full, or a limit is reached"
            failed = f"{folder} could not be written to, where {free:.2f} GB are free ({reason})"
            logging.getLogger("train").warning(failed)  # the run may end before anybody asks
            return failed
        return ""

    def _write_last(self, checkpoint: dict[str, Any], of_best: bool) -> str:
        """last.pt, and, where --save-period wants it, epoch<N>.pt; the hash of what is best.pt from now on."""
        state, folder, epoch = self.state, self.folder, checkpoint["epoch"] + 1
        if state.best:
            settle(folder, state.best)  # a full disk may have kept the last save from it
        best = state.best
        with whole_file(folder / "last.pt") as draft:
            torch.save(checkpoint, draft)
            if of_best:
                best = hash_of(draft)
                if state.best:
                    _link(folder / "best.pt", folder / "best_before.pt")
                _link(draft, folder / "best_next.pt")
        if self.config.save_period > 0 and epoch % self.config.save_period == 0:
            _link(folder / "last.pt", folder / f"epoch{epoch}.pt")
        return best


def write_state(folder: Path, content: dict[str, Any]) -> None:
    """Write a state, whose tensors are in the host's memory, with a checksum, then remove all but the newest two."""
    with whole_file(folder / f"state_{content['updates']}.pt") as draft:
        torch.save(content | {"checksum": checksum(content)}, draft)
    for path in states(folder)[KEPT:]:
        path.unlink()
    (folder / "state.pt").unlink(missing_ok=True)  # of a run that an older version of these scripts began


def states(folder: Path) -> list[Path]:
    """The saved states, the newest first."""
    found = [path for path in folder.glob("state_*.pt") if path.stem.removeprefix("state_").isdecimal()]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("state_")), reverse=True)


def settle(folder: Path, best: str) -> None:
    """Make that file best.pt which has this hash, and none where the state knows of none."""
    found = next((path for name in BESTS if best and hash_of(path := folder / name) == best), None)
    if not best:
        (folder / "best.pt").unlink(missing_ok=True)
    elif found is not None and found.name != "best.pt":
        _link(found, folder / "best.pt")
    (folder / "best_next.pt").unlink(missing_ok=True)


def clear_drafts(folder: Path) -> None:
    """Remove what killed processes have left half-written; call it where no other process writes there."""
    for place in (folder, folder / "weights"):
        for draft in (*place.glob(f".*{DRAFT}"), *place.glob(".*.*.[0-9]*")):  # as older versions named them
            draft.unlink(missing_ok=True)


def copied(content: Any) -> Any:
    """Copies of tensors, in the host's memory, and of dicts, lists and tuples."""
    if torch.is_tensor(content):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: copied(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(copied, content))
    return content


def checksum(content: Any) -> str:
    """A hash of tensors and plain values, nested in dicts and lists, by what they hold."""
    found = hashlib.sha256()
    for part in _parts(content):
        found.update(part)
    return found.hexdigest()


def _parts(content: Any) -> Iterator[Any]:
    if torch.is_tensor(content):
        yield f"{content.dtype}{tuple(content.shape)}".encode()
        yield content.detach().contiguous().flatten().view(torch.uint8).numpy().data if content.numel() else b""
    elif isinstance(content, dict):
        yield f"{{{len(content)}".encode()
        for key, value in content.items():
            yield repr(key).encode()
            yield from _parts(value)
    elif isinstance(content, list | tuple):
        yield f"[{len(content)}".encode()
        for value in content:
            yield from _parts(value)
    else:
        yield repr(content).encode()


def hash_of(file: Path) -> str:
    """A hash of a file; empty where there is none."""
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return ""


def _link(file: Path, to: Path) -> None:
    """Make `to` the same file, or a copy on a disk without links: whole, or not at all."""
    draft = draft_of(to)
    try:
        with contextlib.suppress(OSError):
            os.link(file, draft)
        if not draft.exists():
            shutil.copyfile(file, draft)
        os.replace(draft, to)  # which does nothing where both are the same file already
    finally:
        draft.unlink(missing_ok=True)
