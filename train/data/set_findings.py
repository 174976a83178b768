"""What is wrong with the files, the images and the classes of a data set, and all that is found in it."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from train.data.findings import Finding
from train.data.index import Index
from train.data.label_findings import of_boxes, of_labels
from train.data.labels import ragged
from train.data.listing import DataFiles, label_file, located
from train.data.looks import ENDINGS, FORMATS, SIDE, Looks, copies
from train.data.scan import Counted
from train.data.tables import Table
from train.data.voc import annotations_of

BESIDE = ("txt", "xml", "json", "csv", "yaml", "yml", "cache", "names", "data", "md", "npy", "parquet")
NAME_LISTS = ("classes.txt", "labels.txt", "obj.names")  # that labelling tools leave beside their labels
LISTS = (*NAME_LISTS, "notes.txt", "readme.txt", "train.txt", "val.txt", "valid.txt", "test.txt")
UNEQUAL = 100  # times as many images of one class as of another


def findings(
    data: DataFiles, indexes: dict[str, Index], looks: dict[str, Looks], imgsz: int, counted: Counted
) -> Iterator[Finding]:
    """All that is found in the splits of a data set.

    Args:
        data: the data set.
        indexes: of its splits that can be used, in the order train, val, test.
        looks: of their images.
        imgsz: longer side, in px, that images are trained at.
        counted: is given what is done for each image and their number, and shows how far it has come.
    """
    read: dict[str, str] = {}
    for split, index in indexes.items():
        read.setdefault(index.from_file, split)  # one that has the same images as another has the same faults
    once = {split: indexes[split] for split in read.values()}
    yield from _of_files(once, data)
    yield from _of_xml_files(once, data)
    for split, index in once.items():
        yield from _of_images(split, index, looks[split])
        yield from of_labels(split, index, data, counted)
        yield from of_boxes(split, index, data, imgsz)
    yield from _of_copies(indexes, looks)
    yield from _of_classes(data, indexes)


def by_their_files(found: list[Finding], data: DataFiles, indexes: dict[str, Index]) -> list[Finding]:
    """The findings, where images were inside files by these and their rows: nobody knows what is written out of them.

    Args:
        found: all of them.
        data, indexes: see `findings`.
    """
    for split, index in indexes.items():
        table = Table(*data.tables[split]) if split in data.tables else None
        if table is not None and table.images is not None:
            rows = {index.file(row): place for row, place in enumerate(table.places)}
            for i, one in enumerate(found):
                file, where = rows.get(one.file, (one.file, one.where))
                found[i] = replace(one, file=file, where=where, what=one.what.replace(f"{table.images}/", ""))
    return found


def _of_files(indexes: dict[str, Index], data: DataFiles) -> Iterator[Finding]:
    """Images without labels, labels without images, and what lies among images and is none that the loader takes."""
    files = {split: [index.file(row) for row in range(len(index))] for split, index in indexes.items()}
    known = {os.path.normpath(file) for some in files.values() for file in some}
    claimed = {label_file(file) for file in known}
    looked_at: set[str] = set()
    for split, some in files.items():
        annotated = split in data.tables
        for file in [] if annotated else some:
            if not os.path.exists(label_file(file)):
                what = f"there is no {label_file(file)}: it is background"
                yield Finding("image without label", split, file, "", what)
        here = images = {os.path.normpath(os.path.dirname(file)) for file in some}
        if annotated and (folder := _images_of(split, data)):
            images = here | _below(folder)  # in a folder without one that is listed there may be others
        for file in _beside(images - looked_at, known):
            ending = file.rpartition(".")[2].lower()
            if ending in data.endings and annotated:
                yield Finding("image without label", split, file, "", "no annotation file lists it; it is not used")
            elif ending not in (*data.endings, *BESIDE) and os.path.dirname(file) in here:
                what = f"an image ends with {', '.join(data.endings)}; it is not used"
                yield Finding("wrong extension", split, file, "", what)
        folders = {os.path.dirname(label_file(file)) for file in ([] if annotated else some)}
        for file in _beside(folders - looked_at, claimed):
            name = os.path.basename(file).lower()
            if name in NAME_LISTS:
                yield from _of_names(split, file, data)
            elif name.endswith(".txt") and name not in LISTS:
                yield Finding("label without image", split, file, "", "there is no image of this name")
        looked_at |= images | folders


def _of_xml_files(indexes: dict[str, Index], data: DataFiles) -> Iterator[Finding]:
    """XML files of VOC's that no list names, and that have no image; where there is one, that is told."""
    tables = {split: Table(*data.tables[split]) for split in indexes if split in data.tables}
    listed = {os.path.normpath(file) for table in tables.values() for file, _ in table.places}
    looked_at: set[str] = set()
    for split in tables:
        annotations = located(data.root, data.splits[split]["annotations"])
        if annotations.suffix == ".txt":
            below = _below(annotations_of(str(annotations))) - looked_at
            images = {Path(file).stem for file in _beside(_below(_images_of(split, data)), set())} if below else set()
            for file in _beside(below, listed):
                if file.endswith(".xml") and Path(file).stem not in images:
                    what = "no list names it, and there is no image of this name"
                    yield Finding("label without image", split, file, "", what)
            looked_at |= below


def _images_of(split: str, data: DataFiles) -> str:
    """The folder of the images of a split that has an annotation file; nothing where they are in that."""
    table = Table(*data.tables[split])
    return "" if table.images is not None else os.path.normpath(located(data.root, data.splits[split]["images"]))


