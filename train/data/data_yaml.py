"""What a data YAML says. It is read as data: nothing in it is executed, and class names are what is written."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train.config.errors import InputError
from train.config.objects import Objects
from train.config.plain import checked_name, keys_of, mapping_of, shown, text_of
from train.data.formats import check_regular

LARGEST, CLASSES = 20_000_000, 100_000  # bytes of a data YAML, class names in it


@dataclass(frozen=True, kw_only=True)
class DataYaml(Objects):
    """A data YAML, checked."""

    path: str | None  # what the splits are relative to
    splits: dict[str, Any]  # train, val, test, as they are given: a folder, a list, or images and their annotations


def read_data_yaml(file: Path) -> DataYaml:
    """Read and check a data YAML.

    Raises:
        InputError: it is none; the message says what and where.
    """
    try:
        check_regular(str(file))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    content, nodes = mapping_of(text_of(str(file), str(file), LARGEST), str(file))
    if not isinstance(content, dict):
        content = {}
    if "backbone" in content and "head" in content:
        raise InputError(f"{file} is the YAML of a model; that is --model.")
    for key in ("nc", "channels"):
        value = content.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= CLASSES):
            raise InputError(f"{file} says {key}: {shown(value)}; it must be a whole number from 1 to {CLASSES}.")
    path = content.get("path")
    if path is not None and not isinstance(path, str):
        raise InputError(f"{file} says path: {shown(path)}; it must be a folder.")
    splits = {}
    for split, key in (("train", "train"), ("val", "val"), ("val", "validation"), ("test", "test")):
        if (entries := content.get(key)) and split not in splits:
            if isinstance(entries, dict):
                _check_annotated(entries, key, file)
            elif not isinstance(entries, str) and not _is_list_of_text(entries):
                raise InputError(
                    f"{file}: `{key}` is {shown(entries)}; it must be a folder, a .txt list, a list of these, or "
                    "{images: FOLDER, annotations: FILE.json}."
                )
            splits[split] = entries
    classes = content.get("nc")
    if "names" in nodes and content.get("names") is not None:
        names = _names(nodes["names"], file)
    elif classes is not None:
        names = {index: f"class_{index}" for index in range(classes)}
    elif any(isinstance(entries, dict) for entries in splits.values()):
        names = {}  # those of the annotation file
    else:
        raise InputError(f"{file} has no `names`; a data YAML lists train, val and the class names.")
    if classes is not None and classes != len(names):
        raise InputError(f"{file} says nc: {classes} but names {len(names)} classes.")
    channels = content.get("channels") or 3
    return DataYaml(path=path, splits=splits, names=names, channels=channels, **_keypoints(content, file))


def _check_annotated(entries: dict[str, Any], key: str, file: Path) -> None:
    """Raise InputError where a split with an annotation file is not written as one."""
    for part in ("images", "annotations"):
        if not isinstance(value := entries.get(part), str) or not value.strip():
            raise InputError(
                f"{file}: `{key}` has {part}: {shown(value)}; it must be {{images: FOLDER, annotations: FILE.json}}."
            )
    if unknown := [str(part) for part in entries if part not in ("images", "annotations")]:
        raise InputError(f"{file}: `{key}` has {unknown[0][:40]!r}; it has images and annotations, and nothing else.")


def _keypoints(content: dict[str, Any], file: Path) -> dict[str, tuple]:
    """What the YAML says of keypoints; nothing where its labels have none."""
    shape = content.get("kpt_shape") or ()
    if not shape:
        return {}
    if not (_is_list_of_counts(shape) and len(shape) == 2 and shape[1] in (2, 3)):
        raise InputError(f"{file} says kpt_shape: {shown(shape)}; it must be the number of keypoints and 2 or 3.")
    count = shape[0]
    flips, sigmas, names = (content.get(key) or () for key in ("flip_idx", "kpt_oks_sigmas", "kpt_names"))
    if flips and not (
        isinstance(flips, list)
        and all(type(index) is int for index in flips)
        and sorted(flips) == [*range(count)]
        and [flips[index] for index in flips] == [*range(count)]
    ):
        raise InputError(
            f"{file} says flip_idx: {shown(flips)}; it must be the {count} keypoints' indices, from 0, in the order in "
            "which a mirror shows them: two that change places, such as left and right, name each other."
        )
    if sigmas and not (isinstance(sigmas, list) and len(sigmas) == count and all(map(_is_positive, sigmas))):
        raise InputError(f"{file} says kpt_oks_sigmas: {shown(sigmas)}; it must be {count} numbers above 0.")
    if isinstance(names, dict):  # by class, as Ultralytics has it
        names = next(iter(names.values()))
    if names and not (_is_list_of_text(names) and len(names) == count):
        raise InputError(f"{file} says kpt_names: {shown(names)}; it must be {count} names, for each class or for all.")
    found = {"keypoints": tuple(shape), "flip_idx": tuple(flips), "sigmas": tuple(map(float, sigmas))}
    return found | {"keypoint_names": tuple(names) or tuple(map(str, range(count)))}


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_list_of_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) is int and 0 < entry <= CLASSES for entry in value)


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) and entry.strip() for entry in value)


def _names(node: yaml.Node, file: Path) -> dict[int, str]:
    """Class names by index, as they are written: YAML would make a boolean of `no`, a number of `1.0`, a date."""
    if not isinstance(node, yaml.SequenceNode | yaml.MappingNode):
        raise InputError(f"{file}: `names` is {str(node.value)[:40]!r}; it must list the class names.")
    if len(node.value) > CLASSES:
        raise InputError(f"{file} names {len(node.value)} classes; {CLASSES} is the most.")
    if isinstance(node, yaml.SequenceNode):
        given: list[tuple[str, yaml.Node]] = [(str(index), value) for index, value in enumerate(node.value)]
    else:
        given = list(keys_of(node, str(file)).items())
    names: dict[int, str] = {}
    seen: dict[str, int] = {}
    for key, value in given:
        if not key.isascii() or not key.isdecimal() or len(key) > 9 or key != str(int(key)):
            swapped = isinstance(value, yaml.ScalarNode) and str(value.value).isdecimal()
            mend = f"write `{value.value}: {key[:40]}`" if swapped else "it must be a class index, such as 0"
            raise InputError(f"{file}: `names` has the key {key[:40]!r}; {mend}.")
        if not isinstance(value, yaml.ScalarNode):
            raise InputError(f"{file}: class {key} in `names` is a list or mapping; it must be a name.")
        names[int(key)] = name = checked_name(str(value.value), f"{file}: class {key} in `names`")
        if name in seen:
            raise InputError(f"{file}: the classes {seen[name]} and {key} are both named {name!r}.")
        seen[name] = int(key)
    if not names or sorted(names) != list(range(len(names))):
        some = ", ".join(map(str, sorted(names)[:20]))
        raise InputError(f"{file}: the class indices in `names` are [{some}]; they must go from 0 up, one by one.")
    return names
