"""The options of the scripts: typed, documented, named as Ultralytics names them, checked in one place.

Each group of options is a dataclass of its own; `--help` shows them as groups, a configuration has them all side by
side.
"""

import importlib.util
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch

from train.config.errors import InputError
from train.config.words import ABOVE_0, outside, seconds_of

Precision = Literal["auto", "bf16", "fp16", "no"]
C = TypeVar("C", bound="EvalConfig")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Labels and loading."""

    classes: tuple[int, ...] | None = None
    """Only these class indices count as labels; the model keeps all classes."""
    single_cls: bool = False
    """Take all classes for one."""
    workers: int = 8
    """Data-loading processes of each rank (never more than its share of the cores); 0 loads in the rank itself."""
    index_dir: str = ""
    """Folder that keeps what has been read of data sets; unset takes the user's cache, never the data's own folder."""
    index_check: Literal["stat", "list", "off"] = "stat"
    """Before a kept index is used: compare names, sizes and times; names alone; or nothing."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What is validated, and how it is measured."""

    split: Literal["train", "val", "test"] = "val"
    """Split of the data set to validate on."""
    annotations: str = ""
    """A COCO annotation file of the split: ids, areas and crowds are then its own. Unset takes --data's labels."""
    val_fraction: float = 1.0
    """Share of the split to validate on: a fixed subset, whose metrics have names of their own."""
    val_limit: int | None = None
    """Most images of the split to validate on; as --val-fraction."""
    val_batch: int = 32
    """Validation batch of each process. Batches are made from the data set and this alone, so AP does not move."""
    rect: bool | None = None
    """Unset trains square and validates rectangular; `--rect` trains so too, without mosaic; `--no-rect` neither."""
    conf: float = 0.001
    """Score below which a prediction is dropped before NMS."""
    iou: float = 0.7
    """IoU above which NMS drops the lower-scoring of two boxes of one class."""
    max_det: int = 300
    """Most detections kept in one image."""
    max_dets: tuple[int, int, int] = (1, 10, 100)
    """COCO's detections per image that AR is measured at; AP is measured at the last."""
    end2end: bool | None = None
    """Validate an end-to-end model (v10, 26) by its one-to-one head; `--no-end2end` by the other, with NMS."""
    coco_eval: Literal["hotcoco", "pycocotools"] = "hotcoco"
    """Evaluator of the COCO metric. Both give the same bits; hotcoco is much faster."""
    plots: bool = True
    """Draw curves, the confusion matrix, TIDE errors and a page of the worst images."""


@dataclass(frozen=True, kw_only=True)
class Computing:
    """Precision and memory order."""

    mixed_precision: Precision | None = None
    """Precision of forward and backward; `auto` asks the device; unset takes the launcher's, else fp32 (`no`)."""
    channels_last: bool | None = None
    """NHWC memory order, in which most convolutions are faster; unset is so on CUDA and x86, as in Ultralytics."""


