"""The options of train/segment.py and train/pose.py: those of train/detect.py, and of their labels and losses."""

import math
from dataclasses import dataclass
from typing import ClassVar

from train.config.options import Oks, TrainConfig
from train.config.words import outside

LEAST = 32  # pixels of an image's shorter side, however long the other is (--rect): a model's stride


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Masks, as they are trained on."""

    overlap_mask: bool = True
    """One mask an image, on which smaller objects hide larger ones; `--no-overlap-mask` is one mask an object."""
    mask_ratio: int = 4
    """Masks are this many times smaller than the images."""


@dataclass(frozen=True, kw_only=True)
class Keypoints:
    """Loss of keypoints."""

    pose: float = 12.0
    """Gain of the loss of where keypoints are."""
    kobj: float = 1.0
    """Gain of the loss of whether they are visible."""
    rle: float = 1.0
    """Gain of the residual log-likelihood (RLE), which 26 models have."""


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(Masks, TrainConfig):
    """Train a YOLO segmentation model on one process or many. The defaults are Ultralytics' recipe."""

    task: ClassVar[str] = "segment"
    model: str = "yolov8n-seg.yaml"
    project: str = "runs/segment"

    def faults(self) -> list[str]:
        """Every value that cannot work, one sentence each, with the flag to change."""
        return super().faults() + outside(self, 1, min(self.imgsz, LEAST), "mask_ratio")


@dataclass(frozen=True, kw_only=True)
class PoseConfig(Keypoints, Oks, TrainConfig):
    """Train a YOLO pose model on one process or many. The defaults are Ultralytics' recipe."""

    task: ClassVar[str] = "pose"
    model: str = "yolov8n-pose.yaml"
    project: str = "runs/pose"

    def faults(self) -> list[str]:
        """Every value that cannot work, one sentence each, with the flag to change."""
        return super().faults() + outside(self, 0, math.inf, "pose", "kobj", "rle")
