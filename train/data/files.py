"""Where the images of a data set are. Files are read; nothing in them is executed and nothing is downloaded."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralytics.data.utils import IMG_FORMATS
from ultralytics.utils import ROOT

from train.config.errors import InputError
from train.data.data_yaml import read_data_yaml
from train.data.shapes import draw_shapes


@dataclass(frozen=True)
class DataFiles:
    """A data YAML, resolved: the images of each split it names, sorted, and the class names."""

    name: str
    root: Path
    names: dict[int, str]
    channels: int
    splits: dict[str, Any]  # train, val, test as the YAML gives them

    def images(self, split: str, fraction: float = 1.0, repeats: bool = False) -> list[str]:
        """Sorted image paths of a split, or the first of them: a share, or a number where `fraction` is above 1.

        With `repeats` an image that is listed twice counts twice, as people oversample rare classes for training.

        Raises:
            InputError: the YAML does not name the split, or what it names is not there or holds no image.
        """
        entries = self.splits.get(split)
        if not entries:
            raise InputError(f"{self.name} names no `{split}` images; add a line `{split}: folder-or-list.txt`.")
        files: list[str] = []
        for entry in _as_list(entries):
            path = _located(self.root, entry)
            if os.path.isdir(path):  # unlike pathlib's, these take any string
                files += _files_below(str(path))
            elif os.path.isfile(path):
                if path.suffix[1:].lower() in IMG_FORMATS:
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
        others, files = files, [file for file in files if file.rpartition(".")[2].lower() in IMG_FORMATS]
        files = sorted(files if repeats else set(files))
        if not files:
            places = ", ".join(str(self.root / e) for e in _as_list(entries))
            there = f" There are {len(others)} other files, first {others[0][:200]}." if others else ""
            raise InputError(f"{self.name}: no images in {places} ({', '.join(sorted(IMG_FORMATS))}).{there}")
        return files[: max(1, round(fraction * len(files)))] if fraction <= 1 else files[: round(fraction)]


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


def _located(root: Path, entry: str) -> Path:
    """The path of a split's entry; like Ultralytics, without a leading ../ where only that is there."""
    path = root / entry
    if entry.startswith("../") and not os.path.exists(path) and os.path.exists(root / entry[3:]):
        return root / entry[3:]
    return path


def _as_list(entries: Any) -> list:
    return entries if isinstance(entries, list) else [entries]


def _listed(line: str, beside: Path, root: Path) -> str:
    """A line of a .txt list: `./` is the list's folder; else absolute, from the working directory or from the root."""
    if line.startswith("./"):
        return str(beside / line[2:])
    if os.path.isabs(line) or os.path.exists(line) or not os.path.exists(root / line):
        return line
    return str(root / line)


def find_data(data: str, single_cls: bool = False, classes: tuple[int, ...] | None = None) -> DataFiles:
    """Resolve `--data`; nothing in the YAML is executed and nothing is downloaded. Call it on one process: it may draw.

    Args:
        data: the option.
        single_cls: whether all classes are one.
        classes: indices that are asked for; unset asks for all.

    Raises:
        InputError: no such YAML, a YAML that is not a data set's, a data set that is not on this machine, or one that
            lacks a class.
    """
    if data == "shapes":
        try:
            data = str(draw_shapes(Path("datasets")))
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
    root = _root(path, given.path, given.splits)
    names = {0: "item"} if single_cls else given.names
    return DataFiles(str(path.absolute()), root, names, given.channels, given.splits)


def _root(path: Path, named: str | None, splits: dict[str, Any]) -> Path:
    """The folder that the splits are relative to: the first candidate that holds one of them."""
    base = Path(os.path.expanduser(named or "."))
    folders = [path.parent, Path.cwd(), Path.cwd() / "datasets", *_ultralytics_datasets()]
    candidates = [base] if base.is_absolute() else [(folder / base).resolve() for folder in folders]
    for candidate in candidates:
        if any(
            os.path.exists(_located(candidate, entry)) for entries in splits.values() for entry in _as_list(entries)
        ):
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
