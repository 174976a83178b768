"""Files that are there whole or not at all, and a folder for each run."""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import train
from train.config.errors import InputError
from train.processes.holders import take

DRAFT = ".draft"  # ending of a file or folder that is being written


def draft_of(path: Path) -> Path:
    """A temporary name beside a file that no other process has, of any machine that shares the disk."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{uuid.uuid4().hex}{DRAFT}")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; what was written there becomes `path` when the block ends without error."""
    draft = draft_of(path)
    try:
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, which is held; it becomes `path` when the block ends without error, unless
    another process was faster, whose folder has files of the same names.
    """
    draft = draft_of(path)
    draft.mkdir(parents=True)
    held = take(draft)
    try:
        yield draft
        os.sync()  # all files at once: one by one takes minutes
        if path.is_dir() and sorted(os.listdir(path)) != sorted(os.listdir(draft)):  # some were removed
            shutil.rmtree(path)
        try:
            os.rename(draft, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if held is not None:
            os.close(held)


def hold(folder: Path) -> bool:
    """Keep other runs out of a run's folder for as long as this process lives, whatever ends it; False where another
    run is in it. A disk without locks keeps nobody out.
    """
    try:
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
    except OSError:
        return True
    try:
        # POSIX's, which a worker that was forked from here does not hold; it is this process's until that ends
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def cache_folder() -> Path:
    """Where files are kept that can be made again: XDG's place for them."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "yolo-accelerate"
    except RuntimeError:  # no home folder
        return Path(train.scratch.name)


def check_folder(folder: Path, flag: str) -> None:
    """Raise InputError where a folder is not there and could not be made, or could not be written to."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise InputError(f"The folder {folder} cannot be made: {there} is a file. Name another with {flag}.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"The folder {folder} cannot be made: {there} cannot be written to. Name another with {flag}.")


def check_file(file: str, flag: str) -> None:
    """Raise InputError where a file is named that could not be written; an empty name is none."""
    if not file:
        return
    if os.path.isdir(file):
        raise InputError(f"{flag} is {file!r}, a folder; name a file in it.")
    check_folder(Path(file).parent, flag)
    if os.path.exists(file) and not os.access(file, os.W_OK):
        raise InputError(f"{flag} is {file!r}, which cannot be written to.")


def new_folder(project: Path, name: str, exactly: str = "") -> Path:
    """Make `project`/`name`, or name2, name3, … where it is taken; or `exactly` that folder. Call it on one process.

    Raises:
        InputError: the folder cannot be made.
    """
    folder = Path(exactly) if exactly else project / name
    number = 1
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        while not exactly and (folder.exists() or not _made(folder)):
            number += 1
            folder = project / f"{name}{number}"
        if exactly:
            folder.mkdir(exist_ok=True)
        return folder.resolve()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        mend = "--save-dir" if exactly else "--project or --name"
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"The folder {folder} cannot be made: {reason}. Name another with {mend}.") from None


def _made(folder: Path) -> bool:
    """Make the folder; False where another run has just made it."""
    try:
        folder.mkdir()
        return True
    except FileExistsError:
        return False
