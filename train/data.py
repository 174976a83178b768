"""Data sets in Ultralytics' form: where the files are, what their labels say, and in which order they are served.

Training order is a pure function: which image stands at position p of epoch e, and how it is augmented down to the
pixels, follow from (seed, epoch, p) alone. Validation batches follow from the data set, imgsz and the batch alone.
Neither knows the number of processes or workers, so both are the same for any.
"""

import glob
import hashlib
import json
import math
import os
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch.utils.data import DataLoader
from ultralytics.cfg import get_cfg
from ultralytics.data.augment import Albumentations, Compose, v8_transforms
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import IMG_FORMATS, exif_size, img2label_paths
from ultralytics.utils import ROOT
from ultralytics.utils.ops import segments2boxes

from train.config import EvalConfig, InputError, TrainConfig
from train.processes import local_processes
from train.shapes import draw_shapes

GROUP = 16  # positions whose images are each other's mosaic partners


# Where the files are --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DataFiles:
    """A data YAML, resolved: the images of each split it names, sorted, and the class names."""

    name: str
    root: Path
    names: dict[int, str]
    channels: int
    splits: dict[str, Any]  # train, val, test as the YAML gives them

    def images(self, split: str, fraction: float = 1.0) -> list[str]:
        """Sorted image paths of a split, or the first of them: a share, or a number where `fraction` is above 1.

        Raises:
            InputError: the YAML does not name the split, or what it names is not there or holds no image.
        """
        entries = self.splits.get(split)
        if not entries:
            raise InputError(f"{self.name} names no `{split}` images; add a line `{split}: folder-or-list.txt`.")
        files: list[str] = []
        for entry in entries if isinstance(entries, list) else [entries]:
            path = _located(self.root, entry)
            if os.path.isdir(path):  # unlike pathlib's, these take any string
                files += glob.glob(str(Path(glob.escape(str(path))) / "**" / "*.*"), recursive=True)  # follows links
            elif os.path.isfile(path):
                try:
                    lines = path.read_text(encoding="utf-8-sig").split("\n")
                except ValueError:
                    raise InputError(
                        f"{self.name} says `{split}: {entry}`, but {path} is not a list in UTF-8."
                    ) from None
                files += (_listed(line.strip(), path.parent, self.root) for line in lines if line.strip())
            else:
                raise InputError(f"{self.name} says `{split}: {entry}`, but there is no {path}.")
        files = sorted({file for file in files if file.rpartition(".")[2].lower() in IMG_FORMATS})
        if not files:
            raise InputError(f"{self.name}: no images in {', '.join(str(self.root / e) for e in _as_list(entries))}.")
        return files[: max(1, round(fraction * len(files)))] if fraction <= 1 else files[: round(fraction)]


def _located(root: Path, entry: str) -> Path:
    """The path of a split's entry; like Ultralytics, without a leading ../ where only that is there."""
    path = root / entry
    if entry.startswith("../") and not os.path.exists(path) and os.path.exists(root / entry[3:]):
        return root / entry[3:]
    return path


def _as_list(entries: Any) -> list:
    return entries if isinstance(entries, list) else [entries]


def _listed(line: str, beside: Path, root: Path) -> str:
    """A line of a .txt list: `./` is the list's folder; else absolute, from the working directory or from the root."""
    if line.startswith("./"):
        return str(beside / line[2:])
    if os.path.isabs(line) or os.path.exists(line) or not (root / line).exists():
        return line
    return str(root / line)


def find_data(data: str, single_cls: bool = False) -> DataFiles:
    """Resolve `--data`; nothing in the YAML is executed and nothing is downloaded. Call it on one process: it may draw.

    Raises:
        InputError: no such YAML, a YAML that is not a data set's, or a data set that is not on this machine.
    """
    if data == "shapes":
        data = str(draw_shapes(Path("datasets")))
    path = Path(os.path.expanduser(data))
    if not os.path.isfile(path):
        packaged = ROOT / "cfg" / "datasets" / path.name
        if path.suffix not in (".yaml", ".yml") or str(path) != path.name or not packaged.is_file():
            raise InputError(f"--data is {data!r}, but there is no such file (looked for {path.absolute()}).")
        path = packaged
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} is not YAML that can be read: {error}") from None
    try:
        given = _DataYaml.model_validate(content if isinstance(content, dict) else {})
    except pydantic.ValidationError as error:
        faults = "; ".join(f"`{'.'.join(map(str, e['loc'][:1]))}`: {e['msg'].lower()}" for e in error.errors())
        raise InputError(f"{path} is not a data YAML, which lists train, val and names ({faults}).") from None
    if given.names is None:
        if given.nc is None:
            raise InputError(f"{path} has no `names`; a data YAML lists train, val and the class names.")
        given.names = [f"class_{index}" for index in range(given.nc)]
    pairs = given.names.items() if isinstance(given.names, dict) else enumerate(given.names)
    names = {index: str(name) for index, name in pairs}
    if not names or sorted(names) != list(range(len(names))):
        raise InputError(
            f"{path}: the class indices in `names` are {sorted(names)}; they must go from 0 up, one by one."
        )
    if given.nc is not None and given.nc != len(names):
        raise InputError(f"{path} says nc: {given.nc} but names {len(names)} classes.")
    splits = {name: entries for name in ("train", "val", "test") if (entries := getattr(given, name))}
    root = _root(path, given.path, splits)
    return DataFiles(str(path.absolute()), root, {0: "item"} if single_cls else names, given.channels, splits)


