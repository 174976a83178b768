"""What one image's label file says, or why the image cannot be used."""

import io
import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import BinaryIO

import numpy as np
from PIL import Image
from ultralytics.data.utils import exif_size
from ultralytics.utils.ops import segments2boxes
from ultralytics.utils.patches import imread

LARGEST = 50_000_000  # bytes of a label file
FAR = 2**31  # pixels: no image is as large
HEAD, TAIL, END = 65536, 4096, b"\xff\xd9"  # bytes of a JPEG in which its header, and its end, are looked for
EMPTY = np.zeros(0), np.zeros((0, 4))
Labels = tuple[np.ndarray, np.ndarray, list[np.ndarray]]


@dataclass
class ImageLabels:
    """One image's ground truth as its label file gives it."""

    im_file: str
    image_id: int  # COCO image id
    shape: tuple[int, int]  # height, width in pixels, after EXIF rotation
    cls: np.ndarray  # (n,) class indices
    boxes: np.ndarray  # (n, 4) float64 xywh: centre and size, normalised to the image
    segments: list[np.ndarray]  # (k, 2) polygons, normalised; empty where the file holds boxes
    size: int = 0  # bytes of the image
    keypoints: tuple[np.ndarray, ...] = ()  # (number, 2 or 3) of each box, as the file gives them; empty without


def read_label(text: str, classes: int, keypoints: tuple[int, ...] = ()) -> Labels:
    """Parse a YOLO label file: rows of `class x y w h`, of `class x1 y1 x2 y2 x3 y3 …`, or of a box and its keypoints.

    Returns classes (n,), boxes (n, 4) float64 xywh normalised, and polygons (k, 2), or keypoints where there are such.
    Ultralytics' rules are followed: values may leave 0 to 1 by 0.01, duplicate rows count once.

    Args:
        text: of the file.
        classes: number of classes.
        keypoints: number and dimensions of an object's keypoints; without, long rows are polygons.

    Raises:
        ValueError: what is wrong, with the line number.
    """
    rows: dict[tuple[float, ...], None] = {}
    width = 5 + math.prod(keypoints) if keypoints else 0
    dimensions = keypoints[-1] if keypoints else 0
    for number, line in enumerate(text.splitlines(), 1):
        if not (fields := line.split()):
            continue
        try:
            row = tuple(map(float, fields))
        except ValueError:
            raise ValueError(f"line {number} is not numbers: {line[:60]!r}") from None
        columns = len(row)
        if width and columns != width:
            raise ValueError(f"line {number} has {columns} columns; a box with its keypoints (kpt_shape) has {width}")
        if not width and (columns < 5 or (columns > 5 and (columns < 7 or columns % 2 == 0))):
            raise ValueError(f"line {number} has {columns} columns; a box has 5, a polygon an odd number from 7")
        if not all(map(math.isfinite, row)):
            raise ValueError(f"line {number} holds a value that is not finite")
        if row[0] % 1 or not 0 <= row[0] < classes:
            raise ValueError(f"line {number} has class {row[0]:g}; there are the classes 0 to {classes - 1}")
        places = row[1:5] if width else row[1:]
        if width:
            points = [row[i : i + dimensions] for i in range(5, width, dimensions)]
            if dimensions == 3 and (odd := [point[2] for point in points if point[2] not in (0, 1, 2)]):
                raise ValueError(f"line {number} has a keypoint of visibility {odd[0]:g}; it must be 0, 1 or 2")
            # Keypoints that are not visible may be anywhere; of two dimensions these have negative coordinates.
            seen = [p for p in points if (p[2] if dimensions == 3 else min(p) >= 0)]
            places += tuple(value for point in seen for value in point[:2])
        if (columns == 5 or width) and min(row[3:5]) < 0:
            raise ValueError(f"line {number} has a box of negative width or height")
        if min(places) < -0.01 or max(places) > 1.01:
            raise ValueError(f"line {number} has a coordinate outside 0 to 1")
        rows[row] = None
    if not rows:
        return *EMPTY, []
    if width:
        table = np.array(list(rows))
        return table[:, 0], table[:, 1:5], [*table[:, 5:].reshape(-1, *keypoints)]
    polygons = [len(row) > 5 for row in rows]
    if any(polygons):
        if not all(polygons):
            raise ValueError("the file mixes boxes and polygons")
        segments = [np.array(row[1:]).reshape(-1, 2) for row in rows]
        return np.array([row[0] for row in rows]), np.asarray(segments2boxes(segments), dtype=np.float64), segments
    table = np.array(list(rows))
    return table[:, 0], table[:, 1:], []


