"""What one image's label file says, or why the image cannot be used."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from ultralytics.data.utils import exif_size
from ultralytics.utils.ops import segments2boxes


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


def read_image(im_file: str, label_file: str, image_id: int, classes: int) -> Labels | str:
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


def _ends_whole(jpeg: str) -> bool:
    """Whether the file ends with JPEG's end-of-image marker."""
    with open(jpeg, "rb") as file:
        file.seek(-2, os.SEEK_END)
        return file.read() == b"\xff\xd9"
