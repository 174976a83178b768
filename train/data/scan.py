"""The labels of a split, read by all ranks together, and what is left out of it."""

import hashlib
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from ultralytics.data.utils import img2label_paths

from train.config.errors import InputError
from train.config.options import EvalConfig
from train.config.words import printable
from train.data.formats import Labels, read_image
from train.processes.cores import cores_of_rank
from train.processes.devices import local_processes

LONGEST = 1000  # characters of what is said of one file
Counted = Callable[[Iterable[Any], int], Iterable[Any]]


def uncounted(items: Iterable[Any], total: int) -> Iterable[Any]:
    """The items, without a word on how far they have come."""
    return items


def scan(
    files: list[str],
    names: dict[int, str],
    config: EvalConfig,
    accelerator: Accelerator,
    chosen: Sequence[int] | None = None,
    counted: Counted = uncounted,
) -> tuple[list[Labels], list[str]]:
    """Read all labels of a split, or of the chosen images in it, each rank a share of them (collective).

    Args:
        files: image paths of the whole split.
        names: class names by class index.
        config: the classes that count.
        accelerator: of the run.
        chosen: indices of the images that are wanted; unset takes all.
        counted: is given this rank's images and their number, and hands them on while it shows how far they have come.

    Returns:
        the usable images in the order of `files`, and one sentence for each that is left out. Nothing is written to
        the data folder.
    """
    chosen = range(len(files)) if chosen is None else chosen
    classes = sys.maxsize if config.single_cls else len(names)
    share = chosen[accelerator.process_index :: accelerator.num_processes]
    check_same_files(files, accelerator)
    label_files, ids = img2label_paths(files), image_ids(files)
    with ThreadPool(max(min(8, cores_of_rank()), 1)) as pool:
        read = pool.imap(
            lambda i: (i, read_image(files[i], label_files[i], ids[i], classes)),
            share,
            max(1, min(16, len(share) // 32)),
        )
        mine = list(counted(read, len(share)))
    read_by_all = sorted((pair for part in gather_object([mine]) for pair in part), key=lambda pair: pair[0])
    for i, entry in read_by_all:
        if isinstance(entry, Labels):
            entry.im_file = files[i]  # where it stands on this machine, and not where the rank that read it has it
    found = [entry for _, entry in read_by_all]
    usable = [_chosen(entry, config) for entry in found if isinstance(entry, Labels)]
    return usable, [printable(entry)[:LONGEST] for entry in found if isinstance(entry, str)]


def subset(images: int, fraction: float, limit: int | None) -> Sequence[int]:
    """Indices of a share of the images, or at most so many, evenly drawn from all."""
    wanted = min(max(1, round(images * fraction)), limit or images)
    return range(images) if wanted == images else [i * images // wanted for i in range(wanted)]


def _chosen(entry: Labels, config: EvalConfig) -> Labels:
    """The labels of the chosen classes, as one class where that is asked for."""
    if config.classes is not None:
        keep = np.isin(entry.cls, config.classes)
        segments = [segment for segment, kept in zip(entry.segments, keep, strict=False) if kept]
        entry = replace(entry, cls=entry.cls[keep], boxes=entry.boxes[keep], segments=segments)
    return replace(entry, cls=np.zeros_like(entry.cls)) if config.single_cls else entry


def check_usable(
    name: str, train: list[Labels] | None, val: list[Labels], faults: list[str], config: EvalConfig
) -> None:
    """Raise InputError where nothing is left to train on or to validate on, or, with --strict, where a file is faulty.

    Args:
        name: of the data set.
        train: labels of the images to train on; None where nothing is trained.
        val: labels of the images to validate on.
        faults: a sentence for each file that is left out.
        config: the classes that count, and whether it is strict.
    """
    if getattr(config, "strict", False) and faults:
        raise InputError("--strict, and these files are faulty:\n" + "\n".join(faults))
    reason = f" First of {len(faults)} faults: {faults[0]}" if faults else ""
    if train is not None and not any(len(entry.cls) for entry in train):
        only = "" if config.classes is None else f" of --classes {' '.join(map(str, config.classes))}"
        raise InputError(f"{name}: no train image has a usable label{only}.{reason}")
    if not val:
        raise InputError(f"{name}: no image to validate on can be used.{reason}")


def image_ids(files: list[str]) -> list[int]:
    """COCO image ids: the integer file stems where all stems of the split are distinct integers, else the positions.

    A stem that a float64 cannot hold exactly is no integer here: detections travel as rows of float64.
    """
    stems = [Path(file).stem for file in files]
    if all(stem.isdecimal() and stem.isascii() for stem in stems):
        ids = [int(stem) for stem in stems]
        if len(set(ids)) == len(ids) and max(ids) < 2**53:
            return ids
    return list(range(len(files)))


def check_same_files(files: list[str], accelerator: Accelerator) -> None:
    """Raise InputError on all ranks where they have not the same images, by relative names and sizes (collective).

    Where they stand is each machine's own. Of several machines one process of each looks at the sizes.
    """
    folders = {folder: os.path.abspath(folder) for folder in {os.path.dirname(file) for file in files}}
    base = os.path.commonpath(folders.values())
    folders = {folder: os.path.relpath(place, base) for folder, place in folders.items()}
    names = [f"{folders[folder]}/{name}" for folder, name in map(os.path.split, files)]
    sizes = [0] * len(files)
    several = accelerator.num_processes > local_processes()
    if several and accelerator.is_local_main_process:
        with ThreadPool(max(min(8, cores_of_rank()), 1)) as pool:
            sizes = pool.map(_size, files, 256)
    sized = [f"{n} {s}" for n, s in zip(names, sizes, strict=True)] if several else []
    digests = gather_object([hash_of(names), hash_of(sized)])
    lists, listed = digests[::2], digests[1::2]
    mains = gather_object([accelerator.is_local_main_process])
    if len(set(lists)) == 1 and len({told for told, main in zip(listed, mains, strict=True) if main}) == 1:
        return
    every = gather_object([(platform.node(), accelerator.is_local_main_process, dict(zip(names, sizes, strict=True)))])
    (host, _, first), *others = [one for one in every if one[1] or len(set(lists)) > 1]
    for other_host, _, other in others:
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                said = [
                    f"{size} bytes" if size is not None else "not there" for size in (first.get(name), other.get(name))
                ]
                raise InputError(
                    f"The machines do not see the same images: {len(first)} on {host}, {len(other)} on {other_host}. "
                    f"First that differs: {printable(name)}, {said[0]} and {said[1]}. Copy the data set anew."
                )


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:  # the reading of it says so
        return -1


def hash_of(files: list[str]) -> str:
    """A digest of the files' names."""
    return hashlib.sha256("\n".join(files).encode(errors="surrogateescape")).hexdigest()
