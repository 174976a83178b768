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

YOUNG = 60.0  # seconds in which a folder may not be locked yet


def claim() -> None:
    """Put all temporary files of this process and its workers into its folder, and remove those of dead processes."""
    atexit.register(clean_up)  # first of all, so that it runs when all that is imported later has cleaned up its own
    _remove_the_dead()
    tempfile.tempdir = train.scratch.name


def _remove_the_dead() -> None:
    """Remove the folders of this user's processes on this machine that were killed: their lock is held by nobody."""
    for folder in glob.glob(f"{glob.escape(os.path.dirname(train.scratch.name))}/{train.SCRATCH}????????"):
        with contextlib.suppress(OSError):  # another user's, another's folder of such a name, or another run is faster
            if os.stat(folder).st_uid != os.getuid() or time.time() - os.stat(folder).st_mtime < YOUNG:
                continue
            lock = os.open(os.path.join(folder, train.LOCK), os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.read(lock, 256) == train.HOST:  # a shared disk may not show the locks of other machines
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def clean_up() -> None:
    """Remove this process's folder, and what torchrun made for it, where nothing is left in that. It never fails."""
    with contextlib.suppress(OSError):  # another thread may be writing there
        train.scratch.cleanup()
    folder = os.path.dirname(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # torchelastic_…/run/attempt_0/rank
    if "/torchelastic_" in folder:
        with contextlib.suppress(OSError):  # it is not empty
            while "/torchelastic_" in folder:
                os.rmdir(folder)
                folder = os.path.dirname(folder)
