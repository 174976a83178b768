"""Which images a split lists, where their labels are, and when both were last changed.

It runs in a process of its own beside a script's start, so it imports nothing that takes seconds.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np

from train.config.errors import InputError
from train.config.objects import Objects
from train.data.tables import Table

BLOCK, SLOW, THREADS = 1024, 1e-4, 16  # images; seconds for one that tell a network disk; how many it is then asked for


@dataclass(frozen=True, kw_only=True)
class DataFiles(Objects):
    """A data YAML, resolved: what its splits name, and what is in them."""

    name: str
    root: Path
    splits: dict[str, Any]  # train, val, test as the YAML gives them
    endings: tuple[str, ...]  # of images, in lower case
    tables: dict[str, list]  # by split that has an annotation file: its table, and pairs of category id and class index

    def images(self, split: str) -> list[str]:
        """Sorted image paths of a split. An image that is listed twice is there twice: people oversample rare classes.

        Raises:
            InputError: the YAML does not name the split, or what it names is not there or holds no image.
        """
        entries = self.splits.get(split)
        if not entries and os.path.isdir(self.name):
            there = ", ".join(self.splits)
            raise InputError(
                f"{self.name} has no `{split}` images, but {there}; --split of a training or validation names one."
            )
        if not entries:
            line = f"{split}: folder-or-list.txt"
            if self.name.endswith(".data"):  # Darknet's
                line = "valid = valid.txt" if split == "val" else f"{split} = {split}.txt"
            raise InputError(f"{self.name} names no `{split}` images; add a line `{line}`.")
        if isinstance(entries, dict):
            return self._annotated(split, entries)
        files: list[str] = []
        for entry in as_list(entries):
            path = located(self.root, entry)
            if os.path.isdir(path):  # unlike pathlib's, these take any string
                files += _files_below(str(path))
            elif os.path.isfile(path):
                if path.suffix[1:].lower() in self.endings:
                    raise InputError(f"{self.name} says `{split}: {entry}`, an image; name its folder, or a .txt list.")
                try:
                    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
                except OSError as error:
                    raise InputError(
                        f"{self.name} says `{split}: {entry}`, but {path} cannot be read: {error.strerror}."
                    ) from None
                files += (_listed(line.strip(), path.parent, self.root) for line in lines if line.strip())
            else:
                hint = " Paths are written with / on this system." if "\\" in entry else ""
                raise InputError(f"{self.name} says `{split}: {entry[:200]}`, but there is no {str(path)[:300]}.{hint}")
        others, files = files, [file for file in files if file.rpartition(".")[2].lower() in self.endings]
        if not files:
            places = ", ".join(str(self.root / e) for e in as_list(entries))
            there = f" There are {len(others)} other files, first {others[0][:200]}." if others else ""
            raise InputError(f"{self.name}: no images in {places} ({', '.join(sorted(self.endings))}).{there}")
        files.sort()
        return files

    def _annotated(self, split: str, entries: dict[str, str]) -> list[str]:
        """Image paths of a split that has an annotation file."""
        file = located(self.root, entries["annotations"])
        if split not in self.tables:
            raise InputError(f"{self.name} says `{split}: annotations: {file}`, but there is no such file.")
        table = Table(*self.tables[split])
        folder = table.images or located(self.root, entries["images"])
        if not os.path.isdir(folder):
            raise InputError(f"{self.name} says `{split}: images: {folder}`, but there is no such folder.")
        files = [os.path.join(folder, name) for name in table.files]
        if not files:
            raise InputError(f"{file} lists no image; {split} needs one.")
        return files

    def annotations(self, split: str) -> str:
        """The split's annotation file in COCO's form; nothing where it has none."""
        entries = self.splits.get(split)
        if isinstance(entries, dict) and entries["annotations"].endswith(".json"):
            return str(located(self.root, entries["annotations"]))
        return ""


def _files_below(folder: str) -> Iterator[str]:
    """Files with an ending in a folder and below it, but no hidden ones.

    Links are followed, and each folder counts once, so that links in a circle end.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:  # links after all real folders, by whose paths labels are found
        for place, folders, files in os.walk(waiting.pop(0)):
            here = os.stat(place)
            if (here.st_dev, here.st_ino) in seen:
                folders.clear()
                continue
            seen.add((here.st_dev, here.st_ino))
            folders[:] = sorted(name for name in folders if name[0] != ".")
            waiting += (path for name in folders if os.path.islink(path := os.path.join(place, name)))
            yield from (os.path.join(place, name) for name in files if name[0] != "." and "." in name)


def located(root: Path, entry: str) -> Path:
    """The path of a split's entry; like Ultralytics, without a leading ../ where only that is there."""
    path = root / entry
    if entry.startswith("../") and not os.path.exists(path) and os.path.exists(root / entry[3:]):
        return root / entry[3:]
    return path


def as_list(entries: Any) -> list:
    """A split's entries, of which a YAML may name one alone; of one with an annotation file its images' folder."""
    if isinstance(entries, dict):
        return [entries["images"]]
    return entries if isinstance(entries, list) else [entries]


def _listed(line: str, beside: Path, root: Path) -> str:
    """A line of a .txt list: `./` is the list's folder; else absolute, from the working directory or from the root, or
    from there without the `data/` before it that CVAT writes.
    """
    if line.startswith("./"):
        return str(beside / line[2:])
    if os.path.isabs(line):
        return line
    if not os.path.exists(line):
        for name in (line, line.removeprefix("data/")):
            if os.path.exists(root / name):
                return str(root / name)
    return os.path.abspath(line)


def base_of(files: list[str], root: str) -> str:
    """The folder that paths in an index are relative to: the data set's, or where images lie elsewhere the one that
    holds them all. The same data set at another place has the same relative paths.
    """
    inside = f"{root}/"
    if all(file.startswith(inside) for file in files):
        return root
    return os.path.commonpath({os.path.dirname(file) for file in files})


def relative(files: list[str], base: str) -> list[str]:
    """Paths from `base` on, as they are written; whole where they do not begin with it."""
    inside, begin = base.rstrip("/") + "/", len(base.rstrip("/")) + 1
    return [file[begin:] if file.startswith(inside) else file for file in files]


def label_file(image: str) -> str:
    """Where Ultralytics looks for an image's labels: in the last `labels` for `images` of its path, a .txt file."""
    before, images, name = image.rpartition("/images/")
    return f"{before}/labels/{name}".rsplit(".", 1)[0] + ".txt" if images else image.rsplit(".", 1)[0] + ".txt"


def stats(files: list[str], beside: bool, alive: Callable[[], None]) -> np.ndarray:
    """Bytes and time of the last change (ns) of each image and of its labels, (n, 4) int64; -1 where there is no file.

    Args:
        files: images.
        beside: whether they have label files.
        alive: is called now and then, and may end the work.
    """
    found = np.full((len(files), 4), -1, dtype=np.int64)

    def block(start: int) -> None:
        alive()
        for i in range(start, min(start + BLOCK, len(files))):
            for column, file in ((0, files[i]), (2, label_file(files[i])))[: 1 + beside]:
                try:
                    stat = os.stat(file)
                except (OSError, ValueError):  # ValueError: a zero byte in a list
                    continue
                found[i, column], found[i, column + 1] = stat.st_size, stat.st_mtime_ns

    begun = time.perf_counter()
    block(0)
    rest = range(BLOCK, len(files), BLOCK)
    if time.perf_counter() - begun > SLOW * BLOCK:
        with ThreadPool(THREADS) as pool:
            pool.map(block, rest, 1)
    else:
        for start in rest:
            block(start)
    return found