def _below(folder: str) -> set[str]:
    """A folder and all below it, without hidden ones."""
    found = set()
    for place, folders, _ in os.walk(folder):
        folders[:] = (name for name in folders if name[0] != ".")
        found.add(place)
    return found


def _beside(folders: set[str], known: set[str]) -> Iterator[str]:
    """Files in these folders that are not known, in order, without hidden ones."""
    for folder in sorted(folders):
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            file = os.path.normpath(os.path.join(folder, name))
            if name[0] != "." and file not in known and os.path.isfile(file):
                yield file


def _of_names(split: str, file: str, data: DataFiles) -> Iterator[Finding]:
    """A labelling tool's list of names that is not the data set's: its labels may count other classes."""
    with open(file, encoding="utf-8-sig", errors="replace") as opened:
        names = [line.strip() for line in opened if line.strip()]
    theirs = [*data.names.values()]
    if names != theirs:
        k = next((k for k, pair in enumerate(zip(names, theirs, strict=False)) if pair[0] != pair[1]), None)
        what = f"class {k} is {names[k]!r}, {data.name} says {theirs[k]!r}" if k is not None else ""
        what = what or f"it has {len(names)} names, {data.name} {len(theirs)}"
        yield Finding("names that do not match", split, file, "", what)


def _of_images(split: str, index: Index, looks: Looks) -> Iterator[Finding]:
    for row in np.flatnonzero(index.usable).tolist():
        file, kind = index.file(row), FORMATS[looks.formats[row]]
        ending = file.rpartition(".")[2].lower()
        if row in looks.faults:
            yield Finding("damaged image", split, file, "", f"it is not decoded as a whole: {looks.faults[row]}")
        if kind and ending not in ENDINGS.get(kind, (ending,)):
            yield Finding("wrong extension", split, file, "", f"it is a {kind} file")
        if looks.turned[row] > 1:
            what = f"orientation {looks.turned[row]}; labels are taken to be of the picture as it is shown"
            yield Finding("image turned by EXIF", split, file, "", what)


def _of_copies(indexes: dict[str, Index], looks: dict[str, Looks]) -> Iterator[Finding]:
    """Images that are there twice, in a split or, so that what is measured is known already, in two."""
    names, bounds = [*indexes], np.cumsum([0, *(len(index) for index in indexes.values())])
    whole = [{index.file(row) for row in range(len(index))} for index in indexes.values()]
    told: set[int] = set()
    for later in range(1, len(names)):
        for earlier in range(later):
            if whole[later] == whole[earlier]:
                what = f"it has the same {len(whole[later])} images as {names[earlier]}"
                yield Finding("image in two splits", names[later], "", "", f"{names[later]}: {what}")
                told.add(later)

    def file_of(place: int) -> str:
        split = int(np.searchsorted(bounds, place, "right")) - 1
        return indexes[names[split]].file(place - int(bounds[split]))

    of, exact = copies([looks[name] for name in names], file_of)
    for place in np.flatnonzero(of >= 0).tolist():
        here, there = (int(np.searchsorted(bounds, p, "right")) - 1 for p in (place, of[place]))
        if here in told and here != there:
            continue
        file, other = file_of(place), file_of(int(of[place]))
        how = "byte for byte" if exact[place] else f"by all that {SIDE} x {SIDE} px show"
        if here != there:
            what = f"{names[there]} has it, too: {other}, {how}" if file != other else f"{names[there]} lists it, too"
            yield Finding("image in two splits", names[here], file, "", what)
        else:
            yield Finding("duplicate image", names[here], file, "", f"it is {other} again, {how}")


def _of_classes(data: DataFiles, indexes: dict[str, Index]) -> Iterator[Finding]:
    """Classes that one split lacks, and such that are much rarer than others."""
    boxes = {split: class_counts(index, len(data.names)) for split, index in indexes.items()}
    nowhere = []
    for k, name in data.names.items():
        has = [split for split in boxes if boxes[split][0, k]]
        if not has:
            nowhere.append(name)
        elif "train" in boxes and "train" not in has:
            what = f"no box of {name} is in train; it is in {', '.join(has)}"
            yield Finding("class without training", "train", data.name, "", what)
        elif len(has) == 1 < len(boxes):
            yield Finding("class in one split only", has[0], data.name, "", f"{name} is in {has[0]} alone")
    if nowhere:
        what = f"{len(nowhere)} of {len(data.names)} classes: {', '.join(nowhere)}"
        yield Finding("class without a box", "", data.name, "", what)
    for split, (_, images) in boxes.items():
        there = np.flatnonzero(images)
        if len(there) and (ratio := images.max() / images[there].min()) > UNEQUAL:
            most, least = int(images.argmax()), int(there[images[there].argmin()])
            what = f"{split}: {images[most]} images have {data.names[most]}, {images[least]} have {data.names[least]}"
            yield Finding("classes of unequal numbers", split, data.name, "", f"{what}: {ratio:.0f} times fewer")


def class_counts(index: Index, classes: int) -> np.ndarray:
    """(2, classes): boxes of each class, and images with it, among those that can be used."""
    rows = np.flatnonzero(index.usable)
    counts = np.diff(index.first)[rows]
    cls = index.cls[ragged(index.first[rows], counts)].astype(np.int64)
    image = np.repeat(rows, counts)[cls < classes]
    cls = cls[cls < classes]
    pairs = np.unique(image * classes + cls)
    return np.stack([np.bincount(c, minlength=classes) for c in (cls, pairs % classes)])