class _DataYaml(pydantic.BaseModel):
    """What is read of a data YAML; everything else in it is left alone."""

    path: str | None = None
    train: str | list[str] | None = None
    val: str | list[str] | None = pydantic.Field(
        default=None, validation_alias=pydantic.AliasChoices("val", "validation")
    )
    test: str | list[str] | None = None
    names: dict[int, Any] | list[Any] | None = None
    nc: int | None = pydantic.Field(default=None, ge=1, le=1_000_000)
    channels: int = pydantic.Field(default=3, ge=1)


def _root(path: Path, named: str | None, splits: dict[str, Any]) -> Path:
    """The folder that the splits are relative to: the first candidate that holds one of them."""
    base = Path(os.path.expanduser(named or "."))
    folders = [path.parent, Path.cwd(), Path.cwd() / "datasets", *_ultralytics_datasets()]
    candidates = [base] if base.is_absolute() else [(folder / base).resolve() for folder in folders]
    for candidate in candidates:
        if any(
            os.path.exists(_located(candidate, entry)) for entries in splits.values() for entry in _as_list(entries)
        ):
            return candidate
    looked = ", ".join(str(candidate) for candidate in dict.fromkeys(candidates))
    raise InputError(
        f"The images of {path} ({', '.join(f'{k}: {v}' for k, v in splits.items())}) are not on this machine. "
        f"Looked in {looked}. Put them in one of these folders or mend `path` in the YAML; nothing is downloaded."
    )


def _ultralytics_datasets() -> list[Path]:
    """The data-set folder in the user's Ultralytics settings, which are only read."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    try:
        return [Path(json.loads((Path(base) / "Ultralytics" / "settings.json").read_text())["datasets_dir"])]
    except (OSError, ValueError, KeyError, TypeError):
        return []


# What the labels say --------------------------------------------------------------------------------------------------
@dataclass
class Labels:
    """One image's ground truth as its label file gives it."""

    im_file: str
    image_id: int  # COCO image id
    shape: tuple[int, int]  # height, width in pixels, after EXIF rotation
    cls: np.ndarray  # (n,) class indices
    boxes: np.ndarray  # (n, 4) float64 xywh: centre and size, normalised to the image
    segments: list[np.ndarray]  # (k, 2) polygons, normalised; empty where the file holds boxes


