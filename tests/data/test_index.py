"""One index for all ranks, runs and machines: kept, found again, and read anew where it is not right any more."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from accelerate import Accelerator

from tests.conftest import ROOT
from train.config.errors import InputError
from train.config.options import EvalConfig
from train.data import arrays, scan
from train.data.check import ENDING
from train.data.files import find_data
from train.data.index import Index, open_index
from train.data.scan import read_index
from train.processes import room

LABEL = "0 0.5 0.5 0.25 0.25\n"


def draw(folder: Path, number: int = 6) -> Path:
    """A small data set, and its YAML."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for i in range(number):
        cv2.imwrite(str(folder / "images" / f"{i}.png"), np.full((40, 60, 3), 20 * (i % 12), np.uint8))
        (folder / "labels" / f"{i}.txt").write_text(LABEL * (i % 2))
    (folder / "data.yaml").write_text("train: images\nval: images\nnames: [a, b]\n")
    return folder / "data.yaml"


class Reader:
    """Reads the index of a data set, and keeps what was said."""

    def __init__(self, yaml: Path, kept: Path, accelerator: Accelerator):
        self.yaml, self.kept, self.accelerator = yaml, kept, accelerator

    def __call__(self, check: str = "stat", yaml: Path | None = None) -> Index:
        self.said: list[str] = []
        config = EvalConfig(index_dir=str(self.kept), index_check=check)  # type: ignore[arg-type]
        data = find_data(str(yaml or self.yaml))
        return read_index(data, ("train",), config, self.accelerator, say=self.said.append)["train"]

    @property
    def read(self) -> bool:
        """Whether the labels were read the last time."""
        return any("reading the labels of" in line for line in self.said)

    @property
    def kept_files(self) -> list[str]:
        return sorted(os.listdir(self.kept))


@pytest.fixture
def reader(tmp_path: Path, accelerator: Accelerator) -> Reader:
    return Reader(draw(tmp_path / "set"), tmp_path / "kept", accelerator)


def later(file: Path, text: str) -> None:
    """Change a file in place, without a change of its size, and not within the same tick of the clock."""
    before = file.stat()
    file.write_text(text)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def test_what_was_read_is_kept_and_found_again(reader: Reader, tmp_path: Path):
    first = reader()
    assert reader.read
    assert reader.said[-1] == f"index      train: 6 images with their labels, kept in {tmp_path / 'kept'}"
    second = reader()
    assert not reader.read
    assert "6 images with their labels, checked (names, sizes, times) in " in reader.said[-1]
    assert len(reader.kept_files) == 1
    for name, array in first.arrays.items():
        assert np.array_equal(array, second.arrays[name]), name
        assert not array.flags.writeable
    assert sorted(os.listdir(tmp_path / "set")) == ["data.yaml", "images", "labels"]


@pytest.mark.parametrize("level", ["stat", "list", "off"])
def test_what_has_changed_is_seen_by_what_is_checked(reader: Reader, tmp_path: Path, level: str):
    seen = {"stat": 5, "list": 2, "off": 0}[level]
    reader()
    labels, images = tmp_path / "set" / "labels", tmp_path / "set" / "images"
    changes = (
        lambda: cv2.imwrite(str(images / "9.png"), np.zeros((30, 60, 3), np.uint8)),
        lambda: (images / "0.png").unlink(),
        lambda: later(labels / "1.txt", LABEL.replace("0.25 0.25", "0.25 0.50")),
        lambda: cv2.imwrite(str(images / "2.png"), np.zeros((50, 60, 3), np.uint8)),
        lambda: (labels / "4.txt").unlink(),
    )
    for number, change in enumerate(changes):
        change()
        index = reader(level)
        assert reader.read == (number < seen), (level, number)
        if reader.read:
            why = "there are other images" if number < 2 else "files have changed"
            assert f"is stale: {why}" in reader.said[0]
    if level == "stat":
        assert len(index) == 6
        assert index.shapes[1].tolist() == [50, 60]
        assert index.boxes[0].tolist() == [0.5, 0.5, 0.25, 0.5]
    if level != "stat":
        reader("stat")
        assert reader.read


def test_a_damaged_a_truncated_and_a_foreign_file_are_read_anew(reader: Reader, tmp_path: Path):
    whole = {name: array.copy() for name, array in reader().arrays.items()}
    (file,) = (tmp_path / "kept").iterdir()
    content = file.read_bytes()
    for damaged, reason in (
        (content[:-3] + bytes([content[-3] ^ 1]) + content[-2:], "damaged: the checksum of"),
        (content[:-10], "truncated"),
        (content[:7], "no index, or damaged"),
        (b"", "no index, or damaged"),
        (b"\xff" * 4096, "damaged: it has no header"),
        (b"\x20" + bytes(7) + b'{"a": {"dtype": "F32"}}' + b" " * 40, "no index, or damaged"),
    ):
        for level in ("stat", "list", "off") if reason == "truncated" else ("stat",):
            file.unlink()  # others may have it mapped
            file.write_bytes(damaged)
            index = reader(level)
            assert reader.read, (reason, level)
            assert reason in reader.said[0], level
            assert all(np.array_equal(array, index.arrays[name]) for name, array in whole.items())
    file.rename(file.with_suffix(".labels0"))
    reader()
    assert "is of another version" in reader.said[0]


