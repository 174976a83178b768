"""The index of each split: found, or read by all ranks of a machine together and written for all that come after."""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

import train
from train.config.errors import InputError
from train.config.objects import Carries
from train.config.options import Data, TrainConfig, ValConfig
from train.config.words import printable
from train.data.arrays import open_arrays, remove_unused, write_arrays
from train.data.check import Check, Found
from train.data.files import find_data
from train.data.formats import ImageLabels, read_image, read_labelled
from train.data.index import Index, finished, join, open_index, pack
from train.data.listing import DataFiles, label_file
from train.data.tables import Table, images_of
from train.processes.collectives import first_of_machine, together
from train.processes.cores import cores_of_rank
from train.processes.devices import launched, local_processes, machine
from train.processes.files import cache_folder
from train.processes.holders import take
from train.processes.parent import end_with_parent
from train.processes.room import network_disk

BLOCK = 512  # images that a worker reads before it hands over what it has read
Counted = Callable[[Iterable[Any], int], Iterable[Any]]


def uncounted(items: Iterable[Any], total: int) -> Iterable[Any]:
    """The items, without a word on how far they have come."""
    return items


def index_folder(config: Data) -> Path:
    """Where indexes are kept."""
    return Path(config.index_dir) if config.index_dir else cache_folder()


def check_ahead(config: Any, *splits: str, carries: Carries = "boxes") -> Check | None:
    """Begin to check the splits while the ranks start; on one process of each machine.

    None where the data set is not known yet. What is wrong with the input is said where it is read.
    """
    if launched("LOCAL_RANK", 0) or not config.data or config.data == "shapes":
        return None
    try:
        data = find_data(*_asked(config, carries), say=None)
    except InputError:
        return None
    return Check(data, splits, index_folder(config), config.index_check, _asked(config, carries))


def _asked(config: Any, carries: Carries) -> tuple[str, bool, tuple[int, ...] | None, Carries, Path]:
    """What `find_data` is asked."""
    return config.data, config.single_cls, config.classes, carries, index_folder(config)


def read_data(
    config: TrainConfig | ValConfig,
    carries: Carries,
    accelerator: Accelerator,
    say: Callable[[str], None],
    ahead: Check | None = None,
) -> DataFiles:
    """The data set that --data means, as this machine has it (collective); see `find_data`. Images that were in its
    files are held from here on, so that no other run removes them.

    Args:
        config, carries: what is asked.
        accelerator: of the run.
        say: see `find_data`.
        ahead: the check that has been begun on this process: it has found the data set, if it was asked the same, and
            the states of 100,000 files are not looked at twice.

    Raises:
        InputError: on all ranks, where a machine does not have it.
    """

    def find() -> DataFiles:
        asked = _asked(config, carries)
        data = ahead.data if ahead is not None and ahead.asked == asked else find_data(*asked, say=say)
        for table, _ in data.tables.values():
            take(images_of(Path(table)))
        return data

    return first_of_machine(accelerator, find)


