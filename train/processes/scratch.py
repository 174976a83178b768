"""What a process leaves in the temporary folder: one folder, gone when it ends, or removed by the next run."""

import atexit
import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
import time

import train

LOCK = ".yolo-accelerate.lock"
YOUNG = 60.0  # seconds in which a folder may not have its lock yet


def claim() -> None:
    """Put all temporary files of this process and its workers into its folder, and remove those of dead processes.

    A process holds a lock as long as it or a worker lives, whatever kills it, also in a container of its own.
    """
    atexit.register(clean_up)  # first of all, so that it runs when all that is imported later has cleaned up its own
    _remove_the_dead()
    tempfile.tempdir = train.scratch.name
    lock = os.open(os.path.join(train.scratch.name, LOCK), os.O_CREAT | os.O_RDWR)  # stays open: the kernel frees it
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_the_dead() -> None:
    """Remove the folders of this user's killed processes: those that have a lock, and nobody holds it."""
    for folder in glob.glob(f"{glob.escape(os.path.dirname(train.scratch.name))}/{train.SCRATCH}????????"):
        with contextlib.suppress(OSError):  # another user's, another's folder of such a name, or another run is faster
            if os.stat(folder).st_uid != os.getuid() or time.time() - os.stat(folder).st_mtime < YOUNG:
                continue
            lock = os.open(os.path.join(folder, LOCK), os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def clean_up() -> None:
    """Remove this process's folder, and what torchrun made for it, where nothing is left in that."""
    train.scratch.cleanup()
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchelastic_…/run/attempt_0/rank/error.json
        folder = os.path.dirname(error_file)
        with contextlib.suppress(OSError):
            for _ in range(4):
                os.rmdir(folder)  # an empty one alone
                folder = os.path.dirname(folder)