@dataclass(frozen=True, kw_only=True)
class Logging:
    """Console and log files."""

    progress: Literal["auto", "bar", "lines", "off"] = "auto"
    """Within an epoch: a live bar, whole lines, or nothing; `auto` is the bar on a terminal, else lines."""
    log_interval: int | None = None
    """Optimizer steps between two lines of losses; unset gives at most eight lines an epoch."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level of what goes into the log files."""
    hang_timeout: float = 600
    """Seconds without a step or a sign of life that end the run and name the rank; more for slow steps; 0 never."""


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What counts from the command line alone, never from a file, a run's folder or a checkpoint."""

    trust_checkpoint: bool = False
    """Load a checkpoint that holds classes other than Ultralytics' and torch's; this runs the code that is in it."""
    log_file: str = ""
    """One more file for what the main process says, beside logs/rank0.log; it is appended to."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Data, Validation, Computing, Logging, Trust):
    """What training and evaluation have in common; both also have `data` and `imgsz`, with defaults of their own."""

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory order of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def subset(self) -> bool:
        """Whether only a part of the split is validated on."""
        return self.val_fraction < 1 or self.val_limit is not None

    @property
    def val_name(self) -> str:
        """What metrics are filed under, so that those of a subset are never taken for those of the split."""
        return "val_subset" if self.subset else "val"

    def faults(self) -> list[str]:
        """Every value that cannot work, one sentence each, with the flag to change."""
        faults = outside(self, 32, 16384, "imgsz") + outside(self, 1, 100_000, "val_batch", "max_det")
        faults += outside(self, 0, 1, "conf", "iou") + outside(self, 0, math.inf, "workers", "hang_timeout")
        faults += outside(self, ABOVE_0, 1, "val_fraction")
        if self.log_interval is not None:
            faults += outside(self, 1, math.inf, "log_interval")
        if self.val_limit is not None:
            faults += outside(self, 1, math.inf, "val_limit")
        if self.annotations and self.single_cls and self.classes is not None:
            faults.append("--annotations goes with --single-cls or with --classes, not with both.")
        if self.coco_eval == "hotcoco" and importlib.util.find_spec("hotcoco") is None:
            faults.append("hotcoco is not installed: pip install hotcoco, or say --coco-eval pycocotools.")
        if not 0 < self.max_dets[0] < self.max_dets[1] < self.max_dets[2]:
            faults.append(f"--max-dets is {list(self.max_dets)}; it must be three rising numbers, as 1 10 100 are.")
        if self.classes is not None and (not self.classes or min(self.classes) < 0):
            faults.append(f"--classes is {list(self.classes)}; it must be one or more class indices from 0.")
        return faults

    def check(self) -> None:
        """Raise one InputError that lists every fault, before a device is touched."""
        if faults := self.faults():
            raise InputError("\n".join(faults))


@dataclass(frozen=True, kw_only=True)
class Training:
    """Data set, model and length of the training."""

    data: str = "shapes"
    """The data set: an Ultralytics data YAML (a path, or a name such as coco8.yaml); a folder with one, with COCO's
    JSON as Roboflow exports it, or with Pascal VOC; or `shapes`, drawn on the spot."""
    imgsz: int = 640
    """Image size in pixels: the longer side is scaled to it. A multiple of the model's largest stride, usually 32."""
    model: str = "yolov8n.yaml"
    """An Ultralytics model YAML with its scale (yolov8n.yaml, yolo11s.yaml: from scratch), or a .pt checkpoint."""
    epochs: int = 100
    """How often every image is seen."""
    time: float | None = None
    """Hours: after the first epoch --epochs becomes the number that fits into them; planned once, kept on --resume."""
    patience: int = 100
    """Stop after this many epochs without a better AP, to which mask or pose AP is added."""
    val_interval: int = 1
    """Validate after every so many epochs, and after the last."""
    val_precision: Literal["bf16", "fp16", "no"] | None = None
    """Precision of validation; unset takes that of training. Boxes are decoded and suppressed in fp32 in any case."""
    batch: int = 16
    """Global batch: images in one forward over all processes together; a multiple of their number."""
    nbs: int = 64
    """Nominal batch: gradients are summed over batches until they make up about this many images, then one step."""
    fraction: float = 1.0
    """Share of the train images to use, or their number where it is above 1."""
    cache: Literal["ram", "disk"] | None = None
    """Keep the images decoded, at training size, once for all processes: in /dev/shm, or on the disk of the indexes."""
    cache_limit: float = 200
    """GB that --cache disk may take; caches not used for longest make way. `make clean-cache` removes all."""
    freeze: int | tuple[int | str, ...] | None = None
    """Layers that are not trained: the first N, or several by index or name (`--freeze 0 1 22.cv2`)."""
    local_loss_norm: bool = False
    """Divide each rank's loss by that rank's own target-score sum, as Ultralytics does, not by the global sum."""
    compress_gradients: bool = False
    """Sum gradients over the processes in bf16: half of what goes over the network, of eight bits of mantissa."""
    compile: bool = False
    """Compile the model's forward and backward (torch.compile): a minute or more, before they are faster, or not."""
    sync_bn: bool = False
    """Share BatchNorm statistics between processes (CUDA only)."""
    seed: int = 0
    """Seed of the initial weights, of the order and of the augmentation."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Optimizer, learning rate and loss."""

    optimizer: Literal["auto", "SGD", "MuSGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop"] = "auto"
    """`auto` is Ultralytics': MuSGD above 10,000 steps, else AdamW; it sets lr0, momentum, warmup_bias_lr itself."""
    lr0: float = 0.01
    """Learning rate after the warm-up."""
    lrf: float = 0.01
    """Last learning rate, as a share of lr0."""
    cos_lr: bool = False
    """Cosine instead of linear decay of the learning rate."""
    momentum: float = 0.937
    """Momentum of SGD, MuSGD and RMSprop, beta1 of the Adams."""
    weight_decay: float = 0.0005
    """Weight decay, scaled by the images of one step over nbs."""
    warmup_epochs: float = 3.0
    """Epochs in which learning rate, momentum and accumulation rise to their values."""
    warmup_momentum: float = 0.8
    """Momentum at the start of the warm-up."""
    warmup_bias_lr: float = 0.1
    """Learning rate of the biases at the start of the warm-up, from where it falls."""
    box: float = 7.5
    """Gain of the box loss."""
    cls: float = 0.5
    """Gain of the class loss."""
    cls_pw: float = 0.0
    """Weigh classes by their frequency to minus this power; 0 for no weights, 1 for the inverse frequency."""
    dfl: float = 1.5
    """Gain of the distribution focal loss."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Augmentation of training images."""

    hsv_h: float = 0.015
    """Hue, as a share."""
    hsv_s: float = 0.7
    """Saturation, as a share."""
    hsv_v: float = 0.4
    """Brightness, as a share."""
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
    copy_paste_mode: Literal["flip", "mixup"] = "flip"
    """Copy objects from the mirrored image or from a second one."""
    close_mosaic: int = 10
    """Last epochs without mosaic, mixup, cutmix and copy-paste."""
    multi_scale: float = 0.0
    """Scale each batch by up to this share either way: the same size on every rank."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go."""

    project: str = "runs/detect"
    """Folder that holds the runs."""
    name: str = "exp"
    """Name of the run's folder; exp2, exp3, … where it is taken."""
    save_interval: int | str = "15m"
    """Save what --resume goes on from after so many optimizer steps (500) or minutes (15m), and after every epoch."""
    time_limit: str = ""
    """Time since its start (11h30m, 90m) after which the run saves and ends with code 3, to be gone on with."""
    save_period: int = -1
    """Keep the checkpoint of every so many epochs as weights/epoch<N>.pt; below 1 only best.pt and last.pt are."""
    strict: bool = False
    """End where an image or a label file is faulty, instead of leaving it out."""
    trackers: tuple[str, ...] = ("wandb",)
    """Experiment trackers of Accelerate (wandb, tensorboard, …); `--trackers none` for none."""


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Weights & Biases. What is unset is left to W&B's environment variables (WANDB_PROJECT, WANDB_MODE, …)."""

    wandb_project: str = ""
    """Project; unset takes WANDB_PROJECT, else yolo-accelerate."""
    wandb_name: str = ""
    """Name of the run; unset takes WANDB_NAME, else the name of the run's folder."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the run."""
    wandb_group: str = ""
    """Group of the run."""
    wandb_notes: str = ""
    """Notes on the run."""


