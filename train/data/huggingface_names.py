"""What classes are called that a Hugging Face data set has as numbers: by its files' metadata, or by its README.md."""

import json
from pathlib import Path
from typing import Any

import yaml

from train.config.errors import InputError
from train.config.plain import checked_name, text_of
from train.data.formats import check_regular

CARD, DEEP = 5_000_000, 4  # bytes of a README.md; descriptions of a feature that are inside each other
NOT_AS_WRITTEN = (KeyError, TypeError, AttributeError, IndexError, RecursionError, StopIteration)  # by `datasets`


def class_names(metadata: str) -> list[str]:
    """The names that `datasets` has left in a file's metadata; each of its versions describes lists in its own way."""
    try:
        kind = _element(_element(json.loads(metadata)["info"]["features"]["objects"])["category"])
        return [str(name) for name in kind.get("names") or ()]
    except (ValueError, *NOT_AS_WRITTEN):
        return []


def card_names(folder: Path) -> dict[int, str]:
    """The class names that `datasets` writes into the lines before README.md's text, by number; of nothing else there
    anything is taken. Nothing where there are none.
    """
    file = str(folder / "README.md")
    try:
        check_regular(file)
        before, _, rest = text_of(file, file, CARD).replace("\r\n", "\n").partition("---\n")
        info = {} if before else yaml.safe_load(rest.partition("\n---")[0])["dataset_info"]
        parts = (info[0] if isinstance(info, list) else info)["features"]
        for name in ("objects", "category"):
            parts = next(one for one in parts if one["name"] == name)
            for _ in range(DEEP):
                if isinstance(parts, dict) and "class_label" not in parts:
                    parts = next(parts[kind] for kind in ("dtype", "sequence", "list", "struct") if kind in parts)
        names = parts["class_label"]["names"]
        found = {i: names[i] if isinstance(names, list) else names[str(i)] for i in range(len(names))}
    except (InputError, OSError, yaml.YAMLError, ValueError, *NOT_AS_WRITTEN):
        return {}
    plain = all(isinstance(name, str) for name in found.values()) and len({*found.values()}) == len(found)
    return {i: checked_name(name, f"{file}: class {i}") for i, name in found.items()} if plain else {}


def _element(feature: Any) -> Any:
    """What a list is a list of, in the description of features; what is none is that itself."""
    while isinstance(feature, list) or {"_type", "feature"} <= feature.keys():
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    return feature
