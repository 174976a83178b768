"""What an epoch of training measures: losses, waits, the ranks' own times and memory, over all ranks."""

import math
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from train.processes.devices import memory_in_use
from train.training.profile import Profile


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

    def over(self, ranks: int) -> "Window":
        """The same of a run that goes on with so many ranks: each has the times of the slowest and the most memory."""
        if len(self.seconds) == ranks:
            return self
        names = ("seconds", "waits", "forwards", "memory")
        most: dict[str, Any] = {name: [max(getattr(self, name))] * ranks for name in names}
        return replace(self, **most)

    def speed(self) -> dict[str, float]:
        """What the trackers get: throughput of all ranks, step times, data wait and memory, and the gradient norm."""
        norm = {"train/grad_norm": self.grad_norm} if math.isfinite(self.grad_norm) else {}
        return norm | {
            "speed/images_per_s": self.images / max(self.seconds),
            "speed/step_slowest_rank": max(self.seconds) / self.steps,
            "speed/step_median_rank": statistics.median(self.seconds) / self.steps,
            "speed/data_wait_worst_rank": max(self.waits) / self.steps,
            "speed/memory_gb_worst_rank": max(self.memory) / 1e9,
        }

    def means(self) -> dict[str, float]:
        """Mean losses over the images."""
        return {name: value / self.images for name, value in self.losses.items()}


class ForwardClock:
    """Seconds that the model's own forward takes on this rank, without what it waits for other ranks.

    Hooks on the model itself stop the time, on CUDA by events, which the host does not wait for.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.cuda = model, device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the model's forwards; afterwards the model is as it was."""
        self.marks.clear()
        hooks = [self.model.register_forward_pre_hook(self._starts), self.model.register_forward_hook(self._ends)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _starts(self, *_: Any) -> None:
        self.marks.append((self._mark(), None))

    def _ends(self, *_: Any) -> None:
        self.marks[-1] = (self.marks[-1][0], self._mark())

    def take(self) -> float:
        """Seconds since the last call; on CUDA call it where the device has been waited for."""
        if self.cuda:
            seconds = sum(start.elapsed_time(end) for start, end in self.marks) / 1000
        else:
            seconds = sum(end - start for start, end in self.marks)
        self.marks.clear()
        return seconds


class Meter:
    """What has been measured since the last line: kept on the device, gathered over ranks when a line is due.

    Args:
        accelerator: of the run.
        model: the one that is trained, without Accelerate's wrapping.
        profiled: steps to look at more closely, see `Profile`.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, profiled: int = 0):
        self.accelerator = accelerator
        self.profile = Profile(accelerator, model, profiled)
        self.forward = ForwardClock(model, accelerator.device)
        self.batches: list[tuple[Tensor, int, list[str]]] = []  # this rank's (loss items, images, their files)
        self.norms: list[Tensor] = []
        self.names: list[str] = []
        self.waited = self.before = 0.0  # seconds; those before the run was gone on with
        self.started = time.perf_counter()

    def timed(self, loader: Iterable[dict]) -> Iterator[dict]:
        """An epoch's batches; the time until each is there is data wait."""
        self.started = time.perf_counter() - self.before
        batches = iter(loader)
        with self.forward.running():
            while True:
                started = time.perf_counter()
                batch = next(batches, None)
                self.waited += time.perf_counter() - started
                if batch is None:
                    return
                yield batch

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """What the loss is divided by, of all ranks (collective)."""
        with self.profile.within("all-reduce"):
            summed: Tensor = self.accelerator.reduce(value, reduction="sum")
            return summed

    def add(self, items: dict[str, Tensor], files: list[str]) -> None:
        """Note the mean losses of one batch of this rank; no host sync."""
        self.names = list(items)
        self.batches.append((torch.stack(list(items.values())), len(files), files))

    def step(self, norm: Tensor) -> None:
        """Note the gradient norm of one step; no host sync."""
        self.norms.append(norm)

    def gather(self) -> Window:
        """Everything since the last call, over all ranks (collective).

        Raises:
            FloatingPointError: on all ranks, naming images, where a loss is not a finite number.
        """
        images = sum(count for _, count, _ in self.batches)
        losses = torch.stack([items * count for items, count, _ in self.batches]).sum(0)
        norms = torch.stack(self.norms).float()
        norm = norms[norms.isfinite()].mean()[None]  # fp16 may step over some
        measured: list[float] = torch.cat([losses, norm]).tolist()  # waits for the device
        now = time.perf_counter()
        own = [now - self.started, self.waited, self.forward.take(), float(memory_in_use(self.accelerator.device))]
        mine = torch.tensor([measured + own])
        ranks = self.accelerator.gather(mine.to(self.accelerator.device)).cpu()  # (ranks, losses + 5)
        total = ranks[:, : len(self.names)].sum(0)
        if not total.isfinite().all():  # the same on all ranks
            self._name_images()
        steps = len(self.norms)
        self.batches.clear()
        self.norms.clear()
        self.waited, self.before, self.started = 0.0, 0.0, now
        seconds, waits, forwards, memory = ranks[:, -4:].T.tolist()
        return Window(
            losses=dict(zip(self.names, total.tolist(), strict=True)),
            images=images * self.accelerator.num_processes,  # each rank has an equal share of a batch
            steps=steps, grad_norm=ranks[0, -5].item(), seconds=seconds, waits=waits, forwards=forwards, memory=memory,
        )  # fmt: skip

    def pending(self) -> dict[str, Any]:
        """What has been added since the last call of `gather`, of all ranks, as plain values (collective).

        Raises:
            FloatingPointError: as `gather`.
        """
        losses = torch.stack([items for items, *_ in self.batches]) if self.batches else torch.zeros(0, 1)
        losses = self.accelerator.gather(losses[None].to(self.accelerator.device)).cpu()  # (ranks, batches, losses)
        if not losses.isfinite().all():
            self._name_images()
        norms = torch.stack(self.norms).cpu() if self.norms else torch.zeros(0)
        counts = [count for _, count, _ in self.batches]
        seconds = time.perf_counter() - self.started
        return {"names": self.names, "losses": losses, "images": counts, "norms": norms, "seconds": seconds}

    def resume(self, pending: dict[str, Any]) -> None:
        """Go on from what `pending` has told, perhaps of another number of ranks: the first rank then has all of it."""
        losses, counts = pending["losses"], pending["images"]
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        if len(losses) == ranks:
            mine = losses[rank]
        else:  # images is the global batch over the ranks
            mine = losses.mean(0)
            counts = [count * len(losses) // ranks for count in counts]
        device = self.accelerator.device
        self.batches = [(items.to(device), count, []) for items, count in zip(mine, counts, strict=True)]
        self.norms, self.names = [*pending["norms"].to(device)], pending["names"]
        self.before = pending["seconds"]

    def _name_images(self) -> None:
        """Find the first batch whose loss is not finite on any rank, and end all ranks with its images (collective)."""
        bad = [i for i, (items, *_) in enumerate(self.batches) if not items.isfinite().all()]
        first = min(gather_object([bad[0] if bad else len(self.batches)]))
        items, _, files = self.batches[first]
        images = gather_object([files if not items.isfinite().all() else []])
        named = [file for part in images for file in part]
        raise FloatingPointError(
            f"The loss is no longer a finite number, and nothing was saved since. First in the batch of "
            f"{', '.join(named[:64])}. Look at these images and labels, lower --lr0, or try --mixed_precision no."
        )
