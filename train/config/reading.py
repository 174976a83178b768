"""How options are read: the command line, below it a file of options, below that what a script hands in."""

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch  # noqa: F401  # before Ultralytics, which sets OMP_NUM_THREADS to 1 when it is imported
import tyro
from ultralytics.cfg import get_cfg

from train.config.errors import InputError
from train.config.options import C, EvalConfig, TrainConfig
from train.config.plain import mapping_of, text_of
from train.config.sources import DEFAULTS, FROM_FILE, MAY_CHANGE, differences
from train.config.task_options import PoseConfig, SegmentConfig
from train.config.words import as_flag, check_flags, in_words, unknown_words

Kept = Callable[[C, frozenset[str]], dict[str, Any]]
AUTO = "auto"  # of --resume: the newest run of the same options, if it is not finished
LARGEST = 10_000_000  # bytes of a file of options
TASKS = tuple(kind.task for kind in (TrainConfig, SegmentConfig, PoseConfig))


@dataclass(frozen=True, kw_only=True)
class File:
    """Options from a file."""

    cfg: str = ""
    """A YAML or JSON file of options, below what the command line says: an args.yaml, or a run's config.json."""


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
        InputError: the file is not there, or is no mapping, or a value is of another type.
        SystemExit: the command line names no option of this script (exit code 2) or asks for help.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    check_flags(kind, arguments)
    run, cfg = _value_of("--resume", arguments), _value_of("--cfg", arguments)
    if empty := [flag for flag in ("--resume", "--cfg") if _values_of(flag, arguments)[:1] == [""]]:
        raise InputError(f"{empty[0]} is empty; is a variable not set?")
    run = "" if run == AUTO else run
    contradicting = [flag for flag in ("--model", "--cfg") if run and _value_of(flag, arguments)]
    if contradicting:
        raise InputError(f"--resume goes on with the run's own options; leave out {', '.join(contradicting)}.")
    values: dict[str, Any] = {}
    warnings: list[str] = []
    if run:
        run = run_folder(run)
        # Of several machines the first alone needs the run's folder; all take its options.
        if os.environ.get("RANK", "0") == "0" or os.path.exists(f"{run}/config.json"):
            values, warnings = _read_file(kind, f"{run}/config.json", "--resume")
            place = Path(run) if Path(run).name not in ("", "..") else Path(run).resolve()
            values |= {"project": str(place.parent), "name": place.name}  # a typed --project makes a new folder
    elif cfg:
        values, warnings = _read_file(kind, os.path.expanduser(cfg), "--cfg")
    options = _parsed(kind, description, arguments, values)
    for name, value in options.items():  # which a shell does not do behind `--data=`, in quotes and in files
        if isinstance(value, str) and value.startswith("~"):
            options[name] = os.path.expanduser(value)
    if run:
        options["resume"] = run
        if values:
            check_unchanged(options, values)
    config = kind(**options)
    if kept is not None:
        flags_given = (a.partition("=")[0].removeprefix("--").replace("-", "_") for a in arguments if a[:2] == "--")
        given = frozenset(name.removeprefix("no_") for name in flags_given) | values.keys()
        below = kept(config, given)
        config = dataclasses.replace(config, **{name: value for name, value in below.items() if name not in given})
    return config, warnings