def read_label(text: str, classes: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Parse a YOLO label file: rows of `class x y w h`, or of `class x1 y1 x2 y2 x3 y3 …`.

    Returns classes (n,), boxes (n, 4) float64 xywh normalised, and polygons. Ultralytics' rules are followed: values
    may leave 0 to 1 by 0.01, duplicate rows count once.

    Raises:
        ValueError: what is wrong, with the line number.
    """
    rows, seen = [], set()
    for number, line in enumerate(text.splitlines(), 1):
        if not (fields := line.split()):
            continue
        try:
            row = [float(field) for field in fields]
        except ValueError:
            raise ValueError(f"line {number} is not numbers: {line[:60]!r}") from None
        if len(row) < 5 or (len(row) > 5 and (len(row) < 7 or len(row) % 2 == 0)):
            raise ValueError(f"line {number} has {len(row)} columns; a box has 5, a polygon an odd number from 7")
        if not all(map(math.isfinite, row)):
            raise ValueError(f"line {number} holds a value that is not finite")
        if row[0] % 1 or not 0 <= row[0] < classes:
            raise ValueError(f"line {number} has class {row[0]:g}; there are the classes 0 to {classes - 1}")
        if min(row[1:]) < -0.01 or max(row[1:]) > 1.01 or (len(row) == 5 and min(row[3:]) < 0):
            raise ValueError(f"line {number} has a coordinate outside 0 to 1")
        if tuple(row) not in seen:
            seen.add(tuple(row))
            rows.append(row)
    if not rows:
        return np.zeros(0), np.zeros((0, 4)), []
    polygons = [len(row) > 5 for row in rows]
    if any(polygons) and not all(polygons):
        raise ValueError("the file mixes boxes and polygons")
    segments = [np.array(row[1:]).reshape(-1, 2) for row in rows] if any(polygons) else []
    boxes = segments2boxes(segments) if segments else np.array([row[1:] for row in rows])
    return np.array([row[0] for row in rows]), np.asarray(boxes, dtype=np.float64), segments


def _read_image(im_file: str, label_file: str, image_id: int, classes: int) -> Labels | str:
    """One image's labels, or why it cannot be used. The image is opened, not decoded."""
    try:
        with Image.open(im_file) as image:
            image.verify()
            width, height = exif_size(image)
            jpeg = image.format == "JPEG"
        if jpeg and not _ends_whole(im_file):
            with Image.open(im_file) as image:
                image.load()  # verify() does not see that a JPEG is cut off; bytes behind its end are no fault
        if min(width, height) < 10:
            return f"{im_file}: {width}x{height} px is too small; 10 px is the least"
        try:
            text = Path(label_file).read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            text = ""  # an image without a label file is background
        return Labels(im_file, image_id, (height, width), *read_label(text, classes))
    except UnicodeDecodeError:
        return f"{label_file}: not UTF-8 text"
    except ValueError as error:
        return f"{label_file}: {error}"
    except ImportError:  # Ultralytics' Image.open looks for a HEIC plugin where it knows no format
        return f"{im_file}: not an image of a known format"
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        return f"{im_file}: not a readable image ({error})"


def hash_of(files: list[str]) -> str:
    """A digest of the files' names."""
    return hashlib.sha256("\n".join(files).encode(errors="surrogateescape")).hexdigest()


def _ends_whole(jpeg: str) -> bool:
    """Whether the file ends with JPEG's end-of-image marker."""
    with open(jpeg, "rb") as file:
        file.seek(-2, os.SEEK_END)
        return file.read() == b"\xff\xd9"


def scan(
    files: list[str], names: dict[int, str], config: EvalConfig, accelerator: Accelerator
) -> tuple[list[Labels], list[str]]:
    """Read all labels of a split, each rank a share of them (collective).

    Returns the usable images in the order of `files`, and one sentence for each that is left out. Nothing is written
    to the data folder.
    """
    classes = sys.maxsize if config.single_cls else len(names)
    share = range(accelerator.process_index, len(files), accelerator.num_processes)
    if len(set(gather_object([hash_of(files)]))) > 1:
        raise InputError(f"The machines do not see the same files: here {len(files)} images, first {files[0]}.")
    label_files, ids = img2label_paths(files), image_ids(files)
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        mine = pool.map(lambda i: (i, _read_image(files[i], label_files[i], ids[i], classes)), share)
    found = [
        entry for _, entry in sorted((pair for part in gather_object([mine]) for pair in part), key=lambda p: p[0])
    ]
    usable = [_chosen(entry, config) for entry in found if isinstance(entry, Labels)]
    return usable, [entry for entry in found if isinstance(entry, str)]


def _chosen(entry: Labels, config: EvalConfig) -> Labels:
    """The labels of the chosen classes, as one class where that is asked for."""
    if config.classes is not None:
        keep = np.isin(entry.cls, config.classes)
        segments = [segment for segment, kept in zip(entry.segments, keep, strict=False) if kept]
        entry = replace(entry, cls=entry.cls[keep], boxes=entry.boxes[keep], segments=segments)
    return replace(entry, cls=np.zeros_like(entry.cls)) if config.single_cls else entry


def check_usable(
    name: str, train: list[Labels] | None, val: list[Labels], faults: list[str], strict: bool = False
) -> None:
    """Raise InputError where nothing is left to train on or to validate on, or, if strict, where a file is faulty."""
    if strict and faults:
        raise InputError("--strict, and these files are faulty:\n" + "\n".join(faults))
    reason = f" First of {len(faults)} faults: {faults[0]}" if faults else ""
    if train is not None and not any(len(entry.cls) for entry in train):
        raise InputError(f"{name}: no train image has a usable label.{reason}")
    if not val:
        raise InputError(f"{name}: no val image can be used.{reason}")


def image_ids(files: list[str]) -> list[int]:
    """COCO image ids: the integer file stems where all stems of the split are distinct integers, else the positions.

    A stem that a float64 cannot hold exactly is no integer here: detections travel as rows of float64.
    """
    stems = [Path(file).stem for file in files]
    if all(stem.isdecimal() and stem.isascii() for stem in stems):
        ids = [int(stem) for stem in stems]
        if len(set(ids)) == len(ids) and max(ids) < 2**53:
            return ids
    return list(range(len(files)))


# Data sets ------------------------------------------------------------------------------------------------------------
class _Images(YOLODataset):
    """Ultralytics' data set over labels that are already read: it globs nothing, caches nothing, writes nothing."""

    def __init__(self, labels: list[Labels], names: dict[int, str], channels: int, **options: Any):
        self.scanned = labels
        data = {"names": names, "channels": channels}
        super().__init__([], data=data, task="detect", augment=False, **options)
        # Ultralytics reads, rewrites and removes .npy files beside the images; these cannot exist.
        self.npy_files = [Path(os.devnull) / "none"] * len(self.im_files)

    def get_img_files(self, img_path: Any) -> list[str]:
        """Paths of the images whose labels are known."""
        return [entry.im_file for entry in self.scanned]

    def get_labels(self) -> list[dict]:
        """The labels in Ultralytics' form."""
        return [
            {
                "im_file": entry.im_file,
                "shape": entry.shape,
                "cls": entry.cls.astype(np.float32).reshape(-1, 1),
                "bboxes": entry.boxes.astype(np.float32),
                "segments": [segment.astype(np.float32) for segment in entry.segments],
                "keypoints": None,
                "normalized": True,
                "bbox_format": "xywh",
            }
            for entry in self.scanned
        ]


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


class TrainSet(_Images):
    """Augmented training images by (epoch, position); see the module's first lines."""

    def __init__(
        self, labels: list[Labels], names: dict[int, str], channels: int, config: TrainConfig, stride: int = 32
    ):
        if config.rect:
            config = replace(config, mosaic=0.0, mixup=0.0, cutmix=0.0)
        self.config, self._stride = config, stride
        self._ratios = np.array([entry.shape[0] / entry.shape[1] for entry in labels])  # height / width
        self._decoded: dict[int, tuple] = {}
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, int))
        super().__init__(labels, names, channels, imgsz=config.imgsz, hyp=augmentation(config))

    def build_transforms(self, hyp: Any) -> Compose:
        """Ultralytics' training transforms for the open epochs; also sets the ones for the last, closed epochs."""
        self.partners = _Partners(self)
        closed = replace(self.config, mosaic=0.0, mixup=0.0, cutmix=0.0, copy_paste=0.0)
        self.closed_transforms = self._transforms(augmentation(closed))
        transforms = self._transforms(hyp)
        steps = (*transforms.transforms, *self.closed_transforms.transforms)
        self.albumentations = any(isinstance(step, Albumentations) and step.transform is not None for step in steps)
        return transforms

    def _transforms(self, hyp: Any) -> Compose:
        transforms = v8_transforms(self.partners, self.imgsz, hyp)
        transforms.append(
            self.format_class(bbox_format="xywh", normalize=True, return_mask=False, batch_idx=True, bgr=hyp.bgr)
        )
        return transforms

    def order(self, epoch: int) -> np.ndarray:
        """Image index by position. A set smaller than the batch is repeated until it fills one."""
        if self._order[0] != epoch:
            rng, batch = np.random.default_rng([self.config.seed, epoch]), self.config.batch
            order = np.concatenate([rng.permutation(len(self)) for _ in range(math.ceil(batch / len(self)))])
            order = order[: max(batch, len(self))]
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
        """Decode each image once for a batch. The copy is for transforms that write into the image."""
        if i not in self._decoded:
            self._decoded[i] = super().load_image(i, *args, **kwargs)
        image, *shapes = self._decoded[i]
        return (image.copy(), *shapes)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:  # type: ignore[override]
        """The sample at (epoch, position)."""
        epoch, position = key
        # Ultralytics' transforms draw from the global generators of random and numpy.
        seed = int(np.random.SeedSequence([self.config.seed, epoch, position]).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # Ultralytics seeds Albumentations from torch's initial seed
        self.partners.indices = self.group(epoch, position).tolist()
        index = int(self.order(epoch)[position])
        closed = epoch >= self.config.epochs - self.config.close_mosaic
        transforms = self.closed_transforms if closed else self.transforms
        label = self.get_image_and_label(index)
        if self.config.rect:
            label["rect_shape"] = self._rect_shape(epoch, position)
        sample = transforms(label)
        return {key: sample[key] for key in ("im_file", "img", "cls", "bboxes", "batch_idx")}

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """The samples of one batch."""
        self._decoded.clear()
        return [self[key] for key in keys]


class ValSet(_Images):
    """Validation images, each letterboxed to the shape that Ultralytics gives it at batch 1.

    Ultralytics sets the padded shape for a block of images of similar aspect ratio, so it moves with the batch size.
    With blocks of one image it depends on that image and imgsz alone.
    """

    def __init__(self, labels: list[Labels], names: dict[int, str], channels: int, imgsz: int, stride: int):
        by_file = {entry.im_file: entry.image_id for entry in labels}
        super().__init__(
            labels, names, channels, imgsz=imgsz, hyp=get_cfg(), rect=True, batch_size=1, stride=stride, pad=0.5
        )
        self.ids = [by_file[file] for file in self.im_files]  # Ultralytics has sorted the images by aspect ratio

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The letterboxed image with its id, original shape, and the (gain, padding) that scaled it."""
        sample = super().__getitem__(index)
        return {key: sample[key] for key in ("im_file", "img", "ori_shape", "ratio_pad")} | {"id": self.ids[index]}

    def batches(self, batch: int) -> list[list[int]]:
        """Batches of images of one shape, most pixels first: dealt to the ranks in turn, the shares come out even."""
        by_shape = defaultdict(list)
        for index in sorted(range(len(self)), key=lambda i: self.ids[i]):
            by_shape[tuple(int(side) for side in self.batch_shapes[index])].append(index)
        chunks = [(h * w, part) for (h, w), all_ in by_shape.items() for part in _chunks(all_, batch)]
        return [part for _, part in sorted(chunks, key=lambda chunk: (-chunk[0] * len(chunk[1]), chunk[1]))]


def _chunks(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def augmentation(config: TrainConfig) -> Any:
    """Ultralytics' hyperparameter namespace with this run's augmentation."""
    names = (
        "hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr bgr mosaic mixup cutmix copy_paste"
    )
    return get_cfg(overrides={name: getattr(config, name) for name in names.split()})


# Loaders --------------------------------------------------------------------------------------------------------------
class Positions:
    """Batch sampler: hands out positions of the current epoch, a per-device batch at a time.

    Accelerate deals batch i to rank i % N, so that the ranks' shares of global batch k are neighbours and together the
    positions k·batch to (k+1)·batch. It has no `batch_size` on purpose: Accelerate drops batches of another size.
    """

    def __init__(self, batches: int, batch: int, ranks: int):
        self.batches, self.batch, self.ranks, self.epoch = batches, batch, ranks, 0

    def __len__(self) -> int:
        return self.batches * self.ranks

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch // self.ranks
        for start in range(0, self.batches * self.batch, share):
            yield [(self.epoch, position) for position in range(start, start + share)]


def _loader(dataset: _Images, batch_sampler: Any, config: EvalConfig, accelerator: Accelerator) -> DataLoader:
    workers = min(config.workers, (os.cpu_count() or 1) // local_processes())
    loader: DataLoader = DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=accelerator.device.type == "cuda",
        collate_fn=dataset.collate_fn,
    )
    return accelerator.prepare(loader)


def train_loader(dataset: TrainSet, batches: int, accelerator: Accelerator) -> tuple[DataLoader, Positions]:
    """This rank's training batches, and the sampler whose `epoch` is to be set before each epoch.

    A batch is a dict: `img` uint8 (n, 3, imgsz, imgsz) RGB, `cls` (m, 1), `bboxes` (m, 4) xywh normalised, `batch_idx`
    (m,) the image of each box, `im_file` the paths.
    """
    positions = Positions(batches, dataset.config.batch, accelerator.num_processes)
    return _loader(dataset, positions, dataset.config, accelerator), positions


def val_loader(dataset: ValSet, config: EvalConfig, accelerator: Accelerator) -> DataLoader:
    """This rank's validation batches: whole batches, none padded, none twice; ranks may hold different numbers."""
    return _loader(dataset, dataset.batches(config.val_batch), config, accelerator)


def as_images(batch: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """Images as the model takes them: uint8 0 to 255 to float32 0 to 1, in the model's memory order."""
    return (batch.float() / 255).contiguous(memory_format=memory_format)
