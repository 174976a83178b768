"""What logging costs: `make bench-log`, with ARGS as train/detect.py takes them.

Trains for three epochs on one process and on two, W&B offline, and adds up the time that the measuring, the lines, the
hang detection and the trackers take within the steps. A barrier before each gather keeps what a rank waits for the
others out of it: that is the training's own. Pictures of the first three batches are drawn once in a run and do not
count.
"""

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
QUICK = "--imgsz 320 --epochs 4 --batch 16 --nbs 16 --mixed-precision auto --val-interval 4 --no-plots"


def measure(arguments: list[str]) -> None:
    """One rank: train with every call of the logging timed."""
    from train.processes.watch import Watch
    from train.reporting.training_report import TrainingReport
    from train.training import engine
    from train.training.meter import ForwardClock, Meter

    spent, epochs = {"logging": 0.0}, []
    inside = False

    def timed(owner: Any, name: str) -> None:
        original: Callable = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:  # counted by the outer call
                return original(*args, **kwargs)
            if name == "gather":
                args[0].accelerator.wait_for_everyone()
            inside, started = True, time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent["logging"] += time.perf_counter() - started
                inside = False

        setattr(owner, name, wrapper)

    for name in ("add", "step", "gather"):
        timed(Meter, name)
    timed(TrainingReport, "measured")
    for name in ("_starts", "_ends"):
        timed(ForwardClock, name)
    timed(Watch, "at")
    original = engine.train_one_epoch

    def epoch(state: Any, *args: Any) -> Iterator[Any]:
        before, started = spent["logging"], time.perf_counter()
        yield from original(state, *args)
        if state.epoch >= 0:  # the first epoch warms up
            epochs.append((spent["logging"] - before, time.perf_counter() - started))

    engine.train_one_epoch = epoch
    sys.argv = [str(ROOT / "train" / "detect.py"), *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"LOGGING {sum(part for part, _ in epochs)} {sum(whole for _, whole in epochs)}")


def main() -> None:
    """Both numbers of processes, as a Markdown table."""
    arguments = [*QUICK.split(), *sys.argv[1:]]
    print("| processes | training steps | of it logging | share |\n| --- | --- | --- | --- |")
    for ranks in (1, 2):
        launcher = [sys.executable]
        if ranks > 1:
            config = ROOT / "accelerate_configs" / "multi_cpu.yaml"
            launcher += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
            launcher += ["--num_processes", str(ranks)]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
        environment |= {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // ranks, 1))}
        command = [*launcher, __file__, "--measure", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"the training failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        line = next(line for line in done.stdout.splitlines() if line.startswith("LOGGING"))
        logging, steps = map(float, line.split()[1:])
        print(f"| {ranks} | {steps:.1f} s | {logging * 1000:.0f} ms | {logging / steps:.2%} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
    else:
        main()
