"""Kill a training again and again, and compare what it ends with byte for byte with one that was left alone.

usage: python -m tests.soak [--seed 0] [--timed 21] [--each 3] [--keep FOLDER]

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
    "--data datasets/shapes/shapes.yaml --imgsz 64 --batch 8 --nbs 16 --workers 1 --save-interval 2 --log-interval 3 "
    "--no-plots --mosaic 0.5 --warmup-epochs 1 --optimizer AdamW --lr0 0.0015 --patience 1000 --resume auto"
)
LONG = ((1, 450), (2, 900), (4, None))  # processes, and the step after which the next number takes over
SHORT = ((1, 90), (2, None))
TIMES = {"seconds", "images_per_s", "peak_memory_gb"}  # columns of results.csv
# Each place at which a save can be cut off, in the order in which they come; a step, a validation, the start.
PLACES = ("open:.last.pt", "os.link:.last.pt", "os.rename:.best_before.pt", "os.rename:.best_next.pt",
          "os.rename:.last.pt", "open:.state_", "os.rename:.state_", "os.remove:state_", "os.rename:.best.pt",
          "os.remove:best_next.pt", "step:", "validation:", "start")  # fmt: skip


@dataclass
class Kill:
    """One SIGKILL: of the main process at a place, or of a rank or the launcher after so many seconds."""

    place: str = "run"  # as killed.py takes it
    seconds: float = 0.0
    rank: int | None = None  # None is the launcher

    def __str__(self) -> str:
        who = "the launcher" if self.rank is None else f"rank {self.rank}"
        if self.place.startswith("kill:"):
            _, what, name, number = self.place.split(":")
            return f"rank 0 at {what} {name}".rstrip() + f", the {number}. of them"
        return f"{who} after {self.seconds:.1f} s" + " (the start)" * (self.place == "start")


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
    if kill.seconds:
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
) -> tuple[float, list[Kill]]:
    """Train over the segments, with these kills in each; seconds, and the kills that came in time."""
    options = ["--model", model, *(options or [])]
    draw_shapes(folder / "datasets", {"train": 40, "val": 21})
    begun = time.monotonic()
    told: list[Kill] = []
    for (ranks, stop), here in zip(segments, kills, strict=True):
        what = f"stop:{stop}" if stop else "run"
        for kill in [*here, Kill()]:
            last = kill.place == "run" and not kill.seconds
            process = start(folder, ranks, f"{kill.place}+{what}" if kill.place.startswith("kill:") else what, options)
            code = ended(process, kill, ranks)
            step = next(iter(map(step_of, newest(folder))), 0)
            if code == 0 or (code == 3 and step == stop):  # it is over, if need be before the kill came
                break
            if last or code not in (-signal.SIGKILL, 128 + signal.SIGKILL):
                sys.exit(f"{kill}: code {code}:\n{(folder / 'console.txt').read_text()[-3000:]}")
            told.append(kill)
            print(f"{ranks} processes, {kill}: step {step} is saved", flush=True)
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


def drawn(timed: int, each: int, segments: tuple, seconds: float, seed: int) -> list[list[Kill]]:
    """Kills for each segment in a random order: so many at uniform times up to these seconds, so many at each place."""
    rng = random.Random(seed)
    places = [place for place in PLACES for _ in range(each)]
    found: list[list[Kill]] = [[] for _ in segments]
    for i, place in enumerate(["run"] * timed + places):
        # While there are few ranks the model still gets better, so that best.pt is written.
        number = i % (len(segments) - ("best" in place) or 1)
        rank = rng.choice([None, *range(segments[number][0])])
        if place in ("run", "start"):
            found[number].append(Kill(place, rng.uniform(0.5, 4.0 if place == "start" else seconds), rank))
        else:
            found[number].append(Kill(f"kill:{place}:{1 if 'best' in place else rng.randint(1, 2)}"))
    for here in found:
        rng.shuffle(here)
    return found


def soak(home: Path, timed: int, each: int, seed: int, model: str, segments: tuple, epochs: int) -> list[str]:
    """Train with and without kills; what differs in the end, or was not done."""
    for name in ("whole", "killed"):
        (home / name).mkdir(parents=True)
    options = ["--epochs", str(epochs), "--close-mosaic", str(epochs // 5)]
    seconds, _ = train_over(home / "whole", segments, [[] for _ in segments], model, options)
    print(f"seed {seed}: left alone it took {seconds:.0f} s over {len(segments)} numbers of processes", flush=True)
    kills = drawn(timed, each, segments, 12.0, seed)
    begun = time.monotonic()
    _, told = train_over(home / "killed", segments, kills, model, options)
    print(f"with {len(told)} kills it took {time.monotonic() - begun:.0f} s", flush=True)
    runs = [home / name / "runs" / "detect" for name in ("whole", "killed")]
    wrong = differing(*(contents(run / "exp") for run in runs))
    for place in PLACES:
        came = sum(place in kill.place for kill in told)
        if came < each:
            wrong.append(f"{came} kills at {place}, not {each}")
    return wrong


def main() -> None:
    """Say what was killed and whether it made a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timed", type=int, default=21, help="kills at uniform times")
    parser.add_argument("--each", type=int, default=3, help="kills at each place")
    parser.add_argument("--model", default=str(ROOT / "tests" / "fixtures" / "tiny.yaml"))
    parser.add_argument("--keep", type=Path, help="leave the runs in this folder")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as temporary:
        home = (given.keep or Path(temporary)).resolve()
        wrong = soak(home, given.timed, given.each, given.seed, given.model, LONG, epochs=450)
    print("all bits are equal" if not wrong else f"NOT EQUAL: {json.dumps(wrong[:20])}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
