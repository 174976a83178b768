"""The options of both scripts: typed, documented, named as Ultralytics names them, checked in one place."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

Precision = Literal["auto", "bf16", "fp16", "no"]


class InputError(ValueError):
    """What a person asked for cannot be done: the message names the value, the reason and the flag or file to mend."""


def _outside(config: Any, low: float, high: float, *names: str) -> list[str]:
    """One sentence for each of the named options whose value is not between low and high."""
    wanted = f"between {low:g} and {high:g}" if high < math.inf else f"{low:g} or more"
    return [
        f"--{name.replace('_', '-')} is {getattr(config, name)!r}; it must be {wanted}."
        for name in names
        if not low <= getattr(config, name) <= high
    ]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What training and evaluation have in common."""

    data: str = "shapes"
    """The data set: an Ultralytics data YAML (a path, or a name such as coco8.yaml), or `shapes`, drawn on the spot."""
    imgsz: int = 640
    """Image size in pixels: the longer side is scaled to it. A multiple of the model's largest stride, usually 32."""
    val_batch: int = 32
    """Validation batch of each process. Batches are made from the data set and this alone, so AP does not move."""
    conf: float = 0.001
    """Score below which a prediction is dropped before NMS in validation."""
    iou: float = 0.7
    """IoU above which NMS drops the lower-scoring of two boxes of one class."""
    max_det: int = 300
    """Most detections kept in one image."""
    coco_eval: Literal["hotcoco", "pycocotools"] = "hotcoco"
    """Evaluator of the COCO metric. Both give the same bits; hotcoco is about a hundred times faster."""
    workers: int = 8
    """Data-loading processes of each rank (never more than its share of the cores); 0 loads in the rank itself."""
    mixed_precision: Precision | None = None
    """Precision of forward and backward: `auto` takes what the device does fast and safely; unset takes what
    `accelerate launch --mixed_precision` says, else fp32 (`no`)."""
    channels_last: bool = False
    """Keep weights and images in NHWC memory order: faster convolutions with bf16 and fp16."""

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory order of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def faults(self) -> list[str]:
        """Every value that cannot work, one sentence each, with the flag to change."""
        return (
            _outside(self, 32, math.inf, "imgsz")
            + _outside(self, 1, math.inf, "val_batch", "max_det")
            + _outside(self, 0, 1, "conf", "iou")
            + _outside(self, 0, math.inf, "workers")
        )

    def check(self) -> None:
        """Raise one InputError that lists every fault, before a device is touched."""
        if faults := self.faults():
            raise InputError("\n".join(faults))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(EvalConfig):
    """Train a YOLO detector on one process or many. The defaults are Ultralytics' recipe."""

    model: str = "yolov8n.yaml"
    """An Ultralytics model YAML with its scale (yolov8n.yaml, yolo11s.yaml: from scratch), or a .pt checkpoint."""
    epochs: int = 100
    """How often every image is seen."""
    batch: int = 16
    """Global batch: images in one forward over all processes together; a multiple of their number."""
    nbs: int = 64
    """Nominal batch: gradients are summed over batches until they make up about this many images, then one step."""
    local_loss_norm: bool = False
    """Divide each rank's loss by that rank's own target-score sum, as Ultralytics does, not by the global sum."""
    sync_bn: bool = False
    """Share BatchNorm statistics between processes (CUDA only)."""

    optimizer: Literal["auto", "SGD", "Adam", "AdamW", "MuSGD"] = "auto"
    """`auto`, as in Ultralytics: MuSGD above 10,000 steps, else AdamW, with a learning rate made from the number of
    classes; lr0, momentum and warmup_bias_lr are then not used."""
    lr0: float = 0.01
    """Learning rate after the warm-up."""
    lrf: float = 0.01
    """Last learning rate, as a share of lr0."""
    cos_lr: bool = False
    """Cosine instead of linear decay of the learning rate."""
    momentum: float = 0.937
    """Momentum of SGD and MuSGD, beta1 of Adam and AdamW."""
    weight_decay: float = 0.0005
    """Weight decay, scaled by the images of one step over nbs."""
    warmup_epochs: float = 3.0
    """Epochs in which learning rate, momentum and accumulation rise to their values."""
    warmup_momentum: float = 0.8
    """Momentum at the start of the warm-up."""
    warmup_bias_lr: float = 0.1
    """Learning rate of the biases at the start of the warm-up, from where it falls."""
    patience: int = 100
    """Stop after this many epochs without a better 0.1·AP50 + 0.9·AP."""

    box: float = 7.5
    """Gain of the box loss."""
    cls: float = 0.5
    """Gain of the class loss."""
    dfl: float = 1.5
    """Gain of the distribution focal loss."""

    hsv_h: float = 0.015
    """Hue augmentation, as a share."""
    hsv_s: float = 0.7
    """Saturation augmentation, as a share."""
    hsv_v: float = 0.4
    """Brightness augmentation, as a share."""
    degrees: float = 0.0
    """Rotation, in degrees either way."""
    translate: float = 0.1
    """Shift, as a share of the image."""
    scale: float = 0.5
    """Zoom, as a share either way."""
    shear: float = 0.0
    """Shear, in degrees either way."""
    perspective: float = 0.0
    """Perspective, 0 to 0.001."""
    flipud: float = 0.0
    """Probability of a flip upside down."""
    fliplr: float = 0.5
    """Probability of a flip left to right."""
    bgr: float = 0.0
    """Probability of swapping red and blue."""
    mosaic: float = 1.0
    """Probability of a mosaic of four images."""
    mixup: float = 0.0
    """Probability of blending in a second image."""
    cutmix: float = 0.0
    """Probability of pasting in a part of a second image."""
    copy_paste: float = 0.0
    """Probability of copying objects by their polygons."""
    close_mosaic: int = 10
    """Last epochs without mosaic, mixup, cutmix and copy-paste."""

    project: str = "runs/detect"
    """Folder that holds the runs."""
    name: str = "exp"
    """Name of the run's folder; exp2, exp3, … where it is taken."""
    log_interval: int = 50
    """Optimizer steps between two lines of losses within an epoch."""
    trackers: tuple[str, ...] = ("wandb",)
    """Experiment trackers of Accelerate (wandb, tensorboard, …); `--trackers none` for none."""
    seed: int = 0
    """Seed of the initial weights, of the order and of the augmentation."""

    @property
    def used_trackers(self) -> list[str]:
        """The trackers without `none`."""
        return [name for name in self.trackers if name != "none"]

    def faults(self) -> list[str]:
        """Every value that cannot work, one sentence each, with the flag to change."""
        return (
            super().faults()
            + _outside(self, 1, math.inf, "epochs", "batch", "nbs", "patience", "log_interval")
            + _outside(self, 0, math.inf, "lr0", "lrf", "weight_decay", "warmup_epochs", "warmup_bias_lr", "seed")
            + _outside(self, 0, math.inf, "close_mosaic", "box", "cls", "dfl")
            + _outside(self, 0, 0.9999, "momentum", "warmup_momentum")
            + _outside(self, 0, 1, "hsv_h", "hsv_s", "hsv_v", "translate", "scale", "flipud", "fliplr", "bgr")
            + _outside(self, 0, 1, "mosaic", "mixup", "cutmix", "copy_paste")
            + _outside(self, 0, 0.001, "perspective")
        )


@dataclass(frozen=True, kw_only=True)
class ValConfig(EvalConfig):
    """Evaluate a YOLO checkpoint with COCO's metric on one process or many."""

    weights: str
    """The checkpoint to evaluate: best.pt or last.pt of a run, or any Ultralytics detection model."""
    data: str = ""
    """The data set, as in training; unset takes the one that the checkpoint was trained on."""
    imgsz: int = 0
    """Image size in pixels; unset takes the one that the checkpoint was trained at."""
    split: Literal["train", "val", "test"] = "val"
    """Split of the data set to evaluate on."""
    save_dir: str = ""
    """Folder for metrics.json, predictions.json and ground_truth.json; unset makes runs/detect/val, val2, …"""

    def with_defaults(self, trained: dict[str, Any]) -> "ValConfig":
        """This configuration with what is unset taken from the checkpoint's training arguments."""
        data, imgsz = self.data or trained.get("data") or "", self.imgsz or trained.get("imgsz") or 640
        if not data:
            raise InputError(f"{self.weights} does not say what it was trained on; name the data set with --data.")
        return replace(self, data=str(data), imgsz=int(imgsz))