def read_index(
    data: DataFiles,
    splits: tuple[str, ...],
    config: Data,
    accelerator: Accelerator,
    ahead: Check | None = None,
    say: Callable[[str], None] = lambda line: None,
    counted: Counted = uncounted,
) -> dict[str, Index]:
    """The index of each split, as this machine has it (collective).

    Args:
        data: the data set.
        splits: of it.
        config: where indexes are kept, and what of them is checked.
        accelerator: of the run.
        ahead: the check that has been begun on this process.
        say: is given a line on what was checked and what is read.
        counted: is given this rank's images and their number, and hands them on while it shows how far they have come.

    Raises:
        InputError: on all ranks, where a split cannot be used, or the machines do not have the same images and labels.
    """
    folder = index_folder(config)

    def check() -> dict[str, Found]:
        fits = ahead is not None and ahead.is_of(data, splits)
        if ahead is not None and not fits:  # a run that is gone on with names other data
            ahead.end()
        here = (ahead if fits and ahead else Check(data, splits, folder, config.index_check)).results()
        for one in here.values():
            if one.error:
                raise InputError(one.error)
        return here

    found = first_of_machine(accelerator, check)
    machines = gather_object([found])
    indexes: dict[str, Index] = {}
    for split in dict.fromkeys(splits):
        one = found[split]
        twin = next((s for s in indexes if all(there[s].file == there[split].file for there in machines)), None)
        if all(there[split].valid for there in machines):
            words = f"checked ({one.checked}) in {one.seconds:.1f} s"
        elif twin is not None:  # of another name
            one, words = found[twin], f"the same as {twin}"
        else:
            reason = f", for {one.why}" if one.why else ""
            say(f"reading the labels of {one.images} images of {split}{reason}")
            _build(one, split, data, accelerator, say, counted)
            words = f"kept in {Path(one.file).parent}"
        table = Table(*data.tables[split]) if split in data.tables else None
        indexes[split] = index = open_index(one.file, one.base, table)
        say(f"index      {split}: {len(index)} images with their labels, {words}")
        _check_same(index, data, accelerator)
    if disk := network_disk(folder):
        say(f"warning: the index is in {folder}, on {disk}, a network disk; --index-dir names another place")
    return indexes


def _build(
    found: Found, split: str, data: DataFiles, accelerator: Accelerator, say: Callable[[str], None], counted: Counted
) -> None:
    """Read the labels of a split, each rank of the machine a share, and write the index; where it is, `found` then says
    (collective; machines that have it already do nothing but be there).

    An index that cannot be written where it belongs is written into the temporary folder, for this run.
    """
    rank, ranks = launched("LOCAL_RANK", 0), local_processes()
    parts = [Path(f"{found.listing}.{number}") for number in range(ranks)]
    files: list[str] = []

    def read() -> None:
        if not found.valid:
            listing, _ = open_arrays(Path(found.listing))
            names = os.fsdecode(listing["paths"].tobytes()).split("\0")
            files.extend(os.path.join(found.base, name) for name in names)
            bounds = np.linspace(0, len(files), ranks + 1).astype(int)
            rows = bounds[rank], bounds[rank + 1]
            blocks = _Blocks(files, rows, found.base, data.keypoints, data.tables.get(split))
            write_arrays(parts[rank], _read(blocks, counted), {})

    together(read)
    found.file, warning = first_of_machine(
        accelerator, lambda: (found.file, "") if found.valid else _join(parts, found, data, split, files)
    )
    if warning:
        say(warning)


def _read(blocks: "_Blocks", counted: Counted) -> dict[str, np.ndarray]:
    """The labels of some images, packed."""
    return join([pack([], blocks.base), *spread(by_workers(blocks), blocks.end - blocks.first, counted)])


