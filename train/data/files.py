"""Where the images of a data set are. Files are read; nothing in them is executed and nothing is downloaded."""

import glob
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import yaml
from ultralytics.data.utils import IMG_FORMATS
from ultralytics.utils import ROOT

from train.config.errors import InputError
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
                files += glob.glob(str(Path(glob.escape(str(path))) / "**" / "*.*"), recursive=True)  # follows links
            elif os.path.isfile(path):
                try:
                    lines = path.read_text(encoding="utf-8-sig").split("\n")
                except ValueError:
                    raise InputError(
                        f"{self.name} says `{split}: {entry}`, but {path} is not a list in UTF-8."
                    ) from None
                files += (_listed(line.strip(), path.parent, self.root) for line in lines if line.strip())
            else:
                raise InputError(f"{self.name} says `{split}: {entry}`, but there is no {path}.")
        files = [file for file in files if file.rpartition(".")[2].lower() in IMG_FORMATS]
        files = sorted(files if repeats else set(files))
        if not files:
            raise InputError(f"{self.name}: no images in {', '.join(str(self.root / e) for e in _as_list(entries))}.")
        return files[: max(1, round(fraction * len(files)))] if fraction <= 1 else files[: round(fraction)]


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
    if os.path.isabs(line) or os.path.exists(line) or not (root / line).exists():
        return line
    return str(root / line)


def find_data(data: str, single_cls: bool = False) -> DataFiles:
    """Resolve `--data`; nothing in the YAML is executed and nothing is downloaded. Call it on one process: it may draw.

    Raises:
        InputError: no such YAML, a YAML that is not a data set's, or a data set that is not on this machine.
    """
    if data == "shapes":
        try:
            data = str(draw_shapes(Path("datasets")))
        except OSError as error:
            raise InputError(
                f"--data shapes is drawn into {Path('datasets').absolute()}, and cannot be: {error}"
            ) from None
    path = Path(os.path.expanduser(data))
    if not os.path.isfile(path):
        packaged = ROOT / "cfg" / "datasets" / path.name
        if path.suffix not in (".yaml", ".yml") or str(path) != path.name or not packaged.is_file():
            raise InputError(f"--data is {data!r}, but there is no such file (looked for {path.absolute()}).")
        path = packaged
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} is not YAML that can be read: {error}") from None
    try:
        given = _DataYaml.model_validate(content if isinstance(content, dict) else {})
    except pydantic.ValidationError as error:
        faults = "; ".join(f"`{'.'.join(map(str, e['loc'][:1]))}`: {e['msg'].lower()}" for e in error.errors())
        raise InputError(f"{path} is not a data YAML, which lists train, val and names ({faults}).") from None
    if given.names is None:
        if given.nc is None:
            raise InputError(f"{path} has no `names`; a data YAML lists train, val and the class names.")
        given.names = [f"class_{index}" for index in range(given.nc)]
    pairs = given.names.items() if isinstance(given.names, dict) else enumerate(given.names)
    names = {index: str(name) for index, name in pairs}
    if not names or sorted(names) != list(range(len(names))):
        raise InputError(
            f"{path}: the class indices in `names` are {sorted(names)}; they must go from 0 up, one by one."
        )
    if given.nc is not None and given.nc != len(names):
        raise InputError(f"{path} says nc: {given.nc} but names {len(names)} classes.")
    splits = {name: entries for name in ("train", "val", "test") if (entries := getattr(given, name))}
    root = _root(path, given.path, splits)
    return DataFiles(str(path.absolute()), root, {0: "item"} if single_cls else names, given.channels, splits)


class _DataYaml(pydantic.BaseModel):
    """What is read of a data YAML; everything else in it is left alone."""

    path: str | None = None
    train: str | list[str] | None = None
    val: str | list[str] | None = pydantic.Field(
        default=None, validation_alias=pydantic.AliasChoices("val", "validation")
    )
    test: str | list[str] | None = None
    names: dict[int, Any] | list[Any] | None = None
    nc: int | None = pydantic.Field(default=None, ge=1, le=1_000_000)
    channels: int = pydantic.Field(default=3, ge=1)


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
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    try:
        return [Path(json.loads((Path(base) / "Ultralytics" / "settings.json").read_text())["datasets_dir"])]
    except (OSError, ValueError, KeyError, TypeError):
        return []
