"""train/detect.py with something wrong on one rank: faulty.py KIND RANK options.

In the third batch that the rank loads (with --workers 0 in the rank itself, with --workers 1 in its worker):
fail raises, input finds bad input, memory runs out of it, kill is killed, stop is frozen, hang sleeps. In each batch:
slow sleeps a little. In validation: late-kill and late-stop are killed or frozen before the gather, late-fail raises
there, and long computes for long on the main process where COCO's metric is computed.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import torch

import train.data.sets
import train.evaluation.evaluate
from train.config.errors import InputError

kind, rank = sys.argv.pop(1), int(sys.argv.pop(1))
detect = str(Path(__file__).resolve().parents[2] / "train" / "detect.py")
sys.argv[0] = detect
batches = 0
load = train.data.sets.TrainSet.__getitems__
detect_boxes, measure = train.evaluation.evaluate.detect, train.evaluation.evaluate.coco_metrics


def go_wrong(kind: str) -> None:
    print(f"now: {kind}", flush=True)
    if kind == "fail":
        raise ValueError("broken on purpose")
    if kind == "input":
        raise InputError("bad input found late")
    if kind == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total capacity of 1 GiB")
    if kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    if kind == "hang":
        time.sleep(600)


def faulty(self: train.data.sets.TrainSet, keys: list[tuple[int, int]]) -> list[dict]:
    """Load a batch; the third goes wrong."""
    global batches
    batches += 1
    if kind == "slow":
        time.sleep(0.15)
    elif batches == 3:
        go_wrong(kind)
    return load(self, keys)


def faulty_detect(*arguments, **options):
    """Detect; goes wrong before the ranks gather what they have found."""
    go_wrong(kind.removeprefix("late-"))
    return detect_boxes(*arguments, **options)


def long(*arguments, **options):
    """Compute COCO's metric for long."""
    until = time.monotonic() + 14
    while time.monotonic() < until:  # busy, as an evaluator in Python is
        sum(range(10_000))
    return measure(*arguments, **options)


if int(os.environ.get("RANK", 0)) == rank:
    train.data.sets.TrainSet.__getitems__ = faulty  # type: ignore[method-assign]
    if kind.startswith("late-"):
        train.evaluation.evaluate.detect = faulty_detect
    if kind == "long":
        train.evaluation.evaluate.coco_metrics = long
runpy.run_path(detect, run_name="__main__")