def test_data_that_moves_needs_no_other_index(reader: Reader, tmp_path: Path):
    reader()
    subprocess.run(["cp", "-a", str(tmp_path / "set"), str(tmp_path / "staged")], check=True)
    index = reader(yaml=tmp_path / "staged" / "data.yaml")
    assert not reader.read
    assert index.file(0) == str(tmp_path / "staged" / "images" / "0.png")
    assert reader().file(0) == str(tmp_path / "set" / "images" / "0.png")
    reader("off", yaml=tmp_path / "staged" / "data.yaml")  # nothing is known of that place: it is checked
    assert "checked (names, sizes, times)" in reader.said[-1]
    reader("off")
    assert "checked (nothing)" in reader.said[-1]
    assert len(reader.kept_files) == 1


def test_where_it_cannot_be_kept_the_run_goes_on(reader: Reader, tmp_path: Path, monkeypatch):
    (tmp_path / "kept").write_text("a file")
    index = reader()
    assert (reader.read, len(index)) == (True, 6)
    assert "warning: the index cannot be kept in" in reader.said[1]
    assert "--index-dir names another place" in reader.said[1]

    def full(path: Path, *rest: object) -> None:
        if path.suffix == ENDING:  # the parts that the ranks have read fit
            raise OSError(28, "No space left on device")
        arrays.write_arrays(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(scan, "write_arrays", full)
    with pytest.raises(InputError, match=r"written to .*No space left.* nor to .*Name another place with --index-dir"):
        reader()


def test_a_disk_that_is_full(reader: Reader, small_disk: Path):
    (small_disk / "full").write_bytes(bytes(1 << 20))
    reader.kept = small_disk
    assert len(reader()) == 6
    assert "warning: the index cannot be kept in" in reader.said[1]
    assert "No space left on device" in reader.said[1]
    assert os.listdir(small_disk) == ["full"]
    (small_disk / "full").unlink()
    reader()
    assert f"kept in {small_disk}" in reader.said[-1]


def test_the_ranks_read_together_what_one_reads_alone(runs):
    for split in (0, 1):
        kept = [sorted((run.parents[2] / "index").iterdir()) for run, _ in runs.values()]
        assert [len(files) for files in kept] == [2, 2, 2]
        one, *others = (open_index(str(files[split])) for files in kept)
        for other in others:
            assert one.arrays.keys() == other.arrays.keys()
            assert all(np.array_equal(array, other.arrays[name]) for name, array in one.arrays.items())


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path: Path, monkeypatch):
    def half(tensors: dict, file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        arrays.write_arrays(tmp_path / "a.labels1", {"a": np.zeros(3)}, {})
    assert not list(tmp_path.iterdir())


BUILD = """
import sys
import torch
from accelerate import Accelerator
from train.config.options import EvalConfig
from train.data.check import ENDING
from train.data.files import find_data
from train.data.scan import read_index
read_index(find_data(sys.argv[1]), ("train",), EvalConfig(index_dir=sys.argv[2]), Accelerator(cpu=True), say=print)
"""


KILLED = """
def half(tensors, draft, metadata):
    if ".labels" in str(draft):
        draft.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    WHOLE(tensors, draft, metadata)
WHOLE, arrays.save_file = arrays.save_file, half
"""


def test_two_runs_that_build_at_once_and_one_that_is_killed(reader: Reader, tmp_path: Path):
    draw(tmp_path / "many", 300)
    command = [sys.executable, "-c", BUILD, str(tmp_path / "many" / "data.yaml"), str(tmp_path / "kept")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert all(process.returncode == 0 for process in both), said
    assert len(reader.kept_files) == 1  # no draft beside it
    (file,) = (tmp_path / "kept").iterdir()
    whole = open_index(str(file))
    assert len(whole) == 300
    file.unlink()
    killed = "import os, signal\nfrom train.data import arrays\n" + KILLED + BUILD
    assert subprocess.run([sys.executable, "-c", killed, *command[3:]], env=environment).returncode == -signal.SIGKILL
    assert [name.endswith(arrays.DRAFT) for name in reader.kept_files] == [True]
    index = reader(yaml=tmp_path / "many" / "data.yaml")
    assert reader.read
    assert all(np.array_equal(array, index.arrays[name]) for name, array in whole.arrays.items())
    assert len(reader.kept_files) == 2
    draft = next((tmp_path / "kept").glob(".*"))
    os.utime(draft, (time.time() - 2 * arrays.OLD,) * 2)
    reader()
    assert not draft.exists()


def test_to_another_process_goes_where_the_arrays_are(reader: Reader):
    index = reader()
    sent = pickle.dumps(index)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).boxes, index.boxes)


def test_a_split_that_cannot_be_used_says_so(reader: Reader, tmp_path: Path):
    (tmp_path / "set" / "data.yaml").write_text("train: nowhere\nval: images\nnames: [a]\n")
    with pytest.raises(InputError, match="says `train: nowhere`, but there is no"):
        reader()


def test_a_network_disk_is_named(tmp_path: Path, monkeypatch):
    assert not room.network_disk(tmp_path)

    class Mount:
        mountpoint, fstype = str(tmp_path), "nfs4"

    monkeypatch.setattr(room.psutil, "disk_partitions", lambda all: [Mount])  # this machine has none
    assert room.network_disk(tmp_path / "not" / "there") == "nfs4"
    assert not room.network_disk(tmp_path.with_name(f"{tmp_path.name}x"))
