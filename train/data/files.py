"""Which data set is meant, and where it is. Files are read; nothing in them is executed and nothing is downloaded."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from ultralytics.data.utils import IMG_FORMATS
from ultralytics.utils import ROOT

from train.config.errors import InputError
from train.config.objects import Carries, Objects
from train.data.data_yaml import read_data_yaml
from train.data.listing import DataFiles, as_list, located
from train.data.shapes import draw_shapes


def find_data(
    data: str, single_cls: bool = False, classes: tuple[int, ...] | None = None, carries: Carries = "boxes"
) -> DataFiles:
    """Resolve `--data`; nothing in the YAML is executed and nothing is downloaded. Call it on one process: it may draw.

    Args:
        data: the option.
        single_cls: whether all classes are one.
        classes: indices that are asked for; unset asks for all.
        carries: what is needed of the labels; all of them have boxes.

    Raises:
        InputError: no such YAML, a YAML that is not a data set's, a data set that is not on this machine, or one that
            lacks a class or what is needed.
    """
    if data == "shapes":
        try:
            data = str(draw_shapes(Path("datasets"), carries=carries))
        except OSError as error:
            raise InputError(
                f"--data shapes is drawn into {Path('datasets').absolute()}, and cannot be: {error}"
            ) from None
    path = Path(data)
    if os.path.isdir(path):
        found = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
        hint = f"such as {found[0]}" if found else "which lists train, val and names"
        raise InputError(f"--data is {data!r}, a folder; name its data YAML, {hint}.")
    if not os.path.isfile(path):
        packaged = ROOT / "cfg" / "datasets" / path.name
        if path.suffix not in (".yaml", ".yml") or str(path) != path.name or not packaged.is_file():
            hint = " Paths are written with / on this system." if "\\" in data else ""
            raise InputError(f"--data is {data!r}, but there is no such file (looked for {path.absolute()}).{hint}")
        path = packaged
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"--data is {data!r}; it must be a data YAML, which lists train, val and names.")
    given = read_data_yaml(path)
    if not given.splits:
        raise InputError(f"{path} names no images; add the lines `train: folder-or-list.txt` and `val: …`.")
    if lacking := [index for index in classes or () if index not in given.names]:
        raise InputError(f"--classes names {lacking[0]}, but {path} has the classes 0 to {len(given.names) - 1}.")
    if carries == "keypoints" and not given.keypoints:
        raise InputError(
            f"{path} names no kpt_shape, so its labels have no keypoints that are known of; add `kpt_shape: [17, 3]`, "
            "say, or train on its boxes: train/detect.py."
        )
    if carries == "polygons" and given.keypoints:
        raise InputError(f"{path} names a kpt_shape: its labels are keypoints, which train/pose.py trains on.")
    root = _root(path, given.path, given.splits)
    names = {0: "item"} if single_cls else given.names
    about = {field.name: getattr(given, field.name) for field in fields(Objects)} | {"names": names}
    return DataFiles(
        name=str(path.absolute()), root=root, splits=given.splits, endings=tuple(sorted(IMG_FORMATS)), **about
    )


def _root(path: Path, named: str | None, splits: dict[str, Any]) -> Path:
    """The folder that the splits are relative to: the first candidate that holds one of them."""
    base = Path(os.path.expanduser(named or "."))
    folders = [path.parent, Path.cwd(), Path.cwd() / "datasets", *_ultralytics_datasets()]
    candidates = [base] if base.is_absolute() else [(folder / base).resolve() for folder in folders]
    for candidate in candidates:
        if any(os.path.exists(located(candidate, entry)) for entries in splits.values() for entry in as_list(entries)):
            return candidate
    looked = ", ".join(str(candidate) for candidate in dict.fromkeys(candidates))
    raise InputError(
        f"The images of {path} ({', '.join(f'{k}: {v}' for k, v in splits.items())}) are not on this machine. "
        f"Looked in {looked}. Put them in one of these folders or mend `path` in the YAML; nothing is downloaded."
    )


def _ultralytics_datasets() -> list[Path]:
    """The data-set folder in the user's Ultralytics settings, which are only read."""
    try:
        base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        return [Path(json.loads((Path(base) / "Ultralytics" / "settings.json").read_text())["datasets_dir"])]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # RuntimeError: no home folder
        return []
