"""The thread that breaks long silences and says who hangs."""

import re
import time

import torch

from train.processes import watch
from train.processes.watch import Watch


def test_long_silence_is_broken(monkeypatch):
    monkeypatch.setattr(watch, "HEARTBEAT", 0.3)
    lines: list[str] = []
    one = Watch(0, 1, 600, lines.append)
    one.begin("reading labels")
    time.sleep(1.5)
    one.end()
    count = len(lines)
    assert 2 <= count <= 5
    assert re.fullmatch(r"still reading labels, \d s", lines[0])
    time.sleep(0.8)
    one.close()
    assert len(lines) == count


def test_compiling_is_no_hang_and_no_measure_of_a_step():
    one = Watch(0, 1, 600, print)
    one.begin("compiling the model")
    one.last_progress -= 900
    assert not one.expected
    one.at(0, 1, "forward of batch 1")
    one.begin("", progress=True)
    one.at(1, 1, "forward of batch 2")
    one.close()
    assert one.expected
    assert one.slowest < 10


def test_the_verdict_names_who_is_behind_or_silent(monkeypatch):
    monkeypatch.setattr(watch, "POSTED", 1.0)
    store = torch.distributed.HashStore()
    ranks = [Watch(rank, 3, 600, print) for rank in range(3)]
    for rank, one in enumerate(ranks):
        one.store = store
        one.begin("training", progress=True)
        one.at(4 if rank == 1 else 5, 1, f"forward of batch {5 if rank == 1 else 6}")
    time.sleep(1.5)
    late, silent, verdict = ranks[0]._verdict(9)
    assert (late, silent) == ([1], [])
    assert "  rank 1 of 3, at forward of batch 5" in verdict
    assert verdict.count("  rank ") == 1
    ranks[2].ended.set()  # its process no longer runs
    ranks[2].thread.join()
    late, silent, verdict = ranks[0]._verdict(9)
    assert (late, silent) == ([2], [2])
    assert "  rank 2 of 3; it does not answer and was last seen at forward of batch 6" in verdict
    assert verdict.count("  rank ") == 1
    ranks[0].close()
    ranks[1].close()
