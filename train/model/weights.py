"""Checkpoints and model YAMLs: found, fetched, read without running code, and written for `ultralytics.YOLO`."""

import contextlib
import os
import pickle
import re
from collections.abc import Iterator
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics import __version__ as ultralytics_version
from ultralytics.cfg import get_cfg
from ultralytics.nn import tasks
from ultralytics.nn.tasks import BaseModel, DetectionModel, load_checkpoint
from ultralytics.utils import downloads
from ultralytics.utils.checks import check_yolov5u_filename
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, GITHUB_ASSETS_REPO, attempt_download_asset

from train.config.errors import InputError
from train.config.plain import checked_name
from train.model.architecture import read_architecture
from train.model.tasks import HEADS, Task, check_head, task_of

EXPORTED = (
    ".onnx",
    ".engine",
    ".torchscript",
    ".tflite",
    ".mlpackage",
    ".mlmodel",
    ".xml",
    ".pb",
    ".bin",
    ".safetensors",
)


def fetch_weights(model: str, flag: str = "--model") -> str:
    """Path of the checkpoint or YAML that `model` names; an official checkpoint that is not there is downloaded.

    Call it on one process. Raises InputError where the file is not there and cannot be had.
    """
    path = Path(model)
    if not model:
        raise InputError(f"{flag} is empty; is a variable not set?")
    if path.is_dir():
        if flag == "--weights" and (best := best_of_run(model)) != model:
            return best
        found = sorted(path.rglob("*.pt"))[:1]
        raise InputError(f"{flag} {model} is a folder; name a file" + (f", such as {found[0]}." if found else "."))
    if path.suffix == ".pt":
        if path.is_file():
            return str(path)
        official = check_yolov5u_filename(path.name, verbose=False)  # yolov5n.pt is yolov5nu.pt here
        if path.exists() or str(path) != path.name or official not in GITHUB_ASSETS_NAMES:
            hint = f" Did you mean {path.name.lower()}?" if path.name.lower() in GITHUB_ASSETS_NAMES else ""
            raise InputError(f"There is no checkpoint {path} (looked in {path.absolute().parent}).{hint}")
        try:
            return attempt_download_asset(official)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{path.name} is not in {Path.cwd()} and could not be downloaded ({_first_line(error)}). "
                f"Get it from https://github.com/{GITHUB_ASSETS_REPO}/releases and put it there, "
                f"or train from scratch with {path.stem}.yaml."
            ) from None
    if path.suffix in (".yaml", ".yml") and flag == "--model":
        read_architecture(str(path))
        return str(path)
    if path.suffix in EXPORTED or path.name.endswith(EXPORTED):
        raise InputError(f"{flag} is {model!r}, an exported model; name the .pt checkpoint that it was made from.")
    kinds = (
        "an Ultralytics model .yaml or a .pt checkpoint" if flag == "--model" else "a .pt checkpoint or a run's folder"
    )
    hint = (
        f" Did you mean {path.name}.yaml or {path.name}.pt?" if "." not in path.name and _is_official(path.name) else ""
    )
    raise InputError(f"{flag} is {model!r}; it must be {kinds}.{hint}")


def best_of_run(weights: str) -> str:
    """best.pt of a run, where its folder is named; else what is named."""
    best = Path(weights) / "weights" / "best.pt"
    return str(best) if best.is_file() else weights


def _is_official(name: str) -> bool:
    return f"{name}.pt" in GITHUB_ASSETS_NAMES or name.startswith(("yolo1", "yolo2", "yolov"))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def _inert(trust: bool) -> Iterator[None]:
    """While a checkpoint is read, nothing is fetched and no module constructed. A healthy one makes its objects without
    their constructors, of which TorchVision's downloads; a list of classes does not tell the two apart.
    """

    def refuse(self: nn.Module, *_: object, **__: object) -> None:
        raise pickle.UnpicklingError(f"it would construct {type(self).__name__}")

    construct, fetch = nn.Module.__init__, downloads.attempt_download_asset
    downloads.attempt_download_asset = str  # which also drops apostrophes from a path, and then misses the file
    if not trust:
        nn.Module.__init__ = refuse  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.__init__, downloads.attempt_download_asset = construct, fetch  # type: ignore[method-assign]


