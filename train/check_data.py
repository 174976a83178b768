"""See what is in a data set, and what is wrong with it, before a week of training does.

    python train/check_data.py coco8.yaml
    python train/check_data.py folder --imgsz 1280 --json > report.json
    make check-data DATA=coco8.yaml

Takes what --data of a training takes. Prints what is in it and every kind of fault, and writes all of them, a picture
of the labels' statistics and a page of samples into --save-dir. `--fix DIR` writes a cleaned copy. Exit code 1 where a
fault is an error: something that the training would leave out, or end at.
"""

from train.processes import early  # noqa: F401  # first, see there

# isort: split

import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from accelerate import Accelerator
from tqdm import tqdm

from train.config.errors import InputError
from train.config.options import Data
from train.config.words import in_bytes, printable
from train.data.coco_findings import of_annotations
from train.data.files import annotation_files, find_data
from train.data.findings import LEVELS, Finding, as_json, dumped, to_text
from train.data.index import Index
from train.data.labels import Labels
from train.data.listing import DataFiles
from train.data.looks import look_at
from train.data.mended import check_place, mend
from train.data.scan import index_folder, read_index
from train.data.set_findings import by_their_files, class_counts, findings
from train.processes.devices import launched
from train.processes.files import check_folder, new_folder
from train.reporting.plots import draw_labels, draw_samples

SPLITS = ("train", "val", "test")
SHOWN, CLASSES = 5, 40  # faults of a kind, and classes, that are printed
EVERY = 20.0  # seconds between two lines on how far it has come, where there is no bar
SIZES = (("small", 0, 32**2), ("medium", 32**2, 96**2), ("large", 96**2, np.inf))  # COCO's, in square px


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is checked, and what comes of it."""

    data: tyro.conf.Positional[str]
    """A data YAML or a folder, as --data of a training takes it."""
    imgsz: int = 640
    """Longer side, in px, that images are going to be trained at."""
    json: bool = False
    """Print JSON, and all else to the standard error."""
    fix: str = ""
    """Folder for a cleaned copy in the same format; it must not be there yet."""
    save_dir: str = ""
    """Folder for pictures and the list of all faults; unset makes runs/check/data, data2, …"""
    index_dir: str = ""
    """Folder that keeps what has been read of data sets; unset takes the user's cache."""


def main(options: Options) -> int:
    """Check it, and say what was found. Returns the exit code."""
    if launched("WORLD_SIZE", 1) > 1:
        raise InputError("train/check_data.py is one process; start it without accelerate launch or torchrun.")
    gc.enable()  # see early.py
    if options.imgsz < 1:
        raise InputError(f"--imgsz is {options.imgsz}; it must be a number of px above 0.")
    begun, config = time.perf_counter(), Data(index_dir=options.index_dir)

    def say(line: str) -> None:
        print(printable(line), file=sys.stderr if options.json else sys.stdout, flush=True)

    check_folder(Path(options.save_dir or "runs"), "--save-dir")
    found: list[Finding] = []
    data, indexes = None, {}
    try:
        data = find_data(options.data, folder=index_folder(config), say=say)
    except InputError as error:
        if not os.path.exists(options.data):
            raise
        found.append(Finding("data set that cannot be used", "", options.data, "", str(error)))
        found += [one for split, file in annotation_files(options.data).items() for one in of_annotations(split, file)]
    if data is not None:
        if options.fix:
            check_place(Path(options.fix), data)
        found += unusable(data)
        splits = tuple(split for split in SPLITS if data.splits.get(split) and not any(f.split == split for f in found))
        if splits:
            indexes = read_index(data, splits, config, Accelerator(cpu=True), say=say, counted=counted)
        looks = {split: look_at(index, index_folder(config), counted) for split, index in indexes.items()}
        found += findings(data, indexes, looks, options.imgsz, counted) if indexes else []
    folder = new_folder(Path("runs") / "check", "data", options.save_dir)
    told = by_their_files([*found], data, indexes) if data is not None else found
    (folder / "findings.txt").write_text(to_text(told), encoding="utf-8", errors="backslashreplace")
    inside = contents(data, indexes) if data is not None else {}
    for line in [*table(inside), *summary(told, folder)]:
        say(line)
    if data is not None:
        draw(data, indexes, config, folder)
    if options.fix and data is None:
        say(f"nothing is written to {options.fix}: no copy can be made of a data set that cannot be read at all")
    elif options.fix and data is not None:
        for line in mend(data, indexes, looks, found, Path(options.fix)):
            say(line)
    say(f"took {time.perf_counter() - begun:.1f} s; pictures and all faults are in {folder}")
    if options.json:
        print(dumped(inside | {"findings": as_json(told)}))
    return 1 if any(one.level == "error" for one in found) else 0


def unusable(data: DataFiles) -> Iterator[Finding]:
    """Splits that are needed and not named, or named and not there."""
    for split in SPLITS:
        if not data.splits.get(split) and split == "test":
            continue
        try:
            data.images(split)
        except InputError as error:
            yield Finding("split that cannot be used", split, data.name, "", str(error))


