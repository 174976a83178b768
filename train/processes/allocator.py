"""When memory that is no longer needed is looked for and handed back."""

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator

TRIM, MMAP = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
LARGE = 1 << 30  # bytes from which a piece is the system's all the same


def keep_freed() -> None:
    """Have what a loader's worker frees stay its own, for the next image: the C library would hand large pieces back to
    the system and get them again, page by page and zeroed, for every image.

    Another C library than glibc, or whoever has set MALLOC_… variables, is left alone.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP, LARGE)
        mallopt(TRIM, LARGE)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No search for garbage: among the many objects that are made here it takes longer than all else."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
