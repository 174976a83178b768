"""Which source may set which option, and which may differ between the machines or the attempts of a run."""

from dataclasses import asdict, fields
from typing import Any

from train.config.options import (
    Augmentation,
    Computing,
    Data,
    Evaluating,
    Logging,
    Oks,
    Output,
    Recipe,
    TrainConfig,
    Training,
    Validation,
    Wandb,
)
from train.config.task_options import Keypoints, Masks, PoseConfig, SegmentConfig

# Which options each source may set. What is not listed counts from the command line alone: it runs code, or names a
# place that is written over or appended to. `project` and `name` only ever make new folders.
FROM_FILE = frozenset(
    field.name
    for group in (
        Training, Recipe, Augmentation, Masks, Keypoints, Oks, Output, Wandb, Evaluating, Data, Validation, Computing,
        Logging,
    )
    for field in fields(group)
)  # fmt: skip
# What may differ between the machines of a run: where things are, and what concerns one process or machine alone.
OF_A_MACHINE = frozenset({
    "data", "annotations", "model", "weights", "predictions", "project", "save_dir", "log_file", "resume", "workers",
    "index_dir", "index_check", "cache", "cache_limit", "progress", "log_level", "hang_timeout", "trust_checkpoint",
    *(field.name for field in fields(Wandb)), "wandb_entity",
})  # fmt: skip
# What may change when a run is gone on with: its length, and what belongs to the machine or only to what validation
# costs (precision, --compile and --compress-gradients round otherwise). The data set may have moved; what is in it is
# compared with what the run has been trained on.
MAY_CHANGE = frozenset({
    "epochs", "workers", "save_interval", "save_period", "time_limit", "plots", "profile", "trackers",
    "mixed_precision", "val_precision", "channels_last", "val_interval", "val_batch", "coco_eval", "project", "name",
    "resume", "data", "annotations", "index_dir", "index_check", "cache", "cache_limit", "trust_checkpoint", "log_file",
    "wandb_entity", "compile", "compress_gradients",
    *(field.name for field in fields(Wandb)),
    *(field.name for field in fields(Logging)),
})  # fmt: skip
# A checkpoint says what it was validated with. A subset is an economy of its training; the rest belongs to the machine.
FROM_CHECKPOINT = frozenset({
    "data", "imgsz", "split", "annotations", "classes", "single_cls", "val_batch", "rect", "conf", "iou", "max_det",
    "max_dets", "end2end", "mixed_precision", "channels_last", "sigmas",
})  # fmt: skip
DEFAULTS = asdict(SegmentConfig()) | asdict(PoseConfig()) | asdict(TrainConfig())  # of the options of all tasks


def differences(own: dict[str, Any], theirs: dict[str, Any], may: frozenset[str] = frozenset()) -> list[str]:
    """Options that are not the same, but for those that may differ; what neither names is at its default.

    Args:
        own, theirs: options by name.
        may: names of options that may differ.
    """
    return [
        name
        for name, default in DEFAULTS.items()
        if name not in may and _plain(own.get(name, default)) != _plain(theirs.get(name, default))
    ]


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return [*value] if isinstance(value, tuple) else value