def read_image(
    im_file: str, label: str, image_id: int, classes: int, keypoints: tuple[int, ...] = ()
) -> ImageLabels | str:
    """One image's labels from its label file, or why it cannot be used.

    Args:
        im_file: the image.
        label: its label file.
        image_id: COCO image id.
        classes, keypoints: see `read_label`.
    """
    read = read_labelled(im_file, label, lambda _: read_label(label_text(label), classes, keypoints), bool(keypoints))
    return replace(read, image_id=image_id) if isinstance(read, ImageLabels) else read


def read_labelled(
    im_file: str, source: str, labels: Callable[[tuple[int, int]], Labels], keypoints: bool
) -> ImageLabels | str:
    """One image's labels, or why it cannot be used: the loader would refuse it, or what is said of it is wrong.

    Args:
        im_file: the image.
        source: of its labels, as messages name it.
        labels: reads them, given the image's height and width; see `read_label`.
        keypoints: whether there are keypoints.
    """
    try:
        size = check_regular(im_file)
        with open(im_file, "rb") as opened:
            with Image.open(opened) as image:
                image.verify()
                (width, height), kind = exif_size(image), str(image.format)
                baseline = kind in ("JPEG", "MPO") and not image.info.get("progressive")
            if min(width, height) < 10:
                return f"{im_file}: {width}x{height} px is too small; 10 px is the least"
            if not (baseline and is_whole_jpeg(opened)) and (fault := decoding_fault(im_file)):
                return f"{im_file}: not a readable image ({kind}: {fault})"
        cls, boxes, points = labels((height, width))
        segments, marks = ([], tuple(points)) if keypoints else (points, ())
        return ImageLabels(im_file, 0, (height, width), cls, boxes, segments, size, marks)
    except UnicodeDecodeError:
        return f"{source}: not UTF-8 text"
    except ValueError as error:
        return f"{source}: {error}"
    except ImportError:  # Ultralytics' Image.open looks for a HEIC plugin where it knows no format
        heic = im_file.lower().endswith((".heic", ".heif"))
        return f"{im_file}: " + ("HEIC needs: pip install pi-heif" if heic else "not an image of a known format")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        return f"{im_file}: not a readable image ({getattr(error, 'strerror', None) or error})"


def with_visibility(keypoints: np.ndarray) -> np.ndarray:
    """Keypoints (objects, number, 2 or 3) with the third number: of two, those with negative coordinates are not there,
    as in Ultralytics.
    """
    if keypoints.shape[-1] == 3:
        return keypoints
    there = (keypoints >= 0).all(-1, keepdims=True).astype(keypoints.dtype)
    return np.concatenate((keypoints, there), -1)


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


def is_whole_jpeg(file: BinaryIO) -> bool:
    """Whether OpenCV takes a baseline JPEG for sure, in a hundredth of the time that it takes to decode it.

    It refuses one whose header is damaged, and one that ends without its end marker; of all else that is wrong with
    the pixels it makes grey.
    """
    file.seek(0)
    header, length = _header_of(file.read(HEAD))
    if not header or not _decodes(header):
        return False
    file.seek(max(file.seek(0, os.SEEK_END) - TAIL, length))
    return END in file.read()


def _header_of(head: bytes) -> tuple[bytes, int]:
    """What a JPEG is decoded by, as a JPEG of 16 px without pixels, and the length of its header; nothing where that
    does not end in these bytes, or holds what a baseline JPEG has not.
    """
    place, parts = 2, [head[:2]]
    while place + 4 <= len(head) and head[place] == 0xFF:
        marker, end = head[place + 1], place + 2 + int.from_bytes(head[place + 2 : place + 4])
        if marker in (0xC0, 0xC1):  # the frame, with height and width
            parts.append(head[place : place + 5] + b"\0\x10\0\x10" + head[place + 9 : end])
        elif marker in (0xC4, 0xDA, 0xDB, 0xDD, 0xEE):  # Huffman tables, scan, quantization, restarts, colours
            parts.append(head[place:end])
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):  # applications' data and comments
            break
        if marker == 0xDA:
            return (b"".join([*parts, END]), end) if end <= len(head) else (b"", 0)
        place = end
    return b"", 0


@lru_cache(4096)
def _decodes(header: bytes) -> bool:
    """Whether a JPEG's header is sound. Of a data set's images many have the same."""
    try:
        with Image.open(io.BytesIO(header), formats=("JPEG",)) as image:
            image.load()  # by the library that OpenCV has, but silently
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def decoding_fault(file: str) -> str:
    """Why the loader's own decoder refuses an image; empty where it does not."""
    try:
        image = imread(file)
    except Exception as error:  # OpenCV fails in as many ways as there are bytes
        return type(error).__name__
    if image is None:
        return "it cannot be decoded"
    return "" if image.dtype == np.uint8 else f"its values are {image.dtype}, not 8 or 16 bits"
