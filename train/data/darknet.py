"""Darknet's form, as CVAT exports it as YOLO 1.1: obj.data names lists of images, whose labels lie beside them."""

import os
from pathlib import Path

from train.config.errors import InputError
from train.config.plain import checked_name, text_of
from train.data.data_yaml import CLASSES, LARGEST, DataYaml

OBJ_DATA = "obj.data"


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
    keys = {"train": "train", "val": "valid", "test": "test"}
    splits = {split: said[key] for split, key in keys.items() if key in said}
    return DataYaml(path=str(file.parent.absolute()), splits=splits, names=dict(enumerate(lines)))


def _placed(folder: Path, path: str) -> str:
    """A path in this folder, without the `data/` before it that CVAT writes where only that is there."""
    short = path.removeprefix("data/")
    return short if os.path.exists(folder / short) and not os.path.exists(folder / path) else path
