"""Model YAMLs: read as data, and built out of known layers alone, whether they stand in a file or in a checkpoint."""

import os
from typing import Any

import yaml
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from train.config.errors import InputError
from train.config.plain import shown

HEADS = ("Detect", "v10Detect")
LAYERS = frozenset({  # of Ultralytics' detectors; none fetches anything, as its TorchVision does
    "A2C2f", "AConv", "ADown", "Bottleneck", "BottleneckCSP", "C1", "C2", "C2PSA", "C2f", "C2fCIB", "C2fPSA", "C3",
    "C3Ghost", "C3TR", "C3k2", "C3x", "CBFuse", "CBLinear", "Concat", "Conv", "ConvTranspose", "DWConv",
    "DWConvTranspose2d", "ELAN1", "Focus", "GhostBottleneck", "GhostConv", "HGBlock", "HGStem", "PSA", "RepC3",
    "RepNCSPELAN4", "ResNetLayer", "SCDown", "SPP", "SPPELAN", "SPPF", "nn.BatchNorm2d", "nn.ConvTranspose2d",
    "nn.Identity", "nn.MaxPool2d", "nn.ReLU", "nn.SiLU", "nn.Upsample", "nn.ZeroPad2d", *HEADS,
})  # fmt: skip


def read_architecture(file: str) -> dict[str, Any]:
    """A model YAML, Ultralytics' own by its name (yolov8n.yaml is yolov8.yaml at scale n) or a file.

    Raises:
        InputError: there is none, or it is not one of a detector.
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
    check_architecture(content, f"--model {file}")
    return content


def check_architecture(content: Any, source: str) -> None:
    """Raise InputError where a model's description names layers that are not known here, or is none."""
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
    last = rows[-1][2]
    if last not in HEADS:
        raise InputError(f"{source} ends in a {last[:40]} head; these scripts are for YOLO detection models.")
    for number, row in enumerate(rows):
        if row[2] not in LAYERS:
            raise InputError(
                f"{source}: layer {number} is {row[2][:40]!r}, which these scripts do not build. Known are "
                f"{', '.join(sorted(LAYERS))}."
            )


def build_detector(content: dict[str, Any], channels: int, classes: int, source: str) -> DetectionModel:
    """A detector with new weights out of a checked description.

    Raises:
        InputError: its layers do not fit each other.
    """
    check_architecture(content, source)
    try:
        return DetectionModel(content, ch=channels, nc=classes, verbose=False)
    except Exception as error:  # a description may be wrong in as many ways as there are layers
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{source} cannot be built: {type(error).__name__}: {reason}") from None
