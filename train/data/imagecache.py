"""Decoded images in a file that all ranks, workers and runs of a machine map; `train.data.cache` builds it."""

import atexit
import os
from pathlib import Path
from typing import Any

import numpy as np

from train.data.arrays import open_arrays
from train.processes import holders, room


class ImageCache:
    """Decoded images, by row of their index.

    Args:
        file: of the cache.
        lock: that holds it.
    """

    def __init__(self, file: Path, lock: int):
        self.file, self.lock = file, lock
        arrays, _ = open_arrays(file)
        self.rows, self.first, self.whole = arrays["rows"], arrays["first"], arrays["whole"]
        self.shapes, self.pixels = arrays["shapes"], arrays["pixels"]
        atexit.register(self.release)
        os.register_at_fork(after_in_child=self._leave_to_rank)

    def image(self, row: int) -> np.ndarray | None:
        """(height, width, channels) uint8, not to be written to; None where it is not in here."""
        slot = int(np.searchsorted(self.rows, row))
        if slot == len(self.rows) or self.rows[slot] != row or not self.whole[slot]:
            return None
        return pixels_of(self.pixels, self.first, self.shapes, slot)

    def __reduce__(self) -> tuple[Any, ...]:
        """To a worker that is no copy of its rank goes where the cache is."""
        return ImageCache, (self.file, -1)

    def _leave_to_rank(self) -> None:
        """In a worker: its rank alone holds the cache."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def release(self) -> None:
        """Hold it no longer; one in /dev/shm is removed by the last that does."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1
            if self.file.parent == room.SHARED:
                holders.remove_unheld(self.file)


def pixels_of(pixels: np.ndarray, first: np.ndarray, shapes: np.ndarray, slot: int) -> np.ndarray:
    """An image in the pixels of all, a view."""
    return pixels[first[slot] : first[slot + 1]].reshape(shapes[slot])