def load_detector(weights: str, trust: bool = False, task: Task | None = None) -> tuple[DetectionModel, dict[str, Any]]:
    """An Ultralytics checkpoint as (fp32 model in eval mode, the checkpoint's other entries).

    The file is read with torch's weights-only rules and Ultralytics' list of allowed classes, so that it cannot run
    code, unless it is trusted.

    Args:
        weights: the checkpoint.
        trust: whether it may run code.
        task: that it is to be of; unset admits any that is known here.
    """
    foreign: list[str] = []
    tasks.SAFE_LOAD = not trust  # Ultralytics' switch for the process; load_checkpoint has no parameter for it
    try:
        try:
            held = torch.serialization.get_unsafe_globals_in_checkpoint(weights)
        except ValueError:  # not the zip file that torch has written since 1.6
            held = []
        if any(name.startswith("models.") for name in held):
            name = Path(weights).stem
            raise InputError(
                f"{weights} is a checkpoint of the original YOLOv5 code. Use its successor {name}u.pt from "
                f"https://github.com/{GITHUB_ASSETS_REPO}/releases, or train from scratch with {name}.yaml."
            )
        foreign = [name for name in held if name.partition(".")[0] not in ("ultralytics", "torch")]
        # By its whole path: a damaged file with the bare name of an official one Ultralytics would delete and download.
        with _inert(trust):
            model, checkpoint = load_checkpoint(str(Path(weights).absolute()))
    except InputError:
        raise
    except Exception as error:  # a broken pickle fails in as many ways as there are bytes
        if not trust and (foreign := foreign or _refused(error)):
            raise InputError(
                f"{weights} is not a checkpoint that can be loaded: it holds {', '.join(map(repr, foreign[:3]))}, of "
                "neither Ultralytics nor torch. --trust-checkpoint loads that, and runs its code."
            ) from None
        reason = "it is cut off, damaged, or no checkpoint" if os.path.getsize(weights) else "it is empty"
        raise InputError(f"{weights} is not a checkpoint that can be loaded: {reason} ({_kind(error)}).") from None
    finally:
        tasks.SAFE_LOAD = True
    head = type(model.model[-1]).__name__ if isinstance(model, BaseModel) else type(model).__name__
    if head in HEADS and type(model) is not HEADS[head].model:  # a class of another library, say
        head = type(model).__name__
    check_head(head, weights, task)
    if not isinstance(model.names, dict) or not isinstance(model.yaml, dict):
        raise InputError(f"{weights} is not a checkpoint that can be loaded: it lacks class names or its description.")
    model.names = {int(index): checked_name(str(name)[:1000], f"{weights}: class {index}")
                   for index, name in model.names.items()}  # fmt: skip
    return model, {key: value for key, value in checkpoint.items() if key not in ("model", "ema")}


def _kind(error: BaseException) -> str:
    """The error's kind, or that of the cause which Ultralytics has wrapped with a hint for its own command line."""
    return type(error.__cause__ or error).__name__


def _refused(error: BaseException) -> list[str]:
    """The class that torch's weights-only rules have refused to load, where that is the error."""
    return re.findall(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error.__cause__ or error))


def trained_with(weights: str, trust: bool = False) -> dict[str, Any]:
    """Options that a checkpoint was trained and validated with: all of them, or, of another trainer, data and imgsz."""
    _, checkpoint = load_detector(weights, trust)
    if isinstance(config := checkpoint.get("config"), dict):
        return config
    theirs = checkpoint.get("train_args") or {}
    return {"data": str(theirs.get("data") or ""), "imgsz": theirs.get("imgsz") or 640}


def as_checkpoint(
    model: DetectionModel, train_args: dict[str, Any], epoch: int, metrics: dict[str, float]
) -> dict[str, Any]:
    """What `ultralytics.YOLO` reads: the module itself, in fp32 and contiguous, with plain values beside it."""
    model = deepcopy(model).float().cpu().to(memory_format=torch.contiguous_format)
    theirs = vars(get_cfg())
    shared = theirs.keys() - {"profile"}  # another thing there: whether an export is timed
    model.args = theirs | {key: value for key, value in train_args.items() if key in shared and value is not None}
    model.args["task"] = task_of(model).name
    model.criterion = None
    return {
        "epoch": epoch,
        "model": model,
        "ema": None,
        "optimizer": None,
        "train_args": model.args,
        "config": train_args,
        "train_metrics": metrics,
        "date": datetime.now().astimezone().isoformat(),
        "version": ultralytics_version,
        "license": "AGPL-3.0 (https://ultralytics.com/license)",
    }
