"""The image cache: images decoded and at training size, in one file that all ranks, workers and runs of a machine map.

`ram` lies in /dev/shm for as long as a run holds it; `disk` beside the indexes, where the least recently used caches
give way to new ones. `python -m train.data.cache` removes those that no run holds (`make clean-cache`).
"""

import argparse
import atexit
import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from train.config.errors import InputError
from train.config.options import TrainConfig
from train.config.words import in_bytes
from train.data.arrays import allocate, open_arrays
from train.data.imagecache import ImageCache, pixels_of
from train.data.index import Index
from train.data.scan import Counted, index_folder
from train.data.sets import Images
from train.data.tables import INSIDE
from train.processes import holders, room
from train.processes.collectives import first_of_machine, together
from train.processes.cores import cores_of_rank
from train.processes.devices import launched, local_processes
from train.processes.files import DRAFT, cache_folder, draft_of

VERSION = 1  # of how images are decoded and scaled
ENDING = f".images{VERSION}"
OWN = f"yolo-accelerate-{os.getuid()}-"  # begins this user's files in /dev/shm
LEFT = 1_000_000_000  # bytes of memory that each rank keeps for itself, and that a disk keeps
BATCHES = 3  # in the hands of each worker
SPOKEN = 10.0  # seconds of work after which the time that is left is told


@dataclass(eq=False)
class Wanted:
    """A cache that a run wants.

    Args:
        dataset: whose images.
        name: of its split.
        file: where it is, or is to be.
        rows: of the index, rising.
        places: of the same images in the data set.
        shapes: (n, 3) int32: height, width and channels at training size.
    """

    dataset: Images
    name: str
    file: Path
    rows: np.ndarray
    places: np.ndarray
    shapes: np.ndarray

    @cached_property
    def first(self) -> np.ndarray:
        """(n + 1,) int64: where each image's pixels begin."""
        return np.append(0, np.cumsum(self.shapes.astype(np.int64).prod(1)))

    @property
    def size(self) -> int:
        """Bytes that its pixels take."""
        return int(self.first[-1])


def wanted(dataset: Images, name: str, folder: Path) -> Wanted:
    """The cache of a data set's images; its file's name says of which, at which size, and of what version.

    Args:
        dataset: with its images.
        name: of its split.
        folder: of the cache.
    """
    labels, imgsz = dataset.scanned, dataset.imgsz
    rows, places = np.unique(labels.rows, return_index=True)
    originals = labels.source.shapes[rows]
    ratio = imgsz / originals.max(1, keepdims=True)
    sides = np.where(ratio == 1, originals, np.minimum(np.ceil(originals * ratio), imgsz)).astype(np.int32)
    shapes = np.concatenate([sides, np.full((len(rows), 1), dataset.channels, np.int32)], 1)
    begin = OWN if folder == room.SHARED else ""
    file = folder / f"{begin}{labels.source.pictures}-{_which(labels.source, rows)}{imgsz}-{dataset.channels}{ENDING}"
    return Wanted(dataset, name, file, rows, places, shapes)


def _which(index: Index, rows: np.ndarray) -> str:
    """Which images of the index are in a cache, as a part of its name."""
    return "" if len(rows) == len(index) else f"{hashlib.sha256(rows.tobytes()).hexdigest()[:8]}-"


def cache_images(
    datasets: dict[str, Images],
    config: TrainConfig,
    accelerator: Accelerator,
    say: Callable[[str], None],
    counted: Counted,
) -> None:
    """Give each data set its cache, which is found, or built by all ranks of the machine together (collective).

    Without --cache only what runs that were killed have left in the memory is removed.

    Args:
        datasets: by name of the split.
        config: the kind of the cache, and how large caches on a disk may be together.
        accelerator: of the run.
        say: is given lines.
        counted: see `read_index`.

    Raises:
        InputError: on all ranks, where it would not fit; it says into what, and what would.
    """
    if config.cache != "ram" and accelerator.is_local_main_process:
        sweep()
    if config.cache is None:
        return
    folder = room.SHARED if config.cache == "ram" else index_folder(config)
    each = [wanted(dataset, name, folder) for name, dataset in datasets.items()]
    caches = list({cache.file: cache for cache in each}.values())  # both splits may have the same images
    held: dict[Path, int] = {}  # by the first process of the machine, so that nobody removes them meanwhile
    lines, drafts = first_of_machine(accelerator, lambda: _prepare(caches, held, config, folder))
    for line in lines:
        say(line)
    for cache, draft, builds in zip(caches, drafts, _any_machine(drafts), strict=True):
        told = f"{len(cache.rows)} images at {cache.dataset.imgsz} px, {in_bytes(cache.size)} in {folder}"
        if builds:
            say(f"caching {told}")
            together(partial(_fill, cache, draft, counted, say))
            first_of_machine(accelerator, partial(_finish, draft, cache.file, held))
        names = " and ".join(other.name for other in each if other.file == cache.file)
        say(f"cache      {names}: {told}{'' if builds else ', found'}")
    opened: dict[Path, ImageCache] = {}
    for cache in each:
        if cache.file not in opened:
            lock = holders.take(cache.file)
            assert lock is not None  # the first process of the machine holds it
            opened[cache.file] = ImageCache(cache.file, lock)
        cache.dataset.cached = opened[cache.file]
    accelerator.wait_for_everyone()  # before the first process of the machine lets go
    for lock in held.values():
        os.close(lock)


