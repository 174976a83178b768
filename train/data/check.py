"""Whether the splits of a data set have been read before, and are still what was read: `python -m train.data.check`.

That takes seconds for a million images, and leaves memory behind, so it is done in a process of its own while the ranks
start and build the model. It imports nothing that takes long.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import train
from train.config.errors import InputError
from train.data.arrays import fault_of, write_arrays
from train.data.listing import DataFiles, base_of, relative, stats

VERSION = 3  # of the reader: what it reads from the same files may differ from another's
ENDING = f".labels{VERSION}"
CHECKED = {"stat": "names, sizes, times", "list": "names", "off": "nothing"}


@dataclass
class Found:
    """What is known of a split on this machine."""

    file: str = ""  # the index: where it is, or where it belongs
    valid: bool = False
    base: str = ""  # that its paths are relative to; empty where the index says so
    listing: str = ""  # where the images are listed that are to be read
    pictures: str = ""  # a hash of the images' names, sizes and times, without the labels'
    why: str = ""  # the index that was there is not valid: which, and why not
    images: int = 0
    seconds: float = 0.0
    checked: str = ""  # in words
    error: str = ""  # the split cannot be used


class Check:
    """The check of some splits, which runs beside what comes after.

    Args:
        data: the data set.
        splits: of it.
        folder: where indexes are kept.
        level: `stat`, `list` or `off`, see --index-check.
        asked: for what the data set was found.
    """

    def __init__(self, data: DataFiles, splits: tuple[str, ...], folder: Path, level: str, asked: tuple[Any, ...] = ()):
        self.data, self.asked = data, asked
        self.subject = self._subject(data, splits)
        how = {"level": level, "folder": str(folder), "scratch": train.scratch.name, "parent": os.getpid()}
        path = os.pathsep.join(filter(None, (str(Path(train.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "train.data.check"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(self.subject | how).encode())
        self.process.stdin.close()
        self.process.stdin = None

    def is_of(self, data: DataFiles, splits: tuple[str, ...]) -> bool:
        """Whether it is the check of these splits."""
        return self.subject == self._subject(data, splits)

    @staticmethod
    def _subject(data: DataFiles, splits: tuple[str, ...]) -> dict[str, Any]:
        """What is checked, as plain values."""
        return asdict(data) | {"root": str(data.root), "wanted": list(dict.fromkeys(splits))}

    def results(self) -> dict[str, Found]:
        """By split; waits for them.

        Raises:
            RuntimeError: the process has failed.
        """
        out, errors = self.process.communicate()
        if self.process.returncode:
            last = errors.decode(errors="replace").strip().rpartition("\n")[2]
            raise RuntimeError(f"The check of the labels has failed with code {self.process.returncode}: {last}")
        return {split: Found(**found) for split, found in json.loads(out).items()}

    def end(self) -> None:
        """It is not needed any more."""
        self.process.kill()
        self.process.communicate()


def main() -> None:
    """Answer the request on standard input."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the script that asked says what there is to say
    asked = json.load(sys.stdin)
    fields = {field.name: asked[field.name] for field in dataclasses.fields(DataFiles)}
    data = DataFiles(**fields | {"root": Path(fields["root"])})
    parent = asked["parent"]

    def alive() -> None:
        if os.getppid() != parent:
            sys.exit(1)

    found = {}
    for split in asked["wanted"]:
        begun = time.perf_counter()
        try:
            found[split] = check(data, split, asked, alive)
        except InputError as error:
            found[split] = Found(error=str(error))
        found[split].seconds = time.perf_counter() - begun
    json.dump({split: asdict(one) for split, one in found.items()}, sys.stdout)


def check(data: DataFiles, split: str, asked: dict[str, Any], alive: Callable[[], None]) -> Found:
    """Look for the index of a split, and whether it is still right.

    Its name has three hashes: of the place, of the names, of the sizes and times. So data at another place with the
    same names, sizes and times needs no other, and nothing has to be opened to find it.

    Args:
        data: the data set.
        split: of it.
        asked: the request.
        alive: ends the process when the one that asked is gone.
    """
    folder, level = Path(asked["folder"]), asked["level"]
    table, classes = data.tables.get(split, ("", []))
    kind, said = str(data.keypoints), str(data.keypoints)
    if table:  # whose name has two hashes: of the file's place, of its size and time
        source, _, state = Path(table).name.partition("-")
        kind, said = f"{kind} {source} {classes}", f"{kind} {source} {classes} {state}"
    place = _hash(os.path.abspath(data.root), json.dumps(data.splits.get(split)), kind)[:8]
    here = _newest(folder, f"{place}-*{ENDING}")
    if level == "off" and here and not _valid(here[0]):
        return Found(str(here[0]), True, checked=CHECKED["off"])
    files = data.images(split)
    base = base_of(files, os.path.abspath(data.root))
    unique = list(dict.fromkeys(files))
    listed = _places(files, unique)
    names = os.fsencode("\0".join(relative(unique, base)))
    named = _hash(names, listed.tobytes(), said)[:16]
    found = Found(base=base, images=len(unique), checked=CHECKED["list"])
    same = _newest(folder, f"*-{named}-*{ENDING}")
    if level == "list" and same and not _valid(same[0]):
        return dataclasses.replace(found, file=str(same[0]), valid=True)
    changed = stats(unique, not table, alive)
    stamp = _hash(changed.tobytes())[:16]
    found.checked = CHECKED["stat"]
    exact = _newest(folder, f"*-{named}-{stamp}{ENDING}")
    if exact and not (fault := _valid(exact[0])):
        return dataclasses.replace(found, file=str(exact[0]), valid=True)
    if exact:
        found.why = f"{exact[0]} is {fault}"
    elif here:
        found.why = f"{here[0]} is stale: {_difference(here[0].name, named)}"
    elif other := _newest(folder, f"{place}-*.labels*"):
        found.why = f"{other[0]} is of another version"
    found.file = str(exact[0] if exact else folder / f"{place}-{named}-{stamp}{ENDING}")
    found.pictures = _hash(names, changed[:, :2].tobytes())[:16]
    found.listing = os.path.join(asked["scratch"], f"{split}.listing")
    paths = np.frombuffer(names, np.uint8)
    write_arrays(Path(found.listing), {"paths": paths, "listed": listed, "sizes": changed[:, 0]}, {})
    return found


def _hash(*parts: str | bytes) -> str:
    whole = hashlib.sha256(str(VERSION).encode())
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode(errors="surrogateescape")
        whole.update(len(data).to_bytes(8) + data)
    return whole.hexdigest()


def _newest(folder: Path, pattern: str) -> list[Path]:
    """The files of such a name, the newest first."""
    found = []
    for file in folder.glob(pattern):
        with contextlib.suppress(OSError):  # it has just been removed
            found.append((-file.stat().st_mtime, file.name, file))
    return [file for *_, file in sorted(found)]


def _valid(file: Path) -> str:
    """What is wrong with an index; where nothing is, it has been used now."""
    if not (fault := fault_of(file)):
        with contextlib.suppress(OSError):  # another user's
            os.utime(file)
    return fault


def _places(files: list[str], unique: list[str]) -> np.ndarray:
    """Which of the unique files each is, int32."""
    if len(files) == len(unique):
        return np.arange(len(files), dtype=np.int32)
    place = {file: i for i, file in enumerate(unique)}
    return np.array([place[file] for file in files], dtype=np.int32)


def _difference(name: str, named: str) -> str:
    """What has changed since an index of this name was written."""
    _, names, _ = name.removesuffix(ENDING).split("-")
    return "files have changed" if names == named else "there are other images"


if __name__ == "__main__":
    main()
