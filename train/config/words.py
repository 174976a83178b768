"""Options in people's words: what a type admits, and what users of Ultralytics type first."""

import dataclasses
import difflib
import math
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

from train.config.errors import InputError

# Flags that Ultralytics or YOLOv5 have and this project has not, and what does the same here.
OTHERS = {
    "device": "CUDA_VISIBLE_DEVICES=0,1 says which GPUs; make train GPUS=2 or accelerate launch --multi_gpu "
    "--num_processes 2 how many",
    "batch_size": "--batch", "batchsize": "--batch", "bs": "--batch", "img": "--imgsz", "img_size": "--imgsz",
    "imgsize": "--imgsz", "image_size": "--imgsz", "epoch": "--epochs", "lr": "--lr0", "learning_rate": "--lr0",
    "num_workers": "--workers", "hyp": "--cfg", "config": "--cfg", "amp": "--mixed-precision auto (or bf16, fp16, no)",
    "half": "--mixed-precision fp16", "precision": "--mixed-precision", "gpus": "make train GPUS=2",
    "nproc_per_node": "it is torchrun's and stands before the script", "num_processes": "it is accelerate launch's and "
    "stands before the script", "exist_ok": "every run makes a folder of its own: --name", "val": "--val-interval",
    "noval": "--val-interval", "pretrained": "--model yolov8n.pt starts from weights, yolov8n.yaml from scratch",
    "save_json": "predictions.json is always written", "verbose": "--log-level", "cos_scheduler": "--cos-lr",
    "label_smoothing": "Ultralytics has taken it out", "rank": "the launcher's", "local_rank": "the launcher's",
    "save": "best.pt and last.pt are always kept", "conf_thres": "--conf", "iou_thres": "--iou",
}  # fmt: skip
ABOVE_0 = 1e-9  # the least value of what must be above 0
JOINERS = "\u200c\u200d"  # within words of some scripts and within emoji
DASHES = "\u2013\u2014\u2212"
SWAPPED = {"weights": "--model", "model": "--weights"}  # of train/detect.py and train/validate.py


def printable(text: str, newlines: bool = False) -> str:
    """The text without what moves a terminal's cursor, breaks lines or cannot be encoded: escaped as Python would."""
    keeps = "\n" if newlines else ""
    return "".join(c if c.isprintable() or c in keeps or c in JOINERS else ascii(c)[1:-1] for c in text)


def as_flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def in_words(kind: Any) -> str:
    """What values a type admits."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind in plain:
        return plain[kind]
    several = {int: "whole numbers", float: "numbers", str: "words"}
    origin, inner = get_origin(kind), [part for part in get_args(kind) if part is not type(None)]
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if origin is tuple:
        number = "" if inner[-1] is Ellipsis else {2: "two ", 3: "three "}.get(len(inner), f"{len(inner)} ")
        return number + several.get(inner[0], "numbers or words")
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(part) for part in inner)
    return str(kind)


def check_flags(kind: type, arguments: list[str]) -> None:
    """Raise InputError where the command line is written as Ultralytics', and say how it is written here."""
    known = {field.name for field in dataclasses.fields(kind)} | {"cfg", "help"}
    pairs = [
        a for a in arguments if a.partition("=")[1] and a.partition("=")[0] in known | OTHERS.keys() | SWAPPED.keys()
    ]
    if pairs and not arguments[0].startswith("-"):
        written = " ".join(f"{as_flag(pair.partition('=')[0])} {pair.partition('=')[2]}" for pair in pairs)
        raise InputError(f"{' '.join(pairs)}: options are written {written}.")
    for argument in arguments:
        if re.match(f"[{DASHES}]-?[a-z]", argument):  # as word processors and chats make of --
            raise InputError(f"{argument}: options begin with two hyphens, --{argument.lstrip(DASHES + '-')}.")
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if not argument.startswith("--") or name in known or name.removeprefix("no_") in known:
            continue
        other = OTHERS.get(name) or SWAPPED.get(name)
        meant = other.partition(" ")[0][2:].replace("-", "_") if other and other.startswith("--") else ""
        if other is not None and (not meant or meant in known):
            raise InputError(f"There is no {argument.partition('=')[0]} here; instead: {other}.")


def unknown_words(kind: type, unknown: list[str]) -> str:
    """What to say of words on the command line that belong to no option."""
    known = [as_flag(field.name) for field in dataclasses.fields(kind)]
    said = []
    for word in unknown:
        name, equals, value = word.partition("=")
        if equals and as_flag(name) in known:
            said.append(f"{word}: options are written {as_flag(name)} {value}.")
        elif word.startswith("-"):
            near = difflib.get_close_matches(name.replace("_", "-"), known, 1)
            said.append(
                f"There is no {name} here; " + (f"is {near[0]} meant?" if near else "--help lists the options.")
            )
        else:
            said.append(f"{word!r} belongs to no option; --help says how many values each takes.")
    return "\n".join(said)


def seconds_of(time: str) -> float:
    """Seconds of a time such as 11h30m, 1.5h, 15m or 45s; 0 where it is none."""
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", time.strip().lower())
    return sum(float(n) * unit for n, unit in zip(parts.groups(), (3600, 60, 1), strict=True) if n) if parts else 0.0


def outside(config: Any, low: float, high: float, *names: str) -> list[str]:
    """One sentence for each of the named options whose value is not between low and high."""
    if low == ABOVE_0:
        wanted = "above 0" + (f" and at most {high:.10g}" if high < math.inf else "")
    else:
        wanted = f"between {low:.10g} and {high:.10g}" if high < math.inf else f"{low:.10g} or more"
    return [
        f"--{name.replace('_', '-')} is {getattr(config, name)!r}; it must be {wanted}."
        for name in names
        if not low <= getattr(config, name) <= high or getattr(config, name) == math.inf
    ]


def in_bytes(number: float) -> str:
    """A size as people write it: 3.2 MB, 109 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.3g} {unit}" if number < 100 else f"{number:.0f} {unit}"
        number /= 1000
    raise AssertionError