def _prepare(
    caches: list[Wanted], held: dict[Path, int], config: TrainConfig, folder: Path
) -> tuple[list[str], list[Path | None]]:
    """Hold the caches that are there, and drafts of those that are not; what there is to say, and the drafts."""
    for file in [cache.file for cache in caches]:
        if (lock := _take_whole(file)) is not None:
            held[file] = lock
            with contextlib.suppress(OSError):  # another user's
                os.utime(file)  # it is in use
    missing = [cache for cache in caches if cache.file not in held]
    lines = make_room(missing, config, folder) if missing else []
    drafts: list[Path | None] = []
    for cache in caches:
        draft = None
        if cache in missing:
            draft, held[cache.file] = _draft(cache)
        drafts.append(draft)
    return lines, drafts


def _take_whole(file: Path) -> int | None:
    """Hold a cache that is there; one that was cut off, or is none, is removed: whoever has it mapped keeps that."""
    if (lock := holders.take(file)) is None:
        return None
    if file.parent == room.SHARED and os.fstat(lock).st_uid != os.getuid():
        raise InputError(f"--cache ram: {file} is another user's, who must have meant it. Say --cache disk.")
    try:
        if open_arrays(file)[0].keys() == {"first", "rows", "shapes", "whole", "pixels"}:
            return lock
    except OSError:
        pass
    os.close(lock)
    file.unlink(missing_ok=True)
    return None


def _any_machine(drafts: list[Path | None]) -> list[bool]:
    """By cache, whether one of the machines builds it (collective)."""
    every = gather_object([[draft is not None for draft in drafts]])
    return [any(builds) for builds in zip(*every, strict=True)]


def sweep() -> None:
    """Remove this user's caches in the memory that no run holds."""
    for file in _in_memory():
        holders.remove_unheld(file)


def _in_memory() -> list[Path]:
    """This user's caches in the memory, those that are being written included."""
    return [*room.SHARED.glob(f"{OWN}*"), *room.SHARED.glob(f".{OWN}*{DRAFT}")]