def check_unchanged(own: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise InputError where a run is to be gone on with by other options that change its numbers.

    Args:
        own: options by name, that were asked for.
        theirs: the run's.
    """
    changed = differences(own, theirs, MAY_CHANGE)
    if bool(own["annotations"]) != bool(theirs.get("annotations")):  # the file may have moved with the data
        changed.append("annotations")
    if changed:
        said = ", ".join(
            f"{as_flag(n)} (it is {own[n]!r}, the run's is {theirs.get(n, DEFAULTS[n])!r})" for n in changed
        )
        raise InputError(f"--resume goes on with the run's own options; leave out {said}.")


def run_folder(named: str) -> str:
    """A run's folder by itself or, as Ultralytics has it, by a checkpoint in its weights."""
    path = Path(os.path.expanduser(named))
    if path.suffix == ".pt" and path.parent.name == "weights":
        path = path.parent.parent
    if path.name == "config.json":
        path = path.parent
    return str(path)


def _parsed(kind: type[C], description: str, arguments: list[str], values: dict[str, Any]) -> dict[str, Any]:
    """What the command line says, and `values` or the defaults where it says nothing, by name."""
    whole = (EvalConfig, TrainConfig)  # configurations, whose options are in groups
    groups: list[Any] = [base for base in kind.__mro__[1:] if dataclasses.is_dataclass(base) and base not in whole]
    members: list[tuple[str, Any, Any]] = []
    values = vars(kind()) | values  # its own defaults, which may be other than the groups'
    for group in (File, *groups):
        given = {field.name: values[field.name] for field in dataclasses.fields(group) if field.name in values}
        flat = tyro.conf.OmitArgPrefixes[group]  # type: ignore[valid-type]
        members.append((group.__name__.lower(), flat, dataclasses.field(default=group(**given))))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed: Any = tyro.cli(
                dataclasses.make_dataclass("Options", members),
                args=arguments, description=description, config=(tyro.conf.DisallowNone,),
            )  # fmt: skip
    except SystemExit:
        wrong = re.search(r"Error parsing --([\w-]+)|for argument '--([\w-]+)'", " ".join(said.getvalue().split()))
        name = (wrong[1] or wrong[2]).replace("-", "_") if wrong else ""
        types = {field.name: field.type for field in dataclasses.fields(kind)}
        if name in types:
            typed_ = " ".join(_values_of(as_flag(name), arguments))
            value = f"is {typed_!r}" if typed_ else "has no value"
            raise InputError(f"{as_flag(name)} {value}; it must be {in_words(types[name])}.") from None
        words = re.sub(r"[^\S ]|[\u2500-\u257f]", " ", said.getvalue())
        if unknown := re.search(r"Unrecognized options: (.*?)  ", " ".join(words.split("\n")) + "  "):
            raise InputError(unknown_words(kind, unknown[1].split(", "))) from None
        print(said.getvalue(), end="", file=sys.stderr)
        raise
    options = {key: value for name, _, _ in members for key, value in vars(getattr(parsed, name)).items()}
    del options["cfg"]
    return options


def _value_of(flag: str, arguments: list[str]) -> str:
    """What the command line says behind a flag, which is needed before it is parsed; empty where it is not there."""
    return " ".join(_values_of(flag, arguments)[:1])


def _values_of(flag: str, arguments: list[str]) -> list[str]:
    """All that stands behind the last of these flags."""
    found: list[str] = []
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            rest = arguments[i + 1 :]
            found = [value] if equals else rest[: next((k for k, a in enumerate(rest) if a[:2] == "--"), len(rest))]
    return found


def _read_file(kind: type[EvalConfig], file: str, flag: str) -> tuple[dict[str, Any], list[str]]:
    """The options of a file by name, in their types, and warnings that name those that it may not set."""
    if os.path.exists(file) and not os.path.isfile(file):
        raise InputError(f"{flag} {file} is not a file.")
    text = text_of(file, f"{flag} {file}", LARGEST)
    if file.endswith(".json"):
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{flag} {file} is not JSON: {error}") from None
    else:
        content, _ = mapping_of(text, f"{flag} {file}")
    if not isinstance(content, dict):
        raise InputError(f"{flag} {file} holds no options; it must be a mapping such as `epochs: 50`.")
    theirs = "versions" not in content  # else a run's config.json
    task, own = content.get("task"), getattr(kind, "task", None)
    if isinstance(task, str) and own is not None and task != own:
        what = f"train/{task}.py trains that" if task in TASKS else f"these scripts train {', '.join(TASKS)}"
        raise InputError(f"{flag} {file} is of the task {task[:40]!r}; {what}.")
    content = {str(key): value for key, value in content.items() if key not in ("versions", "task")}
    known = {field.name for field in dataclasses.fields(kind)}
    # Ultralytics' files list all its options: what is unset, or stands at its default, asks for nothing.
    defaults = vars(get_cfg()) if theirs else {}
    asked = {k: v for k, v in content.items() if v is not None and not (theirs and defaults.get(k, ...) == v)}
    unknown = sorted(key for key in asked if key not in known)
    plain = kind()
    barred = sorted(key for key in asked.keys() & known - FROM_FILE if asked[key] != getattr(plain, key))
    if not theirs:
        barred = [key for key in barred if key != "resume"]  # of that run alone
    values = typed(kind, {k: v for k, v in asked.items() if k in known & FROM_FILE}, f"{flag} {file}")
    warnings = [f"warning: {file} sets {', '.join(unknown)}, which this project does not have"] if unknown else []
    if barred:
        flags = ", ".join(map(as_flag, barred))
        warnings.append(f"warning: {file} sets {flags}, which counts from the command line alone and is left out")
    return values, warnings


def typed(kind: type[EvalConfig], values: dict[str, Any], source: str) -> dict[str, Any]:
    """Options in the types that their fields have; an InputError lists those that are of another."""
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    found: dict[str, Any] = {}
    faults = []
    for name, value in values.items():
        try:
            found[name] = pydantic.TypeAdapter(types[name]).validate_python(value)
        except pydantic.ValidationError:
            shown = repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
            faults.append(f"{source}: {name} is {shown[:100]}; it must be {in_words(types[name])}.")
    if faults:
        raise InputError("\n".join(faults))
    return found
