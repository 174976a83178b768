"""What the image files of a data set are, and which are copies of others: looked at once, and kept beside the index."""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import imagehash
import numpy as np
import torch
from PIL import ExifTags, Image

import train
from train.data.arrays import fault_of, open_arrays, remove_unused, write_arrays
from train.data.formats import check_regular
from train.data.index import Index
from train.data.scan import Counted, by_workers, spread

VERSION = 2  # of what is looked at
BITS = 256  # of a perceptual hash
# Bits in which copies differ at most: of coco128 at half its size and JPEG quality 50 it is 10; of other photos 100,
# and of crops to four fifths 108, are the least.
APART = 20
NEAREST = 8  # earlier images that one is compared with by their pixels: those whose hashes are nearest
SIDE = 48  # px, of both sides, at which they are compared
# Levels of brightness or colour (YCrCb) by which a pixel of copies then differs at most, beyond a quarter of the range
# around it, for which being scaled with half a pixel less is enough. Of coco128 at quality 50 they are 4.8 at most, at
# half its size as well 16.3, and half of them 5.8. Of two frames of one camera, which are these images with a square of
# any colour at two places, they are 27.3 at least where it has 32 px, and half of them 98; of 24 px 24.8 and 95; of 16
# px 15.3 of one in 128, 25 of the next, and 73. The hashes are near of 92, 112 and 126 in 128 of these.
LEVELS = 20
DECODED = 128  # px: a JPEG is decoded at the fraction that is just larger, which is four times as fast
FORMATS = ("", "JPEG", "MPO", "PNG", "BMP", "TIFF", "WEBP", "GIF", "DNG", "PFM", "JPEG2000", "HEIF", "AVIF", "other")
ENDINGS = {
    "JPEG": ("jpg", "jpeg", "mpo"),
    "MPO": ("jpg", "jpeg", "mpo"),
    "PNG": ("png",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff", "dng"),
    "WEBP": ("webp",),
    "DNG": ("dng",),
    "PFM": ("pfm",),
    "JPEG2000": ("jp2", "jpeg2000"),
    "HEIF": ("heic", "heif"),
    "AVIF": ("avif",),
}
NO_MARK = np.zeros(BITS // 8, np.uint8)
BLOCK, ROWS = 128, 256  # images that a worker looks at, or whose hashes are compared with all before, at a time


Look = tuple[list[int], np.ndarray, int, int, str]


class Looks:
    """What there is to say of the images of a split, by row of its index.

    Args:
        arrays: `bytes` (n, 16) uint8, a hash of the file; `marks` (n, 32) uint8, a perceptual hash; `formats` (n,)
            uint8 places in FORMATS; `turned` (n,) uint8 EXIF orientation, 0 or 1 where there is none; `told` JSON:
            (row, sentence) of those that cannot be decoded as a whole.
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.bytes, self.marks = arrays["bytes"], arrays["marks"]
        self.formats, self.turned = arrays["formats"], arrays["turned"]
        self.faults: dict[int, str] = dict(json.loads(arrays["told"].tobytes() or b"[]"))


def look_at(index: Index, folder: Path, counted: Counted) -> Looks:
    """Look at the images of a split, or at what has been kept of them; their names, sizes and times have just been
    compared.

    Args:
        index: of the split.
        folder: where it is kept.
        counted: is given what is done for each image and their number, and shows how far it has come.
    """
    file = folder / f"{index.pictures}.looks{VERSION}"
    if not fault_of(file):
        with contextlib.suppress(OSError):  # another user's
            os.utime(file)  # it is in use
        return Looks(open_arrays(file)[0])
    read = [*spread(by_workers(_Blocks(index)), len(index), counted)]
    arrays = {name: np.concatenate([block[name] for block in read]) for name in read[0] if name != "told"}
    told = [[first + row, text] for first, block in _starts(read) for row, text in block["told"]]
    arrays["told"] = np.frombuffer(json.dumps(told).encode(), np.uint8)
    for place in (file, Path(train.scratch.name) / file.name):
        try:
            write_arrays(place, arrays, {})
            break
        except OSError:  # it is looked at again next time
            continue
    remove_unused(file, "*.looks*")
    return Looks(arrays)


def _starts(blocks: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """The blocks with the rows that they begin at."""
    ends = np.cumsum([len(block["formats"]) for block in blocks]).tolist()
    return [*zip([0, *ends], blocks, strict=False)]


class _Blocks(Sequence[dict[str, Any]]):
    """What is seen of an index's images, when it is asked for, a block at a time."""

    def __init__(self, index: Index):
        self.images = index

    def __len__(self) -> int:
        return -(-len(self.images) // BLOCK)

    def __getitem__(self, i: Any) -> Any:
        if i >= len(self):
            raise IndexError(i)
        first = i * BLOCK
        seen = [_look(self.images.file(row)) for row in range(first, min(first + BLOCK, len(self.images)))]
        return {
            "bytes": np.array([one[0] for one in seen], np.uint8),
            "marks": np.array([one[1] for one in seen], np.uint8),
            "formats": np.array([one[2] for one in seen], np.uint8),
            "turned": np.array([one[3] for one in seen], np.uint8),
            "told": [[row, one[4]] for row, one in enumerate(seen) if one[4]],
        }


def _look(file: str) -> Look:
    """What is seen of an image file; of one that cannot be read the reason alone."""
    try:
        check_regular(file)
        return _seen(Path(file).read_bytes())
    except OSError as error:
        return [0] * 16, NO_MARK, 0, 0, error.strerror or str(error)


def _seen(data: bytes) -> Look:
    """A hash of a file's bytes, its perceptual hash, format and orientation, and what is wrong with it."""
    digest, mark, kind, turned = [*hashlib.blake2b(data, digest_size=16).digest()], NO_MARK, 0, 0
    try:
        with Image.open(io.BytesIO(data)) as image:
            known = str(image.format)
            kind = FORMATS.index(known) if known in FORMATS else len(FORMATS) - 1
            said = image.getexif().get(ExifTags.Base.Orientation, 0)
            turned = said if isinstance(said, int) and 0 <= said <= 8 else 0
            image.draft("L", (DECODED, DECODED))
            grey = image.convert("L")
            # Of a plain picture it would be the hash of its noise.
            if np.ptp(np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX))) > LEVELS:
                mark = np.packbits(imagehash.phash(grey, hash_size=int(BITS**0.5)).hash)
    # SyntaxError: a broken PNG; ImportError: Ultralytics' Image.open looks for a HEIC plugin where it knows no format
    except (OSError, ValueError, SyntaxError, ImportError, TypeError, Image.DecompressionBombError) as error:
        return digest, mark, kind, turned, str(getattr(error, "strerror", None) or error) or type(error).__name__
    return digest, mark, kind, turned, ""


def copies(looks: Sequence[Looks], file_of: Callable[[int], str]) -> tuple[np.ndarray, np.ndarray]:
    """Which images are copies of others, over all splits, whose rows are counted one after the other.

    Args:
        looks: of the splits.
        file_of: the image of such a row.

    Returns:
        for each image the first that it is a copy of, -1 where it is none; and whether the bytes are the same.
    """
    digests, marks = (np.concatenate([getattr(one, name) for one in looks]) for name in ("bytes", "marks"))
    seen = digests.any(1)
    keys = np.ascontiguousarray(digests).view(f"V{digests.shape[1]}").ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rows = np.arange(len(keys))
    same = first[inverse]
    of = np.where(seen & (same < rows), same, -1)
    exact = of >= 0
    decoded = np.flatnonzero(seen & ~exact & marks.any(1))
    small = lru_cache(10_000)(lambda row: _small(file_of(int(decoded[row]))))
    near = _first_near(marks[decoded], lambda a, b: _alike(small(a), small(b)))
    of[decoded[near >= 0]] = decoded[near[near >= 0]]
    return of, exact


def _first_near(marks: np.ndarray, is_copy: Callable[[int, int], bool]) -> np.ndarray:
    """For each of these hashes (n, bytes) the first before it that differs in at most APART bits, and is of a copy: of
    those the NEAREST are asked for. -1 where none is.
    """
    signs = torch.from_numpy(np.unpackbits(marks, axis=1)).float() * 2 - 1
    found = np.full(len(marks), -1, np.int64)
    for start in range(0, len(marks), ROWS):  # a product of signs is the bits alike less the bits apart
        alike = (signs[start : start + ROWS] @ signs[: start + ROWS].T).numpy()
        near = np.tril(alike >= BITS - 2 * APART, start - 1)
        for row in np.flatnonzero(near.any(1)).tolist():
            before = np.flatnonzero(near[row])
            nearest = before[np.argsort(-alike[row, before], kind="stable")[:NEAREST]]
            found[start + row] = next((i for i in sorted(nearest.tolist()) if is_copy(i, start + row)), -1)
    return found


def _small(file: str) -> np.ndarray | None:
    """An image at SIDE px, as YCrCb; None where it cannot be decoded."""
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, ImportError, TypeError, Image.DecompressionBombError):
        return None
    return cv2.cvtColor(cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2YCrCb)


def _alike(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    """Whether images at SIDE px are copies: no place of them differs by more than LEVELS."""
    if one is None or other is None:
        return False
    around = np.ones((3, 3), np.uint8)
    first, second = (cv2.dilate(some, around) - cv2.erode(some, around) for some in (one, other))
    return bool((cv2.absdiff(one, other) - np.minimum(first, second) / 4 <= LEVELS).all())
