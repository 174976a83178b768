"""How options are read: the command line, below it a file of options, below that what a script hands in."""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch  # noqa: F401  # before Ultralytics, which sets OMP_NUM_THREADS to 1 when it is imported
import tyro
import yaml
from ultralytics.cfg import get_cfg

from train.config.errors import InputError
from train.config.options import C, EvalConfig

Kept = Callable[[C, frozenset[str]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class File:
    """Options from a file."""

    cfg: str = ""
    """A YAML or JSON file of options, below what the command line says: Ultralytics' args.yaml, or a run's
    config.json, which repeats that run."""


def parse(
    kind: type[C], description: str, arguments: list[str] | None = None, kept: Kept | None = None
) -> tuple[C, list[str]]:
    """The configuration from the command line and the file that `--cfg` names, and warnings to tell.

    Args:
        kind: the configuration's class.
        description: of the script, for `--help`.
        arguments: instead of the process's own.
        kept: gives options that stand below both, by name, such as those of a checkpoint; it is told the configuration
            without them and the names of the options that were given.

    Raises:
        InputError: the file is not there, or is no mapping, or has a value of another type.
        SystemExit: the command line is wrong (tyro says how, exit code 2) or asks for help.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    run = _value_of("--resume", arguments)
    contradicting = [flag for flag in ("--model", "--data", "--cfg") if run and _value_of(flag, arguments)]
    if contradicting:
        raise InputError(f"--resume goes on with the run's own options; leave out {', '.join(contradicting)}.")
    values, warnings = _read_file(kind, str(Path(run) / "config.json") if run else _value_of("--cfg", arguments))
    options = _parsed(kind, description, arguments, values)
    if run:  # results.csv has columns for them, and the best epoch is the best by them
        fixed = ("split", "annotations", "val_fraction", "val_limit", "max_dets")
        changed = [name for name in fixed if options[name] != values.get(name, getattr(kind(), name))]
        if changed:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
            raise InputError(f"--resume goes on with what the run is measured by; leave out {flags}.")
    config = kind(**options)
    if kept is not None:
        flags_given = (a.partition("=")[0].removeprefix("--").replace("-", "_") for a in arguments if a[:2] == "--")
        given = frozenset(name.removeprefix("no_") for name in flags_given) | values.keys()
        below = kept(config, given)
        config = dataclasses.replace(config, **{name: value for name, value in below.items() if name not in given})
    return config, warnings


def _parsed(kind: type[C], description: str, arguments: list[str], values: dict[str, Any]) -> dict[str, Any]:
    """What the command line says, and `values` or the defaults where it says nothing, by name."""
    # tyro wants a value for what may also be unset
    optional = ("end2end", "rect", "channels-last")
    pairs = {f"--{no}{name}": f"--{name}={not no}" for name in optional for no in ("", "no-")}
    arguments = [pairs.get(argument.replace("_", "-"), argument) for argument in arguments]
    groups = [base for base in kind.__mro__[1:] if dataclasses.is_dataclass(base) and base is not EvalConfig]
    members: list[tuple[str, Any, Any]] = []
    for group in [*groups, File]:
        given = {field.name: values[field.name] for field in dataclasses.fields(group) if field.name in values}
        flat = tyro.conf.OmitArgPrefixes[group]  # type: ignore[valid-type]
        members.append((group.__name__.lower(), flat, dataclasses.field(default=group(**given))))
    parsed: Any = tyro.cli(dataclasses.make_dataclass("Options", members), args=arguments, description=description)
    options = {key: value for name, _, _ in members for key, value in vars(getattr(parsed, name)).items()}
    del options["cfg"]
    return options


def _value_of(flag: str, arguments: list[str]) -> str:
    """What the command line says behind a flag, which is needed before it is parsed; empty where it is not there."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
    return ""


def _read_file(kind: type[EvalConfig], file: str) -> tuple[dict[str, Any], list[str]]:
    """The options of a file by name, in their types, and a warning that names those this project does not have."""
    if not file:
        return {}, []
    load: Callable[[str], Any] = json.loads if file.endswith(".json") else yaml.safe_load
    try:
        content = load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--cfg {file} cannot be read: {error}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"--cfg {file} is not {'JSON' if file.endswith('.json') else 'YAML'}: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"--cfg {file} holds no options; it must be a mapping such as `epochs: 50`.")
    theirs = "versions" not in content  # else a run's config.json
    content = {key: value for key, value in content.items() if key not in ("versions", "resume")}  # of that run alone
    known = {field.name for field in dataclasses.fields(kind)}
    # Ultralytics' files list all its options: what is unset, or stands at its default, asks for nothing.
    defaults = vars(get_cfg())
    asked = {k: v for k, v in content.items() if v is not None and not (theirs and defaults.get(k, ...) == v)}
    unknown = sorted(str(key) for key in asked if key not in known)
    values = typed(kind, {name: value for name, value in asked.items() if name in known}, f"--cfg {file}")
    warnings = [f"warning: {file} sets {', '.join(unknown)}, which this project does not have"] if unknown else []
    return values, warnings


def typed(kind: type[EvalConfig], values: dict[str, Any], source: str) -> dict[str, Any]:
    """Options in the types that their fields have; an InputError lists those that are of another."""
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    found: dict[str, Any] = {}
    faults = []
    for name, value in values.items():
        try:
            found[name] = pydantic.TypeAdapter(types[name]).validate_python(value)
        except pydantic.ValidationError as error:
            faults.append(f"{source}: {name} is {value!r}; {error.errors()[0]['msg'].lower()}.")
    if faults:
        raise InputError("\n".join(faults))
    return found