def by_workers(blocks: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """The blocks, in their order, each made by one of several processes: threads would wait for each other."""
    workers = min(cores_of_rank(), len(blocks)) if len(blocks) > 1 else 0
    loader: DataLoader = DataLoader(
        blocks,  # type: ignore[arg-type]  # a sequence is a data set
        batch_size=None, collate_fn=_as_it_is, num_workers=workers, worker_init_fn=end_with_parent,
        generator=torch.Generator(),  # the global one is the run's
    )  # fmt: skip
    return loader


def spread(blocks: Iterable[dict[str, Any]], images: int, counted: Counted) -> Iterator[dict[str, Any]]:
    """The blocks, each counted as as many images as its arrays are long."""

    def each() -> Iterator[dict[str, Any] | None]:
        for block in blocks:
            yield block
            yield from [None] * (len(next(iter(block.values()))) - 1)

    yield from (block for block in counted(each(), images) if block is not None)


def _as_it_is(block: Any) -> Any:
    return block


class _Blocks(Sequence[dict[str, np.ndarray]]):
    """The labels of some images of a split, read when they are asked for, a block at a time.

    Args:
        files: all images of the split.
        rows: the first of them, and the one after the last.
        base, keypoints: see `pack` and `read_label`.
        table: of the split's annotation file, if it has one.
    """

    def __init__(
        self, files: list[str], rows: tuple[int, int], base: str, keypoints: tuple[int, ...], table: list | None
    ):
        (self.first, self.end), self.files, self.base, self.keypoints = rows, files, base, keypoints
        self.table = Table(*table) if table else None

    def __len__(self) -> int:
        return -(-(self.end - self.first) // BLOCK)

    def __getitem__(self, i: Any) -> Any:
        if i >= len(self):
            raise IndexError(i)
        first = self.first + i * BLOCK
        return pack([self._image(row) for row in range(first, min(first + BLOCK, self.end))], self.base)

    def _image(self, row: int) -> ImageLabels | str:
        file = self.files[row]
        if self.table is None:
            return read_image(file, label_file(file), 0, sys.maxsize, self.keypoints)
        source = f"{self.table.source}: {file}"
        if row in self.table.faults:
            return f"{source}: {self.table.faults[row]}"
        return read_labelled(file, source, partial(self.table.labels, row), bool(self.keypoints))


def _join(parts: list[Path], found: Found, data: DataFiles, split: str, files: list[str]) -> tuple[str, str]:
    """Write the index from what the ranks have read; where it is, and a warning where that is not where it belongs."""
    listing, _ = open_arrays(Path(found.listing))
    packed = join([open_arrays(part)[0] for part in parts])
    arrays = finished(packed, listing["paths"], listing["listed"], files)
    about = {"base": found.base, "keypoints": json.dumps(data.keypoints), "pictures": found.pictures}
    about["table"] = Path(data.tables[split][0]).name if split in data.tables else ""
    warning = ""
    try:
        write_arrays(Path(found.file), arrays, about)
    except OSError as error:
        own = Path(train.scratch.name) / Path(found.file).name
        warning = (
            f"warning: the index cannot be kept in {Path(found.file).parent} ({error.strerror or error}), so the "
            "labels are read again next time; --index-dir names another place"
        )
        try:
            write_arrays(own, arrays, about)
        except OSError as worse:
            raise InputError(
                f"The index of the labels cannot be written to {found.file} ({error.strerror or error}), nor to {own} "
                f"({worse.strerror or worse}). Name another place with --index-dir."
            ) from None
        found.file = str(own)
    remove_unused(Path(found.file), f"{Path(found.file).name.partition('-')[0]}-*.labels*")
    for part in parts:
        part.unlink(missing_ok=True)
    return found.file, warning


def _check_same(index: Index, data: DataFiles, accelerator: Accelerator) -> None:
    """Raise InputError on all ranks where the machines have not the same images and labels (collective).

    Where they stand is each machine's own.
    """
    if accelerator.num_processes == local_processes():
        return
    listed = index.listed.tobytes() + index.numbers.tobytes() + index.arrays["paths"].tobytes()
    every = gather_object([(machine(), platform.node(), hashlib.sha256(listed).hexdigest())])
    if len({digest for _, _, digest in every}) == 1:
        return
    mine = {}
    if accelerator.is_local_main_process:
        names = os.fsdecode(index.arrays["paths"].tobytes()).split("\0")
        mine = dict(zip(names, zip(index.sizes.tolist(), index.numbers.tolist(), strict=True), strict=True))
    several = [(host, one) for host, one in gather_object([(platform.node(), mine)]) if one]
    (host, first), *others = several
    for other_host, other in others:
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                said = [f"{told[0]} bytes" if told else "not there" for told in (first.get(name), other.get(name))]
                what = f"{said[0]} and {said[1]}" if said[0] != said[1] else "in its labels"
                raise InputError(
                    f"The machines do not see the same images: {len(first)} on {host}, {len(other)} on {other_host}. "
                    f"First that differs: {printable(name)}, {what}. Copy the data set anew."
                )
    raise InputError(f"The machines do not list the images of {data.name} equally often. Copy the data set anew.")
