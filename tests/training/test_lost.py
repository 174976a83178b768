"""Training images that can no longer be read in the middle of a run, and workers that die."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator

from tests.conftest import DETECT, ROOT, TINY, launch, succeed
from tests.labels import to_train_on
from train.config.options import TrainConfig
from train.data import sets
from train.data.files import find_data
from train.data.sets import TrainSet, Unreadable
from train.data.shapes import draw_shapes
from train.training.saves import states


def spoil(file: Path) -> bytes:
    """Make an image unreadable in a way that its index cannot see, as a failing disk does; what was in it."""
    content, stat = file.read_bytes(), file.stat()
    put(file, bytes(len(content)), stat.st_mtime_ns)
    return content


def put(file: Path, content: bytes, changed: int) -> None:
    file.write_bytes(content)
    os.utime(file, ns=(changed, changed))


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    return draw_shapes(tmp_path / "drawn", {"train": 24, "val": 8})


def images_of(yaml: Path, accelerator: Accelerator, **options: Any) -> TrainSet:
    data, config = find_data(str(yaml)), TrainConfig(**({"imgsz": 64, "batch": 8} | options))
    return TrainSet(to_train_on(data, config, accelerator), data, config)


def test_the_next_that_can_be_read_stands_in_its_place(drawn: Path, monkeypatch):
    monkeypatch.setattr(sets.time, "sleep", lambda _: None)
    accelerator = Accelerator(cpu=True)
    whole = images_of(drawn, accelerator)
    keys = [(0, p, False, ()) for p in range(24)]
    before = [whole.get_image_and_label(i) for i in range(24)]
    files = [Path(whole.im_files[i]) for i in (5, 6, 23)]
    for file in files:
        spoil(file)
    finding = images_of(drawn, accelerator)
    found = [finding.get_image_and_label(i) for i in range(24)]
    stands = {5: 7, 6: 7, 23: 0}
    for i, label in enumerate(found):
        assert label["im_file"] == before[stands.get(i, i)]["im_file"]
        assert np.array_equal(label["img"], before[stands.get(i, i)]["img"])
    assert finding.lost == {5, 6, 23}
    # the same samples, whether a process finds out by itself, as it goes, or is told before
    told = images_of(drawn, accelerator)
    one = images_of(drawn, accelerator).__getitems__(keys)
    random.shuffle(keys)
    other = {key[1]: sample for key, sample in zip(keys, images_of(drawn, accelerator).__getitems__(keys), strict=True)}
    for p, sample in enumerate(one):
        again = told[(0, p, False, (5, 6, 23))]
        assert again["lost"] == []  # nothing that is not known
        assert torch.equal(sample["img"], again["img"])
        assert torch.equal(sample["img"], other[p]["img"])
        assert torch.equal(sample["bboxes"], other[p]["bboxes"])
    assert one[-1]["lost"] == [5, 6, 23]


def test_strict_ends_the_run_and_so_does_a_disk_that_is_gone(drawn: Path, monkeypatch):
    monkeypatch.setattr(sets.time, "sleep", lambda _: None)
    accelerator = Accelerator(cpu=True)
    images, strict = images_of(drawn, accelerator), images_of(drawn, accelerator, strict=True)
    for i in range(5):
        spoil(Path(images.im_files[i]))
    with pytest.raises(Unreadable, match="can no longer be read, as it could when the run began"):
        strict.get_image_and_label(4)
    assert images.get_image_and_label(4)["im_file"] == images.im_files[5]
    with pytest.raises(Unreadable, match=re.escape(images.im_files[3])):  # the fourth of them one after the other
        images.get_image_and_label(0)


QUICK = ["--model", TINY, "--imgsz", "64", "--batch", "8", "--nbs", "8", "--warmup-epochs", "0", "--trackers", "none"]


@pytest.mark.slow
def test_a_run_says_it_once_keeps_it_and_repeats_it(drawn: Path, tmp_path: Path):
    options = ["--data", drawn, *QUICK, "--no-plots", "--epochs", "3", "--workers", "1", "--index-dir", "index"]
    options += ["--optimizer", "SGD", "--save-interval", "1", "--log-interval", "1"]
    read_index = [*options, "--epochs", "1", "--name", "first"]
    succeed(1, DETECT, *read_index, cwd=tmp_path)
    files = sorted((drawn.parent / "images" / "train").glob("*.jpg"))
    good = {files[i]: (files[i].stat().st_mtime_ns, spoil(files[i])) for i in (3, 11)}
    console = succeed(2, DETECT, *options, cwd=tmp_path)
    for file in good:
        assert console.count(f"warning: {file} can no longer be read, as it could when the run began") == 1
    run, copy = tmp_path / "runs" / "detect" / "exp", tmp_path / "runs" / "detect" / "copy"
    shutil.copytree(run, copy)
    newest, before = states(copy / "weights")
    assert torch.load(before, weights_only=True)["lost"] == [3, 11]
    newest.unlink()
    for file, (changed, content) in good.items():
        put(file, content, changed)  # the disk has come back, and the run goes on as it has begun
    console = succeed(2, DETECT, "--resume", copy, cwd=tmp_path)
    assert "can no longer be read" not in console
    one, two = (torch.load(states(folder / "weights")[0], weights_only=True) for folder in (run, copy))
    assert one["lost"] == two["lost"]
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    spoil(sorted((drawn.parent / "images" / "val").glob("*.jpg"))[2])
    ended = launch(2, DETECT, *options, "--name", "val", cwd=tmp_path)
    assert ended.returncode != 0
    assert re.search(r"images/val/\S+ can no longer be read, as it could when the run began", ended.stderr)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGBUS, marks=pytest.mark.slow)])
def test_a_worker_that_dies_ends_all_ranks_with_the_reason(shapes: Path, tmp_path: Path, number: int):
    config = ROOT / "accelerate_configs" / "multi_cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    options = ["--data", shapes, *QUICK, "--no-plots", "--epochs", "1000", "--workers", "1", "--log-interval", "1"]
    run = subprocess.Popen(
        [*command, str(DETECT), *map(str, options)], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.stdout is not None
    while "step 1/" not in (line := run.stdout.readline()):
        assert line
    last = [rank for rank in psutil.Process(run.pid).children() if "detect.py" in " ".join(rank.cmdline())][-1]
    processes = psutil.Process(run.pid).children(recursive=True)
    begun = time.monotonic()
    last.children()[0].send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0
    assert time.monotonic() - begun < 15 + 3  # and what the launcher takes
    reason = "was killed (signal 9), as the system does where memory is short. Lower --workers"
    assert (reason if number == signal.SIGKILL else "found /dev/shm full. Lower --workers or --batch") in errors
    assert errors.count("error: ") == 1, errors
    assert not [process for process in processes if process.is_running()]
