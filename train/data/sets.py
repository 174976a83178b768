"""Data sets: in which order images are served, and how they are augmented.

Training order is a pure function: which image stands at position p of epoch e, and how it is augmented down to the
pixels, follow from (seed, epoch, p), and whether mosaic is closed, alone. Validation batches follow from the data set,
imgsz and the batch alone. Neither knows the number of processes or workers, so both are the same for any.
"""

import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from ultralytics.cfg import get_cfg
from ultralytics.data.augment import Albumentations, Compose, v8_transforms
from ultralytics.data.dataset import YOLODataset

from train.config.errors import InputError
from train.config.objects import Carries, Objects
from train.config.options import Augmentation, EvalConfig, TrainConfig, ValConfig
from train.config.task_options import Masks
from train.data.formats import ImageLabels, with_visibility
from train.data.imagecache import ImageCache
from train.data.labels import Labels
from train.data.transforms import faster

PAUSES = (0.1, 1.0, 5.0)  # seconds before an image that cannot be read is tried again
PAD = 0.5  # of a stride, that validation images are padded by at least
LOST = 4  # images one after the other that cannot be read, which end the run
GROUP = 16  # positions whose images are each other's mosaic partners


class _Same:
    """A sequence of one value: what Ultralytics' data set keeps of its images, where nothing is kept."""

    def __init__(self, value: Any):
        self.value = value

    def __getitem__(self, i: int) -> Any:
        return self.value


class _Files:
    """Paths of the images, each made when it is asked for."""

    def __init__(self, labels: Labels):
        self.labels = labels

    def __getitem__(self, i: int) -> str:
        return self.labels.file(i)


class _Targets:
    """The labels in Ultralytics' form, each made when it is asked for.

    Args:
        labels: of the images.
        keypoints: number and dimensions of an object's keypoints, where these are wanted.
    """

    def __init__(self, labels: Labels, keypoints: tuple[int, ...]):
        self.labels, self.keypoints = labels, keypoints

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        entry = self.labels[i]
        return {
            "im_file": entry.im_file,
            "shape": entry.shape,
            "cls": entry.cls.astype(np.float32).reshape(-1, 1),
            "bboxes": entry.boxes.astype(np.float32),
            "segments": [segment.astype(np.float32) for segment in entry.segments],
            "keypoints": self._keypoints(entry) if self.keypoints else None,
            "normalized": True,
            "bbox_format": "xywh",
        }

    def _keypoints(self, entry: ImageLabels) -> np.ndarray:
        """(objects, keypoints, 3) float32: x, y normalised, and whether it is visible."""
        found = np.array(entry.keypoints, np.float32).reshape(-1, *self.keypoints)
        return with_visibility(found)


class Unreadable(InputError):
    """An image that could be read when the run began."""