def make_room(missing: Sequence[Wanted], config: TrainConfig, folder: Path) -> list[str]:
    """Remove what nobody needs any more, and check that the caches fit; what there is to say of it.

    Args:
        missing: the caches that are to be built.
        config: the kind of the cache, how large those on a disk may be together, and the workers.
        folder: of the caches.

    Raises:
        InputError: they do not fit.
    """
    needed = sum(cache.size for cache in missing)
    if config.cache == "ram":
        if not folder.is_dir():
            raise InputError(f"--cache ram needs {folder}, which this system does not have. Say --cache disk.")
        sweep()
        loaders = BATCHES * min(config.workers, cores_of_rank()) * local_processes()
        batches = loaders * (config.batch // local_processes() + config.val_batch) * config.imgsz**2 * 3
        disk = "--cache disk, which the page cache shares as well"
        more = f"{disk}, or give the container more of it (docker run --shm-size)"
        _check(missing, room.disk(folder) - batches, f"in {folder}, less what the workers hand over there", more)
        _check(missing, room.memory() - LEFT * local_processes(), "of memory, less 1 GB for each process", disk)
        return []
    kept = sorted(folder.glob(f"*{ENDING}"), key=lambda file: file.stat().st_mtime)
    limit, sizes = int(config.cache_limit * 1e9), {file: file.stat().st_size for file in kept}
    _check(missing, limit, "by --cache-limit", "a higher --cache-limit")
    removed: list[int] = []
    for file in [*folder.glob(f".*{ENDING}.*{DRAFT}"), *kept]:
        if file in sizes and sum(sizes.values()) + needed <= limit and room.disk(folder) - LEFT >= needed:
            break
        if holders.remove_unheld(file) and file in sizes:
            removed.append(sizes.pop(file))
    _check(missing, limit - sum(sizes.values()), "by --cache-limit, less what other runs use", "a higher --cache-limit")
    _check(missing, room.disk(folder) - LEFT, f"in {folder}, less 1 GB", "--index-dir, a folder on another disk")
    if not removed:
        return []
    what = f"{len(removed)} cache{'s'[: len(removed) != 1]} not used for long, of {in_bytes(sum(removed))}"
    return [f"{what}, were removed from {folder}"]


def _check(missing: Sequence[Wanted], free: int, where: str, mend: str) -> None:
    """Raise InputError where the caches need more than is free; it says which share of the images would fit."""
    needed, first = sum(cache.size for cache in missing), missing[0]
    if needed <= free:
        return
    labels = first.dataset.scanned
    share = (free - (needed - first.size)) / first.size * len(labels) / len(labels.source.listed)
    if first.name == "train" and share >= 0.01:
        mend = f"--fraction {math.floor(100 * share) / 100:g}, or {mend}"
    images = sum(len(cache.rows) for cache in missing)
    raise InputError(
        f"--cache: {images} images at {first.dataset.imgsz} px take {in_bytes(needed)}, and there are "
        f"{in_bytes(max(free, 0))} free {where}. Say {mend}."
    )


def _draft(cache: Wanted) -> tuple[Path, int]:
    """A file of the cache's size under another name, and what holds it."""
    mode = 0o600 if cache.file.parent == room.SHARED else 0o666  # there all users of the machine meet
    for _ in range(3):  # another run may take it for one that nobody holds
        draft = draft_of(cache.file)
        count = len(cache.rows)
        shapes = {"first": (np.int64, (count + 1,)), "rows": (np.int32, (count,)), "shapes": (np.int32, (count, 3))}
        try:
            draft.parent.mkdir(parents=True, exist_ok=True)
            allocate(draft, shapes | {"whole": (np.uint8, (count,)), "pixels": (np.uint8, (cache.size,))}, mode)
        except OSError as error:
            raise InputError(
                f"--cache: {draft.parent} has no room for {in_bytes(cache.size)} ({error.strerror or error}). "
                "Say --index-dir, another disk."
            ) from None
        atexit.register(draft.unlink, missing_ok=True)  # where it is not finished
        if (lock := holders.take(draft)) is not None:
            arrays, _ = open_arrays(draft, "r+")
            arrays["first"][:], arrays["rows"][:], arrays["shapes"][:] = cache.first, cache.rows, cache.shapes
            return draft, lock
    raise InputError(
        f"--cache: the files in {cache.file.parent} are removed by another process while they are written."
    )


def _fill(cache: Wanted, draft: Path | None, counted: Counted, say: Callable[[str], None]) -> None:
    """Decode this rank's share of the images. What cannot be decoded is left to the loader, which knows what to do."""
    if draft is None:  # this machine has it
        return
    arrays, _ = open_arrays(draft, "r+")
    pixels, first, shapes, whole = (arrays[name] for name in ("pixels", "first", "shapes", "whole"))
    originals = cache.dataset.scanned.source.shapes

    def one(slot: int) -> None:
        try:
            image, original, _ = cache.dataset.decode(int(cache.places[slot]))
        except FileNotFoundError:  # what Ultralytics makes of any image that cannot be read
            return
        if image.shape == tuple(shapes[slot]) and original == tuple(originals[cache.rows[slot]]):
            pixels_of(pixels, first, shapes, slot)[:] = image
            whole[slot] = 1

    share = range(launched("LOCAL_RANK", 0), len(cache.rows), local_processes())
    with ThreadPool(max(min(8, cores_of_rank()), 1)) as pool:
        for _ in counted(_estimated(pool.imap_unordered(one, share, 8), len(share), say), len(share)):
            pass


def _estimated(items: Iterable[Any], total: int, say: Callable[[str], None]) -> Iterator[Any]:
    """The items; once, after a while, is said how long the rest will take."""
    begun, said = time.monotonic(), False
    for number, item in enumerate(items, 1):
        yield item
        passed = time.monotonic() - begun
        if not said and passed > SPOKEN:
            said = True
            say(f"caching images: about {passed / number * (total - number) / 60:.0f} minutes left")


def _finish(draft: Path | None, file: Path, held: dict[Path, int]) -> None:
    """The cache is whole from here on, unless another run has been faster: then it is that one's, and this holds it."""
    if draft is None:
        return
    if file.parent != room.SHARED:
        with open(draft, "rb") as opened:
            os.fsync(opened.fileno())
    if (lock := _take_whole(file)) is None:
        os.replace(draft, file)
        return
    draft.unlink()
    os.close(held[file])
    held[file] = lock


def main() -> None:
    """Remove all caches that no run holds, and images that were written out of parquet files."""
    parser = argparse.ArgumentParser(description="Remove caches of images that no run uses.")
    parser.add_argument("--index-dir", default=str(cache_folder()), help="folder that keeps them")
    folder = Path(parser.parse_args().index_dir)
    removed = bytes_ = 0
    in_folder = (file for name in (f"*{ENDING}", f"*{INSIDE}", f".*{DRAFT}") for file in folder.glob(name))
    for file in [*_in_memory(), *in_folder]:
        with contextlib.suppress(OSError):
            size = sum(one.stat().st_size for one in (file.iterdir() if file.is_dir() else [file]))
            if holders.remove_unheld(file):
                removed, bytes_ = removed + 1, bytes_ + size
    print(f"{removed} cache{'s'[: removed != 1]} of {in_bytes(bytes_)} removed from {room.SHARED} and {folder}")


if __name__ == "__main__":
    main()