@dataclass(frozen=True, kw_only=True)
class Resuming:
    """Going on with a run, whose W&B it goes to, where its time goes. These count from the command line alone."""

    resume: str = ""
    """Folder of a run to go on with, at its last save; `auto`: the newest unfinished run of these options, or a new."""
    profile: int = 0
    """Trace so many steps on each rank, and say where their time and that of the epoch's end went; 0 does not."""
    wandb_entity: str = ""
    """User or team on W&B; unset takes WANDB_ENTITY, else your own."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Training, Recipe, Augmentation, Output, Resuming, Wandb, EvalConfig):
    """Train a YOLO detector on one process or many. The defaults are Ultralytics' recipe."""

    task: ClassVar[str] = "detect"  # as Ultralytics names it; its script is train/<task>.py

    @property
    def used_trackers(self) -> list[str]:
        """The trackers without `none`."""
        return [name for name in self.trackers if name != "none"]

    def faults(self) -> list[str]:
        """Every value that cannot work, one sentence each, with the flag to change."""
        faults = super().faults() + outside(self, 1, math.inf, "epochs", "nbs", "patience")
        faults += outside(self, 1, 100_000, "batch") + outside(self, 0, 2**32 - 1, "seed")  # what NumPy takes
        faults += outside(self, 1, math.inf, "val_interval") + outside(self, 0, 1000, "profile")
        faults += outside(self, 0, math.inf, "lr0", "lrf", "weight_decay", "warmup_epochs", "warmup_bias_lr")
        faults += outside(self, 0, math.inf, "close_mosaic", "box", "cls", "dfl", "degrees", "shear")
        faults += outside(self, 0, 0.9999, "momentum", "warmup_momentum", "multi_scale")
        faults += outside(self, 0, 1, "hsv_h", "hsv_s", "hsv_v", "translate", "scale", "flipud", "fliplr", "bgr")
        faults += outside(self, 0, 1, "mosaic", "mixup", "cutmix", "copy_paste", "cls_pw")
        faults += outside(self, 0, 0.001, "perspective") + outside(self, ABOVE_0, math.inf, "fraction")
        faults += outside(self, ABOVE_0, math.inf, "cache_limit")
        if self.time is not None:
            faults += outside(self, ABOVE_0, math.inf, "time")
        if isinstance(self.save_interval, int) and self.save_interval < 1:
            faults.append(
                f"--save-interval is {self.save_interval}; it must be 1 or more steps, or a time such as 15m."
            )
        for name, value in (("save_interval", self.save_interval), ("time_limit", self.time_limit)):
            if isinstance(value, str) and value and not seconds_of(value):
                faults.append(f"--{name.replace('_', '-')} is {value!r}; a time is written 11h30m, 90m or 45s.")
        if self.rect and self.multi_scale:
            faults.append("--rect and --multi-scale contradict each other: both set the shape of a batch.")
        if self.compile and (self.rect or self.multi_scale):
            faults.append(
                "--compile goes with batches of one size: it would compile anew, for a minute, at each other."
            )
        if not self.name.strip():
            faults.append("--name is empty; it must name the run's folder.")
        if "none" in self.trackers and len(self.trackers) > 1:
            faults.append(f"--trackers is {list(self.trackers)}; name trackers or `none`, not both.")
        return faults


