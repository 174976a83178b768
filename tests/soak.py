"""Kill a training again and again, and compare what it ends with byte for byte with one that was left alone.

usage: python -m tests.soak [--seed 0] [--kills 30] [--keep FOLDER]

The run goes over several numbers of processes: it is stopped after a step and goes on with the next number. The same is
done with SIGKILLs between, of a random rank or of the launcher, at times that are uniform over the run and at named
places of it; each time the same command line is typed again (`--resume auto`). W&B is on. At the end the weights, EMA,
optimizer, best.pt, last.pt, results.csv (without times), metrics and predictions have to be the same to the last bit.
"""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

import train  # noqa: F401  # Ultralytics' settings in a folder of this process
from train.data.shapes import draw_shapes
from train.training.saves import states

ROOT = Path(__file__).resolve().parent.parent
KILLED = ROOT / "tests" / "workers" / "killed.py"
OPTIONS = (
    "--data datasets/shapes/shapes.yaml --imgsz 64 --batch 8 --nbs 16 --workers 1 --epochs 6 --close-mosaic 2 "
    "--save-interval 2 --log-interval 3 --no-plots --warmup-epochs 1 --optimizer AdamW --lr0 0.002 --resume auto"
)
SEGMENTS = ((1, 8), (2, 16), (4, None))  # processes, and the step after which the next number takes over
TIMES = {"seconds", "images_per_s", "peak_memory_gb"}  # columns of results.csv
# Each place at which a save can be cut off, in the order in which they come; and a step and a validation.
PLACES = ("open:.last.pt", "os.link:.last.pt", "os.rename:.best_next.pt", "os.rename:.last.pt", "open:.state_",
          "os.rename:.state_", "os.remove:state_", "os.rename:.best.pt", "os.rename:.best_before.pt",
          "os.remove:best_next.pt", "step:", "validation:")  # fmt: skip


@dataclass
class Kill:
    """One SIGKILL: of the main process at a place, or of a rank or the launcher after so many seconds."""

    place: str = "run"  # as killed.py takes it
    seconds: float = 0.0
    rank: int | None = None  # None is the launcher

    def __str__(self) -> str:
        who = "the launcher" if self.rank is None else f"rank {self.rank}"
        return f"rank 0 at {self.place[5:]}" if self.place != "run" else f"{who} after {self.seconds:.1f} s"


