"""Loaders: the batches of the data sets, dealt to the ranks whole."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from train.config.options import EvalConfig
from train.data.sets import Images, TrainSet, ValSet
from train.processes.allocator import keep_freed
from train.processes.cores import cores_of_rank
from train.processes.parent import end_with_parent


class Positions:
    """Batch sampler: hands out positions of the current epoch, a per-device batch at a time.

    Accelerate deals batch i to rank i % N, so that the ranks' shares of global batch k are neighbours and together the
    positions k·batch to (k+1)·batch. It has no `batch_size` on purpose: Accelerate drops batches of another size.

    Args:
        batches: in an epoch.
        batch: global batch.
        ranks: number of processes.
    """

    def __init__(self, batches: int, batch: int, ranks: int):
        self.batches, self.batch, self.ranks = batches, batch, ranks
        self.lost: tuple[int, ...] = ()  # images that can no longer be read, as far as all ranks know
        self.set(0, 0, False)

    def set(self, epoch: int, first: int, closed: bool) -> None:
        """What is handed out next.

        Args:
            epoch: counted from 0.
            first: batch to begin with, where the others are done.
            closed: whether mosaic is, which workers that run since before --time has planned cannot know.
        """
        self.epoch, self.first, self.closed = epoch, first, closed

    def __len__(self) -> int:
        return (self.batches - self.first) * self.ranks

    def __iter__(self) -> Iterator[list[tuple]]:
        share = self.batch // self.ranks
        for start in range(self.first * self.batch, self.batches * self.batch, share):
            yield [(self.epoch, position, self.closed, self.lost) for position in range(start, start + share)]


class Ahead(DataLoader):
    """A loader whose workers can be set to the next epoch's first batches while this process does something else."""

    started: Iterator | None = None

    def start(self) -> None:
        """Begin the next epoch; without workers nothing happens before it is asked for."""
        if self.num_workers:
            self.started = super().__iter__()

    def __iter__(self) -> Iterator:  # type: ignore[override]
        started, self.started = self.started, None
        return super().__iter__() if started is None else started


class Gate:
    """Batch sampler: hands out another's batches once it is open. It has no `batch_size` either."""

    def __init__(self, batches: Any):
        self.batches, self.open = batches, False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list]:
        return iter(self.batches if self.open else ())


def _loader(dataset: Images, batches: Any, config: EvalConfig, accelerator: Accelerator) -> Ahead:
    """A loader of these batches whose workers run, and have nothing to do yet.

    They are forked from this process, and share its memory until it writes into it: later, when it is large, it would
    copy all of it, page by page, and they would keep what it was.
    """
    workers, gate = min(config.workers, cores_of_rank()), Gate(batches)
    loader: DataLoader = DataLoader(
        dataset,
        batch_sampler=gate,  # type: ignore[arg-type]
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=accelerator.device.type == "cuda",
        collate_fn=dataset.collate_fn,
        worker_init_fn=_begin_worker,
    )
    prepared: Any = accelerator.prepare(loader)
    prepared.base_dataloader.__class__ = Ahead  # Accelerate has made a plain one
    if workers:
        iter(prepared.base_dataloader)  # which keeps its workers from here on
    gate.open = True
    return prepared


def _begin_worker(worker: int) -> None:
    end_with_parent(worker)
    keep_freed()


def train_loader(dataset: TrainSet, batches: int, accelerator: Accelerator) -> tuple[Ahead, Positions]:
    """This rank's training batches, and the sampler that is to be `set` before each epoch.

    Once it is set, `start` has the workers prepare the epoch's first batches before it is iterated over.

    A batch is a dict: `img` uint8 (n, 3, imgsz, imgsz) RGB, `cls` (m, 1), `bboxes` (m, 4) xywh normalised, `batch_idx`
    (m,) the image of each box, `im_file` the paths, `lost` by image see `TrainSet`.
    """
    positions = Positions(batches, dataset.config.batch, accelerator.num_processes)
    return _loader(dataset, positions, dataset.config, accelerator), positions


def val_loader(dataset: ValSet, config: EvalConfig, accelerator: Accelerator) -> DataLoader:
    """This rank's validation batches: whole batches, none padded, none twice; ranks may hold different numbers."""
    return _loader(dataset, dataset.batches(config.val_batch), config, accelerator)


def as_images(batch: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """Images as the model takes them: uint8 0 to 255 to float32 0 to 1, in the model's memory order."""
    return (batch.float() / 255).contiguous(memory_format=memory_format)
