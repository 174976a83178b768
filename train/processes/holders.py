"""Files, and folders, that several runs use at once: each holds a lock while it lives, and who finds no holder may
remove one.

The system lets a lock go with its process, whatever ends that. A disk without locks keeps nobody from removing.
"""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path


def take(file: Path) -> int | None:
    """Hold a file or folder, with others; the descriptor that holds it, or None where it is not there.

    A lock on a name could be one on a file that another run is just removing: that is noticed.
    """
    return _locked(file, fcntl.LOCK_SH)


def remove_unheld(file: Path) -> bool:
    """Remove a file or folder, unless a process holds it; whether it was removed by this call."""
    lock = _locked(file, fcntl.LOCK_EX)
    if lock is None:
        return False
    try:
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)
        return True
    except OSError:  # another user's
        return False
    finally:
        os.close(lock)


def _locked(file: Path, kind: int) -> int | None:
    try:
        lock = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:  # a disk without locks
        if kind == fcntl.LOCK_EX:
            os.close(lock)
            return None
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(lock), os.stat(file)):
            return lock
    os.close(lock)
    return None
