"""Checkpoints and model YAMLs: found, fetched, read without running code, and written for `ultralytics.YOLO`."""

import os
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from ultralytics import __version__ as ultralytics_version
from ultralytics.cfg import get_cfg
from ultralytics.nn import tasks
from ultralytics.nn.modules.head import Detect, v10Detect
from ultralytics.nn.tasks import BaseModel, DetectionModel, load_checkpoint, yaml_model_load
from ultralytics.utils.checks import check_yolov5u_filename
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, GITHUB_ASSETS_REPO, attempt_download_asset

from train.config.errors import InputError


def fetch_weights(model: str) -> str:
    """Path of the checkpoint or YAML that `model` names; an official checkpoint that is not there is downloaded.

    Call it on one process. Raises InputError where the file is not there and cannot be had.
    """
    path = Path(os.path.expanduser(model))
    if path.suffix == ".pt":
        if path.is_file():
            return str(path)
        official = check_yolov5u_filename(path.name, verbose=False)  # yolov5n.pt is yolov5nu.pt here
        if str(path) != path.name or official not in GITHUB_ASSETS_NAMES:
            raise InputError(f"There is no checkpoint {path} (looked in {path.absolute().parent}).")
        try:
            return attempt_download_asset(official)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{path.name} is not in {Path.cwd()} and could not be downloaded ({_first_line(error)}). "
                f"Get it from https://github.com/{GITHUB_ASSETS_REPO}/releases and put it there, "
                f"or train from scratch with {path.stem}.yaml."
            ) from None
    if path.suffix in (".yaml", ".yml"):
        try:
            yaml_model_load(model)  # knows that yolov8n.yaml is yolov8.yaml at scale n
            return model
        except FileNotFoundError:
            raise InputError(
                f"There is no model {model}, neither a file nor one of Ultralytics' (yolov8n.yaml, yolo11s.yaml, …)."
            ) from None
    raise InputError(f"--model is {model!r}; it must be an Ultralytics model .yaml or a .pt checkpoint.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load_detector(weights: str, trust: bool = False) -> tuple[DetectionModel, dict[str, Any]]:
    """An Ultralytics detection checkpoint as (fp32 model in eval mode, the checkpoint's other entries).

    The file is read with torch's weights-only rules and Ultralytics' list of allowed classes, so that it cannot run
    code, unless it is trusted.
    """
    tasks.SAFE_LOAD = not trust  # Ultralytics' switch for the process; load_checkpoint has no parameter for it
    try:
        if any(name.startswith("models.") for name in torch.serialization.get_unsafe_globals_in_checkpoint(weights)):
            name = Path(weights).stem
            raise InputError(
                f"{weights} is a checkpoint of the original YOLOv5 code. Use its successor {name}u.pt from "
                f"https://github.com/{GITHUB_ASSETS_REPO}/releases, or train from scratch with {name}.yaml."
            )
        model, checkpoint = load_checkpoint(weights)
    except InputError:
        raise
    except Exception as error:  # a broken pickle fails in as many ways as there are bytes
        hint = "" if trust else " --trust-checkpoint loads classes other than Ultralytics' and torch's, and their code."
        raise InputError(f"{weights} is not a checkpoint that can be loaded: {_first_line(error)}{hint}") from None
    finally:
        tasks.SAFE_LOAD = True
    if type(model) is not DetectionModel or type(model.model[-1]) not in (Detect, v10Detect):  # segmentation inherits
        kind = type(model.model[-1]).__name__ if isinstance(model, BaseModel) else type(model).__name__
        raise InputError(f"{weights} ends in a {kind} head; these scripts are for YOLO detection models.")
    return model, {key: value for key, value in checkpoint.items() if key not in ("model", "ema")}


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
    model.args = theirs | {key: value for key, value in train_args.items() if key in theirs and value is not None}
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
