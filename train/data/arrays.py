"""Arrays in one file that all processes of a machine map, so that they are there once. The format is safetensors.

A file is written under a temporary name and renamed, so it is whole or not there; it keeps a checksum of each array.
"""

import contextlib
import json
import math
import os
import shutil
import struct
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from train.processes.files import DRAFT, whole_file

UNUSED = 30 * 86400.0  # seconds after which what another has taken the place of is removed
OLD = 86400.0  # seconds after which nobody writes a draft any more
CHUNK = 1 << 20  # bytes
KINDS = {"F64": np.float64, "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}


def write_arrays(path: Path, arrays: dict[str, np.ndarray], about: dict[str, str]) -> None:
    """Write the arrays and what there is to say about them; several processes and machines may do it at once.

    Raises:
        OSError: they could not be written; then there is no file, nor a part of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_old_drafts(path.parent)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    sums = {name: zlib.crc32(array.data) if array.size else 0 for name, array in arrays.items()}
    with whole_file(path) as draft:
        draft.touch()
        mode = draft.stat().st_mode  # as the user wants it; safetensors' is for its owner alone
        try:
            save_file(arrays, draft, metadata=about | {"checksums": json.dumps(sums)})
        except SafetensorError as error:  # of which the words alone tell what has happened
            raise OSError(str(error)) from None
        os.chmod(draft, mode)


def _remove_old_drafts(folder: Path) -> None:
    """Remove what writers that were killed have left."""
    for draft in folder.glob(f".*{DRAFT}"):
        with contextlib.suppress(OSError):  # another run is faster
            if time.time() - draft.stat().st_mtime > OLD:
                if draft.is_dir():
                    shutil.rmtree(draft)
                else:
                    draft.unlink()


def remove_unused(kept: Path, pattern: str) -> None:
    """Remove what this file has taken the place of, where no run has used it for long."""
    for file in kept.parent.glob(pattern):
        with contextlib.suppress(OSError):  # another run is faster
            if file != kept and time.time() - file.stat().st_mtime > UNUSED:
                file.unlink()


def allocate(path: Path, shapes: Mapping[str, tuple[type, tuple[int, ...]]], mode: int = 0o666) -> None:
    """Make a file of arrays that several processes are going to fill, and take up its room at once.

    Args:
        path: of the file.
        shapes: type and shape of each array, those of wide types first: then each is aligned.
        mode: who may read it, as far as the user's umask admits.

    Raises:
        OSError: there is no room for it; then there is no file.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in shapes.items():
        first, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        kind = next(kind for kind, known in KINDS.items() if known is dtype)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    try:
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def open_arrays(path: Path, mode: Literal["r", "r+"] = "r") -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays, mapped and not read, and what was written about them.

    Args:
        path: of the file.
        mode: `r+` for arrays that are written to.

    Raises:
        OSError: there is no such file, or it is not one of arrays, whole in its length.
    """
    try:
        with safe_open(path, "np") as file:
            about = file.metadata() or {}
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    # Not that library's own arrays: it reads them into the memory, or maps them so that they count as memory in use.
    whole = np.memmap(path, np.uint8, mode)
    length = int(whole[:8].view(np.uint64)[0])
    arrays = {}
    for name, place in json.loads(whole[8 : 8 + length].tobytes()).items():
        if name != "__metadata__":
            first, end = (8 + length + offset for offset in place["data_offsets"])
            arrays[name] = whole[first:end].view(np.ndarray).view(KINDS[place["dtype"]]).reshape(place["shape"])
    return arrays, about


def fault_of(path: Path) -> str:
    """What is wrong with a file of arrays, by its checksums; empty where nothing is."""
    try:
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > os.fstat(file.fileno()).st_size:
                return "damaged: it has no header"
            header = json.loads(file.read(length))
            sums = json.loads(header.pop("__metadata__")["checksums"])
            if header.keys() != sums.keys():
                return "damaged: arrays are missing"
            for name, place in header.items():
                first, end = place["data_offsets"]
                file.seek(8 + length + first)
                found = 0
                while first < end:
                    if not (chunk := file.read(min(CHUNK, end - first))):
                        return "truncated"
                    found, first = zlib.crc32(chunk, found), first + len(chunk)
                if found != sums[name]:
                    return f"damaged: the checksum of {name} is wrong"
    except OSError as error:
        return f"not readable ({error.strerror or error})"
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        return "no index, or damaged"
    return ""
