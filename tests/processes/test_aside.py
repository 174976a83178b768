"""What is done beside the training: in order, with its errors told, and nothing kept of it."""

import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, TINY, launch
from train.processes.aside import Aside, finish

MISTAKEN = ROOT / "tests" / "workers" / "aside.py"


class Picture:
    """Something large."""


def test_jobs_are_done_in_order_by_another_thread_and_forgotten():
    aside, done, gate = Aside(at_once=False), [], threading.Event()
    picture = Picture()
    kept = weakref.ref(picture)
    aside.do(gate.wait)
    futures = [aside.do(lambda i=i: done.append((i, threading.current_thread().name)) or i) for i in range(3)]
    futures.append(aside.do(lambda picture=picture: type(picture)))
    del picture
    assert done == []
    assert kept() is not None
    gate.set()
    finish()  # as at a stop
    assert done == [(i, "aside") for i in range(3)]
    assert [future.result() for future in futures] == [0, 1, 2, Picture]
    gc.collect()
    assert kept() is None


def test_the_thread_takes_no_core_from_training():
    """With a second team of OpenMP threads each step takes a third longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert Aside(at_once=False).do(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_draws_from_the_generators_of_training_is_done_at_once():
    done = []
    assert Aside(at_once=True).do(lambda: done.append(threading.current_thread())).done()
    assert done == [threading.main_thread()]


def test_an_error_is_told_at_the_next_look_and_nothing_is_done_after_it():
    aside, done = Aside(at_once=False), []
    future = aside.do(lambda: {}["lost"])
    with pytest.raises(KeyError, match="lost"):
        aside.wait()
    for look in (aside.check, aside.wait, future.result, lambda: aside.do(done.append)):
        with pytest.raises(KeyError, match="lost"):
            look()
    assert done == []
    finish()  # the run is told to end all the same


def test_an_error_beside_the_training_ends_all_ranks(tmp_path: Path, shapes: Path):
    options = "--imgsz 64 --batch 8 --epochs 50 --workers 1 --trackers none --no-plots"
    done = launch(2, MISTAKEN, "--data", shapes, "--model", TINY, *options.split(), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("error: rank 0 of 2") == 1
    assert "failed: KeyError: 'a mistake'" in done.stderr
    assert "write_state" in (tmp_path / "runs" / "detect" / "exp" / "logs" / "rank0.log").read_text()
    assert "epoch 3/50" not in done.stdout
