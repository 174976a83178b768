"""The built-in data sets: circles, squares and triangles on textured backgrounds, so that everything runs offline.

The same images with boxes, with polygons, or with keypoints: the points of an outline that are furthest up, right, down
and left.
"""

import os
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np

from train.config.objects import Carries

NAMES = ("circle", "square", "triangle")
SIZES = ((240, 240), (192, 256), (256, 192), (160, 288), (224, 256))  # height, width
SPLITS = {"train": 512, "val": 256}
YAML = """# Drawn by train/data/shapes.py
train: images/train
val: images/val
names:
  0: circle
  1: square
  2: triangle
"""
SETS: dict[Carries, tuple[str, str]] = {  # name of the data set, and what its YAML says beside
    "boxes": ("shapes", ""),
    "polygons": ("shapes-seg", ""),
    "keypoints": ("shapes-pose", "kpt_shape: [4, 3]\nflip_idx: [0, 3, 2, 1]\nkpt_names: [top, right, bottom, left]\n"),
}


def draw_shapes(folder: Path, splits: dict[str, int] | None = None, seed: int = 0, carries: Carries = "boxes") -> Path:
    """Draw a data set once under `folder`, in shapes/, shapes-seg/ or shapes-pose/, and return its data YAML.

    The same seed gives the same images. The folder appears whole or not at all.

    Args:
        folder: where the data set's folder goes.
        splits: number of images by split; by default 512 train, 256 val.
        seed: seed of all that is drawn.
        carries: what its labels consist of.
    """
    name, more = SETS[carries]
    done = folder / name
    if not (done / f"{name}.yaml").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".shapes-", dir=folder))
        try:
            for number, (split, images) in enumerate((splits or SPLITS).items()):
                for kind in ("images", "labels"):
                    (draft / kind / split).mkdir(parents=True)
                for i in range(images):
                    _write(draft, split, i, np.random.default_rng([seed, number, i]), carries)
            (draft / f"{name}.yaml").write_text(YAML + more)
            draft.chmod(0o755)  # mkdtemp makes folders for the user alone
            if not done.exists():  # else another run has been faster
                os.rename(draft, done)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return done / f"{name}.yaml"


def _write(folder: Path, split: str, i: int, rng: np.random.Generator, carries: Carries) -> None:
    """Draw image i and write it with its labels."""
    height, width = SIZES[rng.integers(len(SIZES))]
    image = _background(height, width, rng)
    rows = []
    objects = 0 if rng.random() < 0.06 else int(rng.integers(1, 7))
    taken: list[tuple[float, float, float]] = []
    for _ in range(objects):
        radius = rng.uniform(10, 42)
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        if any(np.hypot(x - x2, y - y2) < 0.8 * (radius + r2) for x2, y2, r2 in taken):
            continue  # objects may touch, not hide each other
        taken.append((x, y, radius))
        kind = int(rng.integers(len(NAMES)))
        points = _polygon(kind, radius, rng) + np.array([x, y])
        colour = rng.integers(0, 256, 3).tolist()
        cv2.fillPoly(image, [np.round(points * 16).astype(np.int32)], colour, cv2.LINE_AA, shift=4)
        points = np.clip(points / (width, height), 0, 1)
        rows.append(f"{kind} {' '.join(f'{value:.6f}' for value in _label(points, carries))}\n")
    cv2.imwrite(str(folder / "images" / split / f"{i:06d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 92])
    (folder / "labels" / split / f"{i:06d}.txt").write_text("".join(rows))


def _label(outline: np.ndarray, carries: Carries) -> list[float]:
    """The numbers of an object with this outline (k, 2), normalised, as a row of a label file has them."""
    if carries == "polygons":
        return outline.ravel().tolist()
    (x1, y1), (x2, y2) = outline.min(0), outline.max(0)
    box = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
    if carries == "boxes":
        return box
    x, y = outline.T
    return [*box, *(value for i in (y.argmin(), x.argmax(), y.argmax(), x.argmin()) for value in (*outline[i], 2.0))]


def _background(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth two-colour gradient under coarse and fine noise, (height, width, 3) uint8 BGR."""
    ends = rng.uniform(0, 255, (2, 2, 3)).astype(np.float32)
    canvas = cv2.resize(ends, (width, height), interpolation=cv2.INTER_LINEAR)
    for cell, strength in ((32, 40), (6, 18), (1, 8)):
        noise = rng.normal(0, strength, (height // cell + 1, width // cell + 1, 3)).astype(np.float32)
        canvas = canvas + cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _polygon(kind: int, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Corners (k, 2) of a shape around the origin: a circle as 36 corners, a turned square, a turned triangle."""
    corners = (36, 4, 3)[kind]
    angles = rng.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1)
