"""Labels for the tests: of a data set, as the scripts read them, or of images that need not be there."""

from collections.abc import Sequence

import numpy as np
from accelerate import Accelerator

from train.config.objects import Carries
from train.config.options import EvalConfig, TrainConfig
from train.data.formats import ImageLabels
from train.data.index import Index, finished, pack
from train.data.labels import Labels, train_labels, val_labels
from train.data.listing import DataFiles
from train.data.scan import read_index


def to_train_on(data: DataFiles, config: TrainConfig, accelerator: Accelerator, carries: Carries = "boxes") -> Labels:
    """The labels that a training reads."""
    index = read_index(data, ("train",), config, accelerator)["train"]
    return train_labels(index, len(data.names), config, carries, config.fraction)


def to_validate_on(data: DataFiles, config: EvalConfig, accelerator: Accelerator, carries: Carries = "boxes") -> Labels:
    """The labels that an evaluation reads."""
    index = read_index(data, (config.split,), config, accelerator)[config.split]
    return val_labels(index, len(data.names), config, carries)


def labels_of(
    read: Sequence[ImageLabels | str], classes: int = 100, base: str = "", carries: Carries = "boxes"
) -> Labels:
    """Labels as if they had been read."""
    files = [entry.im_file if isinstance(entry, ImageLabels) else "" for entry in read]
    files = [file.removeprefix(f"{base}/") if base else file for file in files]
    paths = np.frombuffer("\0".join(files).encode(), np.uint8)
    listed = np.arange(len(read), dtype=np.int32)
    arrays = finished(pack([*read], base), paths, listed, files)
    arrays["ids"] = np.array([entry.image_id if isinstance(entry, ImageLabels) else -1 for entry in read], np.int64)
    shapes = {tuple(points.shape) for entry in read if isinstance(entry, ImageLabels) for points in entry.keypoints}
    return Labels(Index(arrays, base, *shapes), listed, classes, EvalConfig(), carries)
