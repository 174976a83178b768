"""Files that are there whole or not at all, and a folder for each run."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from train.config.errors import InputError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; what was written there becomes `path` when the block ends without error."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


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
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be made: {error}. Name another, or free this one.") from None


def _made(folder: Path) -> bool:
    """Make the folder; False where another run has just made it."""
    try:
        folder.mkdir()
        return True
    except FileExistsError:
        return False