def counted(items: Iterable[Any], total: int) -> Iterator[Any]:
    """The items, under a bar on a terminal; elsewhere with a line now and then."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, unit="image", leave=False, file=sys.stderr)
        return
    last = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            print(f"{number} of {total} images", file=sys.stderr, flush=True)


def contents(data: DataFiles, indexes: dict[str, Index]) -> dict[str, Any]:
    """What is in a data set: of each split and each class the numbers."""
    splits: dict[str, Any] = {}
    classes: dict[str, Any] = {name: {} for name in data.names.values()}
    for split, index in indexes.items():
        usable = np.flatnonzero(index.usable)
        shapes, counts = index.shapes[usable].astype(np.int64), np.diff(index.first)
        image = np.repeat(np.arange(len(index)), counts)
        areas = index.boxes[:, 2:].prod(1) * index.shapes[image].astype(np.float64).prod(1)
        splits[split] = {
            "images": len(index),
            "bytes": int(index.sizes.clip(0).sum()),
            "unusable": len(index) - len(usable),
            "empty": int((counts[usable] == 0).sum()),
            "boxes": int(counts[usable].sum()),
            "width": _spread(shapes[:, 1]),
            "height": _spread(shapes[:, 0]),
            "aspect": _spread(shapes[:, 1] / shapes[:, 0].clip(1)),
        } | {name: int(((areas >= low) & (areas < high)).sum()) for name, low, high in SIZES}
        for (boxes, images), name in zip(class_counts(index, len(classes)).T.tolist(), classes, strict=True):
            classes[name][split] = {"boxes": boxes, "images": images}
    return {"data": data.name, "splits": splits, "classes": classes}


def _spread(values: np.ndarray) -> list[float]:
    """The least, the median and the greatest."""
    found = [values.min(), np.median(values), values.max()] if len(values) else []
    return [round(float(value), 3) for value in found]


def table(inside: dict[str, Any]) -> list[str]:
    """What is in a data set, as lines."""
    if not inside.get("splits"):
        return []
    lines = [f"data       {inside['data']}: {len(inside['classes'])} classes"]
    for split, one in inside["splits"].items():
        lines.append(
            f"{split:10} {one['images']} images ({in_bytes(one['bytes'])}), {one['boxes']} boxes, "
            f"{one['empty']} images without one, {one['unusable']} that cannot be used"
        )
        if one["width"]:
            sides = (
                f"{side} {low:g} to {high:g} (median {middle:g})"
                for side, (low, middle, high) in ((side, one[side]) for side in ("width", "height", "aspect"))
            )
            lines.append(f"{'':10} {', '.join(sides)}; boxes: " + ", ".join(f"{one[n]} {n}" for n, *_ in SIZES))
    splits = [*inside["splits"]]
    there = {name: one for name, one in inside["classes"].items() if any(one[split]["boxes"] for split in splits)}
    first = sorted(there.items(), key=lambda one: -max(numbers["boxes"] for numbers in one[1].values()))[:CLASSES]
    lines.append(f"{'class':24}" + "".join(f"{f'{split}: boxes, images':>24}" for split in splits))
    for name, by_split in first:
        numbers = (f"{by_split[split]['boxes']}, {by_split[split]['images']}" for split in splits)
        lines.append(f"{name[:23]:24}" + "".join(f"{number:>24}" for number in numbers))
    more = f"… and {len(there) - CLASSES} more: --json lists all"
    return lines + [more] * (len(there) > CLASSES)


def summary(found: list[Finding], folder: Path) -> list[str]:
    """Of each kind of fault how many there are, and the first."""
    lines = []
    for level, meaning in LEVELS.items():
        kinds = Counter(one.kind for one in found if one.level == level)
        total = sum(kinds.values())
        lines += [f"{total} {level}{'s' * (total > 1)} ({meaning})"] if total else []
        for kind, number in kinds.items():
            lines.append(f"  {kind}: {number}")
            lines += [f"    {one}" for one in [one for one in found if one.kind == kind][:SHOWN]]
            if number > SHOWN:
                lines.append(f"    … and {number - SHOWN} more in {folder / 'findings.txt'}")
    return lines or ["no fault found"]


def draw(data: DataFiles, indexes: dict[str, Index], config: Data, folder: Path) -> None:
    """Of each split a picture of the labels' statistics and a page of samples."""
    for split, index in indexes.items():
        labels = Labels(index, np.arange(len(index), dtype=np.int32), len(data.names), config)
        if len(labels):
            draw_samples(labels, data.names, folder / f"samples_{split}.jpg")
            if labels.counts[0].any():
                draw_labels(labels, data.names, folder / f"labels_{split}.png")


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options, description=__doc__)))
    except InputError as error:
        print(f"error: {printable(str(error), newlines=True)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