def start(folder: Path, ranks: int, what: str, options: list[str]) -> subprocess.Popen:
    """Start the training in a folder."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "YOLO_", "ACCELERATE_"))}
    clean |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    launcher = ["-m", "train.processes.launcher", "--cpus", str(ranks), "--"] if ranks > 1 else []
    with open(folder / "console.txt", "a") as console:
        return subprocess.Popen(
            [sys.executable, *launcher, str(KILLED), what, *OPTIONS.split(), *options],
            cwd=folder, env=clean, stdout=console, stderr=console, start_new_session=True,
        )  # fmt: skip


def ended(process: subprocess.Popen, kill: Kill, ranks: int) -> int:
    """Kill it when it is time, wait until nothing of it is left; its code."""
    family = psutil.Process(process.pid)
    if kill.place == "run" and kill.seconds:
        try:
            process.wait(kill.seconds)
        except subprocess.TimeoutExpired:
            members = family.children() if ranks > 1 else []
            victim = members[kill.rank] if kill.rank is not None and kill.rank < len(members) else family
            left = [family, *family.children(recursive=True)]
            victim.kill()
            process.wait(60)
            psutil.wait_procs(left, 60)
    return process.wait(240)


def train_over(
    folder: Path, segments: tuple, kills: list[list[Kill]], model: str, options: list[str] | None = None
) -> tuple[float, list[str]]:
    """Train over the segments, with these kills in each; seconds, and what became of each kill."""
    options = ["--model", model, *(options or [])]
    draw_shapes(folder / "datasets", {"train": 40, "val": 21})
    begun, told = time.monotonic(), []
    for (ranks, stop), here in zip(segments, kills, strict=True):
        what = f"stop:{stop}" if stop else "run"
        for kill in [*here, Kill()]:
            last = kill.place == "run" and not kill.seconds
            process = start(folder, ranks, what if kill.place == "run" else kill.place, options)
            code = ended(process, kill, ranks)
            if not last:
                step = next(iter(map(step_of, newest(folder))), 0)
                told.append(f"{ranks} processes, {kill}: code {code}, step {step} is saved")
                print(told[-1], flush=True)
            if code in (0, 3) and not last:  # it was over before the kill came
                break
        if code != (3 if stop else 0):
            sys.exit(f"ended with {code}:\n{(folder / 'console.txt').read_text()[-3000:]}")
    return time.monotonic() - begun, told


def newest(folder: Path) -> list[Path]:
    """The states of the run, the newest first."""
    return states(folder / "runs" / "detect" / "exp" / "weights")


def step_of(state: Path) -> int:
    """The optimizer step after which a state was saved."""
    return int(state.stem.removeprefix("state_"))


def contents(run: Path) -> dict[str, Any]:
    """All of a run that has to be the same."""
    weights = run / "weights"
    state = torch.load(states(weights)[0], weights_only=True)
    found = {name: state[name] for name in ("model", "ema", "optimizer", "updates", "epoch", "best_epoch")}
    for name in ("best", "last"):
        checkpoint = torch.load(weights / f"{name}.pt", weights_only=False)  # this project's own
        found[name] = [checkpoint["model"].state_dict(), checkpoint["epoch"], checkpoint["train_metrics"]]
    with open(run / "results.csv", newline="") as opened:
        found["results.csv"] = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(opened)]
    return found | {name: (run / name).read_bytes() for name in ("metrics.json", "predictions.json")}


def differing(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two contents are not the same to the last bit."""
    if torch.is_tensor(a):
        return [] if torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differing(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [found for i in range(len(a)) for found in differing(a[i], b[i], f"{where}/{i}")]
    return [] if a == b else [where]


def drawn(number: int, segments: tuple, seconds: float, seed: int) -> list[list[Kill]]:
    """Kills for each segment: each place in turn, and as many at uniform times."""
    rng = random.Random(seed)
    kills = [Kill(f"kill:{place}:{rng.randint(1, 2)}") for place in PLACES]
    kills = [kills[i % len(kills)] for i in range(number // 2)]
    rng.shuffle(kills)
    found: list[list[Kill]] = [[] for _ in segments]
    for i in range(number):
        ranks = segments[i % len(segments)][0]
        timed = Kill(seconds=rng.uniform(1.0, seconds), rank=rng.choice([None, *range(ranks)]))
        found[i % len(segments)].append(kills.pop() if i % 2 and kills else timed)
    return found


def soak(home: Path, number: int, seed: int, model: str, segments: tuple = SEGMENTS) -> list[str]:
    """Train with and without kills; what differs in the end."""
    for name in ("whole", "killed"):
        (home / name).mkdir(parents=True)
    seconds, _ = train_over(home / "whole", segments, [[] for _ in segments], model)
    each = seconds / len(segments)
    print(f"seed {seed}: left alone it took {seconds:.0f} s over {len(segments)} numbers of processes", flush=True)
    _, told = train_over(home / "killed", segments, drawn(number, segments, each, seed), model)
    runs = [home / name / "runs" / "detect" for name in ("whole", "killed")]
    wrong = differing(*(contents(run / "exp") for run in runs))
    if len(told) < number // 2:
        wrong.append(f"only {len(told)} kills came in time")
    return wrong


def main() -> None:
    """Say what was killed and whether it made a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--model", default=str(ROOT / "tests" / "fixtures" / "tiny.yaml"))
    parser.add_argument("--keep", type=Path, help="leave the runs in this folder")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as temporary:
        wrong = soak((given.keep or Path(temporary)).resolve(), given.kills, given.seed, given.model)
    print("all bits are equal" if not wrong else f"NOT EQUAL: {json.dumps(wrong[:20])}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
