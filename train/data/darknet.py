"""Darknet's form, as CVAT exports it as YOLO 1.1: obj.data names lists of images, whose labels lie beside them."""

import os
from pathlib import Path

from train.config.errors import InputError
from train.config.plain import checked_name, text_of
from train.data.data_yaml import CLASSES, LARGEST, DataYaml

OBJ_DATA = "obj.data"
KEYS = {"train": "train", "val": "valid", "test": "test"}


def read_obj_data(file: Path) -> DataYaml:
    """What obj.data says, as a data YAML would.

    Raises:
        InputError: it is none, or its list of class names cannot be read.
    """
    pairs = [line.partition("=") for line in text_of(str(file), str(file), LARGEST).splitlines()]
    said = {key.strip(): _placed(file.parent, value.strip()) for key, _, value in pairs if value.strip()}
    listed = file.parent / said.get("names", "obj.names")
    if not os.path.isfile(listed):
        raise InputError(f"{listed} is no file; {file} must name a list of the class names, `names = obj.names`.")
    lines = [line.strip() for line in text_of(str(listed), str(listed), LARGEST).splitlines() if line.strip()]
    if not 0 < len(lines) <= CLASSES:
        raise InputError(f"{listed} names {len(lines)} classes; it must be from 1 to {CLASSES}, one in a line.")
    seen: dict[str, int] = {}
    for number, line in enumerate(lines):
        if line in seen:
            raise InputError(f"{listed}: the classes {seen[line]} and {number} are both named {line[:60]!r}.")
        seen[checked_name(line, f"{listed}: class {number}")] = number
    splits = {split: said[key] for split, key in KEYS.items() if key in said}
    return DataYaml(path=str(file.parent.absolute()), splits=splits, names=dict(enumerate(lines)))


def write_obj_data(folder: Path, splits: dict[str, str], names: dict[int, str]) -> None:
    """Write obj.data and the list of the class names, as CVAT does.

    Args:
        folder: that they and the lists of images are in.
        splits: the list of each.
        names: of the classes.
    """
    lists = "".join(f"{KEYS[split]} = data/{listed}\n" for split, listed in splits.items())
    text = f"classes = {len(names)}\n{lists}names = data/obj.names\nbackup = backup/\n"
    (folder / OBJ_DATA).write_text(text, encoding="utf-8")
    (folder / "obj.names").write_text("".join(f"{name}\n" for name in names.values()), encoding="utf-8")


def _placed(folder: Path, path: str) -> str:
    """A path in this folder, without the `data/` before it that CVAT writes where only that is there."""
    short = path.removeprefix("data/")
    return short if os.path.exists(folder / short) and not os.path.exists(folder / path) else path
