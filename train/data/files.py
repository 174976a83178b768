"""Which data set is meant, and where it is. Files are read; nothing in them is executed and nothing is downloaded."""

import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ultralytics.data.utils import IMG_FORMATS
from ultralytics.utils import ROOT

from train.config.errors import InputError
from train.config.objects import Carries, Objects
from train.data.coco_json import said_by_coco
from train.data.darknet import OBJ_DATA, read_obj_data
from train.data.data_yaml import DataYaml, read_data_yaml
from train.data.huggingface import parquet_below, parquet_files, parquet_splits, said_by_parquet
from train.data.huggingface_names import card_names
from train.data.listing import DataFiles, as_list, located
from train.data.shapes import draw_shapes
from train.data.tables import Said, Table, images_of, kept_at, mirrored, table_of
from train.data.voc import said_by_voc, voc_splits, xml_files
from train.processes.files import cache_folder

EXPORTED = "_annotations.coco.json"  # what Roboflow calls it


def find_data(
    data: str,
    single_cls: bool = False,
    classes: tuple[int, ...] | None = None,
    carries: Carries = "boxes",
    folder: Path | None = None,
    say: Callable[[str], None] | None = lambda line: None,
) -> DataFiles:
    """Resolve `--data`; nothing in the YAML is executed and nothing is downloaded. Call it on one process: it may draw.

    Args:
        data: the option.
        single_cls: whether all classes are one.
        classes: indices that are asked for; unset asks for all.
        carries: what is needed of the labels; all of them have boxes.
        folder: where what annotation files say is kept; unset takes the user's cache.
        say: is given a line before a file is read that has not been read before; None has it not read now.

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
    path, given = _data_set(data)
    if not given.splits:
        raise InputError(f"{path} names no images; add the lines `train: folder-or-list.txt` and `val: …`.")
    root = _root(path, given.path, given.splits)
    tables = _tables(root, given, carries, folder or cache_folder(), say)
    given, pairs = _with_classes(given, tables, path)
    if lacking := [index for index in classes or () if index not in given.names]:
        raise InputError(f"--classes names {lacking[0]}, but {path} has the classes 0 to {len(given.names) - 1}.")
    if carries == "keypoints" and not given.keypoints:
        raise InputError(
            f"{path} names no kpt_shape, so its labels have no keypoints that are known of; add `kpt_shape: [17, 3]`, "
            "say, or train on its polygons or boxes: train/segment.py, train/detect.py."
        )
    if carries == "polygons" and given.keypoints:
        raise InputError(f"{path} names a kpt_shape: its labels are keypoints, which train/pose.py trains on.")
    names = {0: "item"} if single_cls else given.names
    about = {field.name: getattr(given, field.name) for field in fields(Objects)} | {"names": names}
    return DataFiles(
        name=str(path.absolute()),
        root=root,
        splits=given.splits,
        endings=tuple(sorted(IMG_FORMATS)),
        tables=pairs,
        **about,
    )


def _data_set(data: str) -> tuple[Path, DataYaml]:
    """What is at this place: a data YAML or a folder; or the YAML of this name that comes with Ultralytics.

    Raises:
        InputError: neither.
    """
    path = Path(data)
    if os.path.isdir(path):
        return _of_folder(path)
    if not os.path.isfile(path):
        packaged = ROOT / "cfg" / "datasets" / path.name
        if path.suffix not in (".yaml", ".yml") or str(path) != path.name or not packaged.is_file():
            hint = " Paths are written with / on this system." if "\\" in data else ""
            raise InputError(f"--data is {data!r}, but there is no such file (looked for {path.absolute()}).{hint}")
        path = packaged
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"--data is {data!r}; it must be a data YAML, which lists train, val and names.")
    return path, read_data_yaml(path)


def _of_folder(folder: Path) -> tuple[Path, DataYaml]:
    """The data set in a folder, as an export of a labelling tool or a download leaves it there.

    Raises:
        InputError: it is none that is known.
    """
    exported = {
        split: {"images": name, "annotations": f"{name}/{EXPORTED}"}
        for split, name in (("train", "train"), ("val", "valid"), ("test", "test"))
        if (folder / name / EXPORTED).is_file()
    }
    whole = DataYaml(path=str(folder.absolute()), splits=exported or voc_splits(folder), names={})
    if whole.splits:
        return folder, whole
    found = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    exports = [file for file in found if file.stem == "data"]  # what labelling tools call it
    given = read_data_yaml(exports[0]) if exports else whole
    if given.splits:
        return exports[0], given
    if splits := parquet_splits(folder):
        return folder, replace(given, path=whole.path, splits=splits)
    if not found and (folder / OBJ_DATA).is_file():
        return folder / OBJ_DATA, read_obj_data(folder / OBJ_DATA)
    if not found:
        hint = f" {deeper} is such a folder; name that." if (deeper := parquet_below(folder)) else ""
        if lists := sorted(folder.glob("ImageSets/Main/*.txt")):  # CVAT calls its only one default.txt
            hint = f" {lists[0]} is there: call it train.txt, and the list of the images to validate on val.txt."
        raise InputError(
            f"--data is {str(folder)!r}, a folder without a data YAML, which lists train, val and names, without "
            f"train/{EXPORTED}, without VOC's Annotations and ImageSets/Main/train.txt, without Hugging "
            f"Face's data/train-00000-of-00001.parquet, and without Darknet's {OBJ_DATA}.{hint}"
        )
    if len(found) > 1 and not exports:
        raise InputError(f"--data is {str(folder)!r}, a folder; name its data YAML, such as {found[0]}.")
    file = (exports or found)[0]
    return file, read_data_yaml(file)


def annotation_files(data: str) -> dict[str, str]:
    """The annotation files in COCO's form that --data names, by split, whatever is wrong with them; nothing where
    that cannot be known.
    """
    try:
        path, given = _data_set(data)
        root = _root(path, given.path, given.splits)
    except InputError:
        return {}
    named = {split: entries["annotations"] for split, entries in given.splits.items() if isinstance(entries, dict)}
    return {split: str(located(root, file)) for split, file in named.items() if file.endswith(".json")}


def _tables(
    root: Path, given: DataYaml, carries: Carries, folder: Path, say: Callable[[str], None] | None
) -> dict[str, str]:
    """The tables of the splits whose annotation file is there.

    Raises:
        InputError: it has not the form that its ending says, or cannot say what is needed.
    """
    tables = {}
    tell = say or (lambda line: None)
    for split, entries in given.splits.items():
        if not isinstance(entries, dict):
            continue
        file, images = (str(located(root, entries[part])) for part in ("annotations", "images"))
        files = parquet_files(file) if file.endswith(".parquet") else [file] if os.path.isfile(file) else []
        if not files:
            continue
        read: Callable[[], Said]
        if file.endswith(".json"):
            table, read = kept_at(files, folder, carries), partial(said_by_coco, file, carries, file)
        elif not file.endswith((".txt", ".parquet")):
            raise InputError(
                f"{file} is in no known form: COCO's is a .json file, VOC's a .txt list beside Annotations, Hugging "
                "Face's are .parquet files."
            )
        elif carries != "boxes":
            raise InputError(f"What is in {file} are boxes alone; train/detect.py trains on boxes.")
        elif file.endswith(".txt"):
            files += xml_files(file)
            table, read = kept_at(files, folder, images), partial(said_by_voc, file, images)
        else:
            names = given.names or card_names(root)
            table = kept_at(files, folder, also=str(names))
            read = partial(said_by_parquet, files, names, Path(images), images_of(table), tell)
        tables[split] = table_of(table, files, read, say)
    return tables


def _with_classes(given: DataYaml, files: dict[str, str], path: Path) -> tuple[DataYaml, dict[str, list]]:
    """The data set with the names that it lacks, from its annotation files; and by split the table, and pairs of a
    category id and its class index.

    Raises:
        InputError: a file has a category that is no class.
    """
    pairs: dict[str, list] = {}
    tables = {split: Table(file) for split, file in files.items()}
    if tables and not given.names:
        given = replace(given, names=dict(enumerate(_names([*tables.values()]))))
    for split, table in tables.items():
        index = {name: i for i, name in given.names.items()}
        if lacking := [name for name in table.names.values() if name not in index]:
            raise InputError(f"{table.source} has the category {lacking[0]!r}, which is none of the classes of {path}.")
        shape = (table.keypoints, 3)
        if table.keypoints and not given.keypoints:
            names = table.keypoint_names or tuple(map(str, range(table.keypoints)))
            given = replace(given, keypoints=shape, flip_idx=mirrored(names), keypoint_names=names)
        if table.keypoints and given.keypoints != shape:
            raise InputError(f"{table.source} has keypoints of kpt_shape {[*shape]}, {path} says {[*given.keypoints]}.")
        pairs[split] = [files[split], [[id_, index[name]] for id_, name in table.names.items()]]
    if not given.names:
        said = ", ".join(str(entries["annotations"]) for entries in given.splits.values() if isinstance(entries, dict))
        raise InputError(f"{path} names no classes, and its annotation files ({said}) are not there, or name none.")
    return given, pairs


def _names(tables: list[Table]) -> list[str]:
    """Names of the classes: categories that have ids in their order; VOC's, which have none, by the alphabet."""
    if tables[0].numbered:
        return [tables[0].names[id_] for id_ in sorted(tables[0].names)]
    return sorted({name for table in tables for name in table.names.values()})


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
