"""Memory that a loader's worker has freed stays its own, for the next image.

The C library would hand large pieces back to the system and get them again, page by page and zeroed, for every image.
"""

import contextlib
import ctypes
import os

TRIM, MMAP = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
LARGE = 1 << 30  # bytes from which a piece is the system's all the same


def keep_freed() -> None:
    """Set glibc so; another C library, or whoever has set MALLOC_… variables, is left alone."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP, LARGE)
        mallopt(TRIM, LARGE)