@dataclass(frozen=True, kw_only=True)
class Oks:
    """How near a keypoint must be."""

    sigmas: tuple[float, ...] | None = None
    """OKS sigma of each keypoint; unset takes the data YAML's `kpt_oks_sigmas`, else COCO's for its 17, else 1/n."""


@dataclass(frozen=True, kw_only=True)
class Evaluating:
    """What to evaluate."""

    weights: str = ""
    """The checkpoint to evaluate, which says how it was validated, or a run's folder, whose best.pt is meant."""
    data: str = ""
    """The data set, as in training; unset takes the one that the checkpoint was trained on."""
    imgsz: int = 640
    """Image size in pixels; unset takes the one that the checkpoint was trained at."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """Files to read and to write. They count from the command line alone."""

    predictions: str = ""
    """Instead of a checkpoint: a COCO results file from anywhere, to be measured on --data or --annotations."""
    save_dir: str = ""
    """Folder for metrics, predictions and truth as JSON, and pictures; unset makes runs/<task>/val, val2, …"""


@dataclass(frozen=True, kw_only=True)
class ValConfig(Evaluating, Files, Oks, EvalConfig):
    """Evaluate a YOLO checkpoint, or a file of detections, with COCO's metric on one process or many."""

    def faults(self) -> list[str]:
        """Every value that cannot work, one sentence each, with the flag to change."""
        faults = super().faults()
        if bool(self.weights) == bool(self.predictions):
            faults.append("Name what to evaluate: either --weights, a checkpoint, or --predictions, a results file.")
        if self.predictions and not (self.data or self.annotations):
            faults.append("--predictions needs --data, the data set, or --annotations, a COCO annotation file.")
        return faults
