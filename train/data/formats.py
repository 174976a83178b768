"""What one image's label file says, or why the image cannot be used."""

import math
import os
import stat
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image
from ultralytics.data.utils import exif_size
from ultralytics.utils.ops import segments2boxes
from ultralytics.utils.patches import imread

LARGEST = 50_000_000  # bytes of a label file


@dataclass
class Labels:
    """One image's ground truth as its label file gives it."""

    im_file: str
    image_id: int  # COCO image id
    shape: tuple[int, int]  # height, width in pixels, after EXIF rotation
    cls: np.ndarray  # (n,) class indices
    boxes: np.ndarray  # (n, 4) float64 xywh: centre and size, normalised to the image
    segments: list[np.ndarray]  # (k, 2) polygons, normalised; empty where the file holds boxes
    size: int = 0  # bytes of the image


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
    """One image's labels, or why it cannot be used: the loader would refuse it, or its label file is wrong."""
    try:
        size = check_regular(im_file)
        with Image.open(im_file) as image:
            image.verify()
            (width, height), kind = exif_size(image), str(image.format)
            cheap = kind in ("JPEG", "MPO") and not image.info.get("progressive")
        if min(width, height) < 10:
            return f"{im_file}: {width}x{height} px is too small; 10 px is the least"
        if fault := decoding_fault(im_file, cheap):
            return f"{im_file}: not a readable image ({kind}: {fault})"
        return Labels(im_file, image_id, (height, width), *read_label(label_text(label_file), classes), size)
    except UnicodeDecodeError:
        return f"{label_file}: not UTF-8 text"
    except ValueError as error:
        return f"{label_file}: {error}"
    except ImportError:  # Ultralytics' Image.open looks for a HEIC plugin where it knows no format
        heic = im_file.lower().endswith((".heic", ".heif"))
        return f"{im_file}: " + ("HEIC needs: pip install pi-heif" if heic else "not an image of a known format")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        return f"{im_file}: not a readable image ({getattr(error, 'strerror', None) or error})"


def check_regular(file: str) -> int:
    """Bytes of a file; raise OSError where it is not a plain one, nor a link to one: a pipe would hang, a device never
    end.
    """
    found = os.stat(file)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no regular file")
    return found.st_size


def label_text(file: str) -> str:
    """What a label file says; nothing where there is none: an image without a label file is background.

    Raises:
        ValueError: it is no plain file, cannot be read, or is too large.
    """
    try:
        check_regular(file)
        with open(file, "rb") as opened:
            data = opened.read(LARGEST + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from None
    if len(data) > LARGEST:
        raise ValueError(f"larger than {LARGEST // 1_000_000} MB")
    return data.decode("utf-8-sig")


def decoding_fault(file: str, cheap: bool = False) -> str:
    """Why the loader's own decoder refuses an image; empty where it does not.

    Args:
        file: the image.
        cheap: decode at an eighth of its size, in half the time: for baseline JPEGs, of which it refuses the same.
    """
    try:
        image = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_REDUCED_COLOR_8) if cheap else imread(file)
    except Exception as error:  # OpenCV fails in as many ways as there are bytes
        return type(error).__name__
    if image is None:
        return "it cannot be decoded"
    return "" if image.dtype == np.uint8 else f"its values are {image.dtype}, not 8 or 16 bits"