class Images(YOLODataset):
    """Ultralytics' data set over labels that are already read: it lists nothing, caches nothing, writes nothing.

    Ultralytics' constructor, which makes lists of all images and labels in each process, is passed over.

    Args:
        labels: of the images.
        objects: of the data set.
        imgsz: that the longer side of an image is scaled to, px.
        hyp: Ultralytics' hyperparameters, with the augmentation.
        carries: whether samples have masks or keypoints, too.
    """

    def __init__(self, labels: Labels, objects: Objects, imgsz: int, hyp: Any, carries: Carries):
        self.scanned, self.imgsz, self.channels = labels, imgsz, objects.channels
        self.data: dict[str, Any] = {"names": objects.names, "channels": objects.channels}
        self.data |= {"kpt_shape": [*objects.keypoints], "flip_idx": [*objects.flip_idx]}
        self.cv2_flag = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR}.get(self.channels, cv2.IMREAD_UNCHANGED)
        self.use_segments, self.use_keypoints = (carries == kind for kind in ("polygons", "keypoints"))
        self.im_files = _Files(labels)
        self.labels = _Targets(labels, objects.keypoints if self.use_keypoints else ())
        self.rect = self.augment = self.use_obb = False
        more: dict[Carries, tuple[str, ...]] = {"polygons": ("masks", "sem_masks"), "keypoints": ("keypoints",)}
        self.keys = ("im_file", "img", "cls", "bboxes", "batch_idx", *more.get(carries, ()))  # of a sample
        self.prefix, self.cache = "", None
        # Ultralytics reads, rewrites and removes .npy files beside the images; these cannot exist.
        self.ims, self.npy_files = _Same(None), _Same(Path(os.devnull) / "none")
        self.cached: ImageCache | None = None  # decoded images, where there are such
        self.transforms = self.build_transforms(hyp)

    def decode(self, i: int) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
        """An image as it is in its file, BGR (height, width, channels), its longer side scaled to imgsz; height and
        width in the file; height and width here.

        Raises:
            FileNotFoundError: it cannot be read, which is what Ultralytics makes of all reasons.
            InputError: it has other channels than the data YAML says.
        """
        loaded = super().load_image(i)
        if loaded[0].shape[2] != self.channels:
            found = f"{self.im_files[i]} has {loaded[0].shape[2]} channels"
            raise InputError(f"{found}, but the data YAML says channels: {self.channels}.")
        return loaded

    def load_image(self, i: int, *args: Any, **kwargs: Any) -> tuple:
        """The decoded image, from the cache where it is in there. It is not to be written to.

        What the scan has found readable is tried again: a network disk may be away for a moment.

        Raises:
            Unreadable: it stays so.
        """
        assert not args
        assert not kwargs
        row = int(self.scanned.rows[i])
        if self.cached is not None and (image := self.cached.image(row)) is not None:
            height, width = self.scanned.source.shapes[row].tolist()
            return image, (height, width), image.shape[:2]
        for pause in (*PAUSES, None):
            try:
                return self.decode(i)
            except FileNotFoundError:  # what Ultralytics makes of any image that cannot be read
                if pause is None:
                    raise Unreadable(
                        f"{self.im_files[i]} can no longer be read, as it could when the run began. Mend the disk or "
                        "the file and go on with --resume; a file that is gone or broken is left out from then on."
                    ) from None
                time.sleep(pause)
        raise AssertionError

    def get_image_and_label(self, index: int) -> dict[str, Any]:
        """An image and its labels, as Ultralytics' method gives them; that one copies labels, which are new here."""
        label = self.labels[index]
        del label["shape"]
        label["img"], label["ori_shape"], label["resized_shape"] = self.load_image(index)
        (height, width), (full_height, full_width) = label["resized_shape"], label["ori_shape"]
        label["ratio_pad"] = height / full_height, width / full_width
        if self.rect:
            label["rect_shape"] = self.batch_shapes[self.batch[index]]
        return self.update_labels_info(label)


class _Partners:
    """What Ultralytics' mixing transforms take for the data set: the images they may draw partners from.

    They draw with `random.randint(0, len(dataset) - 1)`; here that is an index into the sample's group.
    """

    cache = "ram"  # tells Mosaic to draw from all of the data set, not from a buffer of what was loaded lately

    def __init__(self, dataset: "TrainSet"):
        self.dataset, self.data, self.indices = dataset, dataset.data, [0]

    def __len__(self) -> int:
        return len(self.indices)

    def get_image_and_label(self, i: int) -> dict[str, Any]:
        return self.dataset.get_image_and_label(self.indices[i])


