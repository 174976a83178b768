"""train/detect.py with something wrong on one rank: faulty.py KIND RANK options."""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import train.data.sets

kind, rank = sys.argv.pop(1), int(sys.argv.pop(1))
detect = str(Path(__file__).resolve().parents[2] / "train" / "detect.py")
sys.argv[0] = detect
batches = 0
load = train.data.sets.TrainSet.__getitems__


def faulty(self: train.data.sets.TrainSet, keys: list[tuple[int, int]]) -> list[dict]:
    """Load a batch; the third goes wrong. With --workers 0 this runs in the rank itself."""
    global batches
    batches += 1
    if kind == "slow":
        time.sleep(0.15)
    elif batches == 3:
        if kind == "fail":
            raise ValueError("broken on purpose")
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "hang":
            time.sleep(600)
    return load(self, keys)


if int(os.environ.get("RANK", 0)) == rank:
    train.data.sets.TrainSet.__getitems__ = faulty  # type: ignore[method-assign]
runpy.run_path(detect, run_name="__main__")
