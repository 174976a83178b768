"""What it costs to save a run, and not to: `make bench-save`.

usage: python -m tests.bench.saves [--folder FOLDER]

Saves the state of YOLOv8n and of YOLOv8x with AdamW's moments, flushed to the disk of FOLDER (the working directory's),
and the state with last.pt and best.pt after an epoch: until the training goes on, and until the files are written; then
what is asked for after each step where no save is due and nobody was told to end. Medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from train.config.objects import Objects
from train.config.options import TrainConfig
from train.model.build import ModelEMA, build_model
from train.model.tasks import build_criterion
from train.processes.stops import Stop
from train.training.engine import Progress
from train.training.meter import Meter
from train.training.optim import Schedule, build_optimizer
from train.training.saves import Saves, states
from train.training.state import TrainState

TIMES = 7


def made(model: str, folder: Path) -> Saves:
    """A run that has taken a step."""
    config = TrainConfig(model=model, optimizer="AdamW")
    accelerator = Accelerator(cpu=True)
    detector, _ = build_model(config, model, Objects(names={i: f"class {i}" for i in range(80)}))
    ema = ModelEMA(detector)
    detector.criterion = build_criterion(detector)
    optimizer = build_optimizer(detector, Schedule(config, 1000, 80))
    for parameter in detector.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = TrainState(detector, detector, ema, optimizer, accelerator)
    meter = Meter(accelerator, detector)
    meter.add(dict.fromkeys(("box_loss", "cls_loss", "dfl_loss"), torch.ones(())), ["a.jpg"])
    meter.step(torch.ones(()))
    return Saves(state, meter, config, {}, folder)


def seconds_of_saves(saves: Saves, **epoch: Any) -> str:
    """Medians of several saves: until the training goes on, until all is written."""
    taken = []
    for step in range(TIMES):
        saves.state.ema.updates, saves.state.batches = step, step + 1
        if epoch:
            saves.state.best_epoch = saves.state.epoch = step
        begun = time.perf_counter()
        saves.save(**epoch)
        copied = time.perf_counter() - begun
        failed = saves.settle()
        taken.append((copied, time.perf_counter() - begun))
        assert not failed, failed
    return "{:.2f} s, {:.2f} s".format(*map(statistics.median, zip(*taken, strict=True)))


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path())
    given = parser.parse_args()
    print("| | state: copied, written | after an epoch, with last.pt and best.pt | bytes of a state |")
    print("| --- | --- | --- | --- |")
    for model in ("yolov8n.yaml", "yolov8x.yaml"):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            saves = made(model, Path(folder))
            alone, whole = seconds_of_saves(saves), seconds_of_saves(saves, validated=saves.config)
            size = states(Path(folder))[0].stat().st_size
            print(f"| {Path(model).stem} | {alone} | {whole} | {size / 1e6:.0f} MB |", flush=True)
    stop = Stop(saves.state.accelerator)
    begun = time.perf_counter()
    for step in range(10_000):
        stop.announce(step)
        assert stop.after(step) is None
        assert not saves.due(Progress(1, 2, step, 0.0, None, None))
    print(f"\nafter a step, where none is due: {(time.perf_counter() - begun) / 10_000 * 1e6:.1f} µs")


if __name__ == "__main__":
    main()
