"""Model YAMLs: read as data, and built out of known layers alone, whether they stand in a file or in a checkpoint."""

import os
from typing import Any

import yaml
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from train.config.errors import InputError
from train.config.objects import Objects
from train.config.plain import shown
from train.model.tasks import HEADS, Task, check_head

LAYERS = frozenset({  # of Ultralytics' YOLO models; none fetches anything, as its TorchVision does
    "A2C2f", "AConv", "ADown", "Bottleneck", "BottleneckCSP", "C1", "C2", "C2PSA", "C2f", "C2fCIB", "C2fPSA", "C3",
    "C3Ghost", "C3TR", "C3k2", "C3x", "CBFuse", "CBLinear", "Concat", "Conv", "ConvTranspose", "DWConv",
    "DWConvTranspose2d", "ELAN1", "Focus", "GhostBottleneck", "GhostConv", "HGBlock", "HGStem", "PSA", "RepC3",
    "RepNCSPELAN4", "ResNetLayer", "SCDown", "SPP", "SPPELAN", "SPPF", "nn.BatchNorm2d", "nn.ConvTranspose2d",
    "nn.Identity", "nn.MaxPool2d", "nn.ReLU", "nn.SiLU", "nn.Upsample", "nn.ZeroPad2d", *HEADS,
})  # fmt: skip


def read_architecture(file: str, task: Task | None = None) -> dict[str, Any]:
    """A model YAML, Ultralytics' own by its name (yolov8n.yaml is yolov8.yaml at scale n) or a file.

    Args:
        file: the YAML.
        task: that the model is to be of; unset admits any.

    Raises:
        InputError: there is none, or it is not one of a YOLO model.
    """
    if os.path.exists(file) and not os.path.isfile(file):
        raise InputError(f"--model {file} is not a file.")
    try:
        content = yaml_model_load(file)
    except FileNotFoundError:
        raise InputError(
            f"There is no model {file}, neither a file nor one of Ultralytics' (yolov8n.yaml, yolo11s.yaml, …)."
        ) from None
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError, RecursionError) as error:
        ours = isinstance(error, yaml.YAMLError | OSError)
        reason = " ".join(str(error).split())[:200] if ours else "it is no mapping with a backbone and a head"
        raise InputError(f"--model {file} is not a YAML that can be read: {reason}") from None
    check_architecture(content, f"--model {file}", task)
    return content


def check_architecture(content: Any, source: str, task: Task | None = None) -> None:
    """Raise InputError where a model's description names layers that are not known here, is of another task, or is
    none.
    """
    if isinstance(content, dict) and "names" in content and ("train" in content or "val" in content):
        raise InputError(f"{source} is the YAML of a data set; that is --data.")
    rows: list[Any] = []
    for part in ("backbone", "head"):
        layers = content.get(part) if isinstance(content, dict) else None
        if not isinstance(layers, list) or not layers:
            raise InputError(f"{source} is not a model's description: it has no list of layers named `{part}`.")
        rows += layers
    for number, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != 4 or not isinstance(row[2], str) or not isinstance(row[3], list):
            raise InputError(
                f"{source}: layer {number} is {shown(row)}; it must be [from, number, module, [arguments]]."
            )
    check_head(rows[-1][2], source, task)
    for number, row in enumerate(rows):
        if row[2] not in LAYERS:
            raise InputError(
                f"{source}: layer {number} is {row[2][:40]!r}, which these scripts do not build. Known are "
                f"{', '.join(sorted(LAYERS))}."
            )


def build_detector(content: dict[str, Any], task: Task, objects: Objects, source: str) -> DetectionModel:
    """A model with new weights out of a checked description.

    Args:
        content: the description.
        task: of the model.
        objects: that it is to find.
        source: of the description, as a message begins.

    Raises:
        InputError: its layers do not fit each other.
    """
    check_architecture(content, source, task)
    more: dict[str, Any] = {}
    if task.carries == "keypoints":  # as a list, with which Ultralytics compares; and it prints where they differ
        content = content | {"kpt_shape": [*objects.keypoints]}
        more = {"data_kpt_shape": content["kpt_shape"]}
    try:
        model = task.model(content, ch=objects.channels, nc=len(objects.names), verbose=False, **more)
    except Exception as error:  # a description may be wrong in as many ways as there are layers
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{source} cannot be built: {type(error).__name__}: {reason}") from None
    model.names = objects.names  # by which load() matches the head's rows
    return model