class TrainSet(Images):
    """Augmented training images by (epoch, position); see the module's first lines."""

    def __init__(self, labels: Labels, objects: Objects, config: TrainConfig, stride: int = 32):
        if config.rect:
            config = replace(config, mosaic=0.0, mixup=0.0, cutmix=0.0)
        self.config, self._stride = config, stride
        if config.rect:
            self._ratios = labels.shapes[:, 0] / labels.shapes[:, 1]  # height / width
        self._decoded: dict[int, tuple] = {}
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, int))
        self.lost: set[int] = set()  # images that can no longer be read, as far as this process knows
        super().__init__(labels, objects, config.imgsz, hyperparameters(config), labels.carries)

    def build_transforms(self, hyp: Any) -> Compose:
        """Ultralytics' training transforms for the open epochs; also sets the ones for the last, closed epochs."""
        self.partners = _Partners(self)
        closed = replace(self.config, mosaic=0.0, mixup=0.0, cutmix=0.0, copy_paste=0.0)
        self.closed_transforms = self._transforms(hyperparameters(closed))
        transforms = self._transforms(hyp)
        steps = (*transforms.transforms, *self.closed_transforms.transforms)
        self.albumentations = any(isinstance(step, Albumentations) and step.transform is not None for step in steps)
        return transforms

    def _transforms(self, hyp: Any) -> Compose:
        if not self.flips:
            hyp.fliplr = hyp.flipud = 0.0
        transforms = v8_transforms(self.partners, self.imgsz, hyp)
        transforms.append(
            self.format_class(
                bbox_format="xywh",
                normalize=True,
                return_mask=self.use_segments,
                return_keypoint=self.use_keypoints,
                mask_ratio=hyp.mask_ratio,
                mask_overlap=hyp.overlap_mask,
                batch_idx=True,
                bgr=hyp.bgr,
            )
        )
        return faster(transforms)

    @property
    def flips(self) -> bool:
        """Whether images may be flipped: keypoints only where the data set says which one becomes which."""
        return not self.use_keypoints or bool(self.data["flip_idx"])

    def order(self, epoch: int) -> np.ndarray:
        """Image index by position. A set smaller than the batch is repeated until it fills one."""
        if self._order[0] != epoch:
            rng, batch = np.random.default_rng([self.config.seed, epoch]), self.config.batch
            order = np.concatenate([rng.permutation(len(self)) for _ in range(math.ceil(batch / len(self)))])
            order = order[: max(batch, len(self))].astype(np.int32)  # each rank and worker has one
            if self.config.rect:  # batches of neighbours by aspect ratio, in another order each epoch
                order = order[np.argsort(self._ratios[order], kind="stable")]
                batches = len(order) // batch
                first = int(rng.integers(len(order) - batches * batch + 1))  # the remainder that is dropped varies
                order = rng.permutation(order[first : first + batches * batch].reshape(batches, batch)).ravel()
            self._order = epoch, order
        return self._order[1]

    def _rect_shape(self, epoch: int, position: int) -> np.ndarray:
        """(height, width) of the batch that a position belongs to: Ultralytics' rule over the batch's aspect ratios."""
        start = position // self.config.batch * self.config.batch
        ratios = self._ratios[self.order(epoch)[start : start + self.config.batch]]
        low, high = ratios.min(), ratios.max()
        shape = (high, 1.0) if high < 1 else (1.0, 1 / low) if low > 1 else (1.0, 1.0)
        return np.ceil(np.array(shape) * self.config.imgsz / self._stride).astype(int) * self._stride

    def group(self, epoch: int, position: int) -> np.ndarray:
        """Images of the aligned group of 16 positions; the last group reaches back so that it is full too."""
        order = self.order(epoch)
        start = max(min(position // GROUP * GROUP, len(order) - GROUP), 0)
        return order[start : start + GROUP]

    def load_image(self, i: int, *args: Any, **kwargs: Any) -> tuple:
        """Decode each image once for a batch. No transform writes into it; a warp gives each its own memory."""
        loaded = self._decoded.get(i) or super().load_image(i, *args, **kwargs)
        if self.cached is None:
            self._decoded[i] = loaded
        return loaded

    def get_image_and_label(self, index: int) -> dict[str, Any]:
        """An image and its labels. In the place of one that can no longer be read stands the next of the data set that
        can, wherever it is drawn: so order and counts are the same for any number of processes.

        Raises:
            Unreadable: with --strict, or where LOST of them follow each other: then it is the disk.
        """
        failed = 0
        while True:
            if index not in self.lost:
                try:
                    return super().get_image_and_label(index)
                except Unreadable:
                    failed += 1
                    if self.config.strict or failed == min(LOST, len(self)):
                        raise
                    self.lost.add(index)
            index = (index + 1) % len(self)

    def __getitem__(self, key: tuple) -> dict[str, Any]:  # type: ignore[override]
        """The sample at (epoch, position); the key says, too, whether mosaic is closed, and which images are lost.

        `lost` of the sample are images that are lost, and of which the key does not know.
        """
        epoch, position, closed, known = key if len(key) == 4 else (*key, ())
        self.lost.update(known)
        # Ultralytics' transforms draw from the global generators of random and numpy.
        seed = int(np.random.SeedSequence([self.config.seed, epoch, position]).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # Ultralytics seeds Albumentations from torch's initial seed
        self.partners.indices = self.group(epoch, position).tolist()
        index = int(self.order(epoch)[position])
        transforms = self.closed_transforms if closed else self.transforms
        label = self.get_image_and_label(index)
        if self.config.rect:
            label["rect_shape"] = self._rect_shape(epoch, position)
        sample = transforms(label)
        lost = sorted(self.lost.difference(known))
        return {key: sample[key] for key in self.keys} | {"lost": lost}

    def __getitems__(self, keys: list[tuple]) -> list[dict[str, Any]]:
        """The samples of one batch."""
        self._decoded.clear()
        return [self[key] for key in keys]


class ValSet(Images):
    """Validation images, each letterboxed to the shape that Ultralytics gives it at batch 1, or to a square.

    Ultralytics sets the padded shape for a block of images of similar aspect ratio, so it moves with the batch size.
    With blocks of one image it depends on that image and imgsz alone.

    Args:
        labels: of the images.
        objects: of the data set.
        config: image size and shape, and in a training how masks are made for the loss.
        stride: of the model.
        judged: whether a loss is computed of them.
    """

    def __init__(
        self, labels: Labels, objects: Objects, config: TrainConfig | ValConfig, stride: int, judged: bool = True
    ):
        super().__init__(labels, objects, config.imgsz, hyperparameters(config), labels.carries if judged else "boxes")
        self.rect, self.ids = config.rect is not False, labels.ids
        if self.rect:
            self.batch, self.batch_shapes = range(len(labels)), _padded(labels.shapes, self.imgsz, stride)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The letterboxed image with its labels, its id, original shape, and the (gain, padding) that scaled it."""
        sample = super().__getitem__(index)
        return {name: sample[name] for name in (*self.keys, "ori_shape", "ratio_pad")} | {"id": int(self.ids[index])}

    def batches(self, batch: int) -> list[list[int]]:
        """Batches of images of one shape, most pixels first: dealt to the ranks in turn, the shares come out even."""
        shapes = self.batch_shapes if self.rect else np.full((len(self), 2), self.imgsz)
        by_shape = defaultdict(list)
        for index in np.argsort(self.ids, kind="stable").tolist():
            by_shape[tuple(shapes[index].tolist())].append(index)
        chunks = [(h * w, part) for (h, w), all_ in by_shape.items() for part in _chunks(all_, batch)]
        return [part for _, part in sorted(chunks, key=lambda chunk: (-chunk[0] * len(chunk[1]), chunk[1]))]


def _padded(shapes: np.ndarray, imgsz: int, stride: int) -> np.ndarray:
    """(n, 2) height, width that images of these shapes are padded to: Ultralytics' rule for batches of one."""
    ratios = shapes[:, 0] / shapes[:, 1]
    sides = np.ones((len(shapes), 2))
    sides[ratios < 1, 0] = ratios[ratios < 1]
    sides[ratios > 1, 1] = 1 / ratios[ratios > 1]
    return np.ceil(sides * imgsz / stride + PAD).astype(int) * stride


def _chunks(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def hyperparameters(config: EvalConfig) -> Any:
    """Ultralytics' hyperparameter namespace with this run's augmentation, and how it makes masks, as far as it does."""
    names = {field.name for group in (Augmentation, Masks) for field in fields(group)}
    return get_cfg(overrides={name: value for name, value in vars(config).items() if name in names})
