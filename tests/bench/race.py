"""Ultralytics' trainer and this one, side by side: `make bench ARGS="--data coco128.yaml"`.

usage: python -m tests.bench.race [--data DATA.yaml] [--only same default …] [--turns 5] [--json FILE] [--plot FILE]

Both train the same model on the same data (the built-in shapes without --data) with the same batch, image size and
epochs, in turn (A B A B …), each in processes of its own, on the GPU where there is one. A ratio is of the two runs of
one turn. The table has the median of the turns, the lowest and the highest; of five turns these two enclose the true
median with a probability of 94 %, and a ratio whose range holds 1 is called equal. Memory is the proportional set of
all processes of a run, at its highest. The JSON has the command lines, versions, threads and workers of both sides;
after a failure it has what came before.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import yaml

from tests.bench.data import job as data_job
from tests.bench.data import linked, proportional, sources
from tests.hashes import quick
from train.processes.cores import core_count

ROOT = Path(__file__).resolve().parents[2]
MODEL, IMGSZ, BATCH = "yolov8n.yaml", 320, 16
GPU = torch.cuda.is_available()
SHORT, WHOLE = 4, 10  # epochs
OUTSIDE = ("copy", "EMA", "measuring", "report")  # of a step: not forward, loss, backward, optimizer, all-reduce, data
Until = Literal["first step", "end", "AP"]
KEPT = Path(tempfile.gettempdir()) / f"bench-{os.getuid()}"  # settings, font and index, which later runs find


@dataclass
class Run:
    """One training of one side."""

    command: list[str]
    seconds: dict[str, float] = field(default_factory=dict)  # since the command: first step, first epoch, end
    epochs: list[float] = field(default_factory=list)  # seconds from a validation to the end of the next steps
    validations: list[float] = field(default_factory=list)  # seconds
    saves: list[float] = field(default_factory=list)  # seconds that the training has waited for them in an epoch
    outside: dict[str, float] = field(default_factory=dict)  # shares of a step by part, of the parts in OUTSIDE
    uses: dict[str, int] = field(default_factory=dict)  # threads and workers of a process
    memory: int = 0  # bytes
    ap: float = 0.0


# The two sides --------------------------------------------------------------------------------------------------------
def job_ultralytics(arguments: dict[str, Any], wandb: bool) -> None:
    """`yolo detect train`, saying on lines of its own what it has done."""
    from ultralytics import YOLO, settings

    settings.update({"wandb": wandb})
    stopped: dict[str, float] = {}

    def say(*words: object) -> None:
        print("BENCH", *words, flush=True)

    def begins(trainer: Any) -> None:
        save = trainer.save_model

        def saved() -> bool:
            begun = time.perf_counter()
            written = save()
            say("saved", time.perf_counter() - begun)
            return written

        trainer.save_model = saved

    def stepped(trainer: Any) -> None:
        if not stopped:
            stopped["first"] = 1
            say("threads", torch.get_num_threads())
            say("workers", trainer.train_loader.num_workers)
            say("first")

    def validating(validator: Any) -> None:
        stopped["validation"] = time.perf_counter()

    model = YOLO(arguments.pop("model"))
    model.add_callback("on_train_start", begins)
    model.add_callback("on_train_batch_end", stepped)
    model.add_callback("on_train_epoch_end", lambda _: say("trained"))
    model.add_callback("on_val_start", validating)
    model.add_callback("on_val_end", lambda _: say("validated", time.perf_counter() - stopped["validation"]))
    model.train(**arguments)


def ultralytics(
    recipe: dict[str, Any], threads: int | None, wandb: bool = False, until: Until = "end", **more: Any
) -> Run:
    """Train with Ultralytics; with the threads that it takes by itself, or so many and as many workers; until the first
    step is done, to the end, or until its last weights are measured.
    """
    arguments = {"model": MODEL, "device": 0 if GPU else "cpu", "plots": False} | recipe | more
    if threads:
        arguments["workers"] = threads
    with tempfile.TemporaryDirectory() as folder:
        shown = ["yolo", "detect", "train", *(f"{name}={value}" for name, value in arguments.items())]
        run = Run(shown)
        asked = json.dumps({"arguments": arguments | {"project": folder}, "wandb": wandb})
        for stamp, line in _watched([sys.executable, "-m", "tests.bench.race", "--job", asked], folder, threads, run):
            what, value = said.groups() if (said := re.search(r"BENCH (\w+) ?([\d.]*)", line)) else ("", "")
            if what == "first":  # a bar may stand before it
                run.seconds["first"] = stamp
            elif what == "trained":
                _trained(run, stamp)
            elif what == "validated":
                run.validations.append(float(value))
                run.seconds["validated"] = stamp
            elif what == "saved":
                run.saves.append(float(value))
            elif what:
                run.uses[what] = int(value)
            if until == "first step" and "first" in run.seconds:
                break
        if until == "AP":
            run.ap = coco_ap(Path(folder), arguments)
    return run


def ours(
    recipe: dict[str, Any],
    threads: int | None,
    *more: str,
    ranks: int = 1,
    until: Until = "end",
    script: str = "detect",
) -> Run:
    """The same with this project."""
    options = ["--no-plots", *more, *(["--workers", str(threads)] if threads else [])]
    plain = {"model": MODEL} | ({} if "--trackers" in more else {"trackers": "none"})
    for name, value in (plain | recipe).items():
        options += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    command = [str(ROOT / "train" / f"{script}.py"), *options]
    if ranks > 1:
        kind = "multi_gpu" if GPU else "multi_cpu"
        config = str(ROOT / "accelerate_configs" / f"{kind}.yaml")
        command = [
            "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(ranks), *command
        ]  # fmt: skip
    run = Run(["python", *command])
    with tempfile.TemporaryDirectory() as folder:
        for stamp, line in _watched([sys.executable, *command, "--project", folder], folder, threads, run):
            if re.match(r"epoch \d+/\d+  step 1/", line):
                run.seconds["first"] = stamp
            elif re.match(r"epoch \d+/\d+  train ", line):
                _trained(run, stamp)
            elif re.search(r" val  .*  AP ", line):
                run.seconds["validated"] = stamp
            elif said := re.match(r"processes .* (\d+) threads each", line):
                (config,) = Path(folder).rglob("config.json")
                workers = json.loads(config.read_text())["workers"]
                run.uses = {"threads": int(said[1]), "workers": min(workers, core_count() // ranks)}
            elif said := re.match(r"profile +(.*?) +([\d.]+) ms +([\d.]+)%", line):
                if said[1] == "checkpoint":
                    run.saves.append(float(said[2]) / 1000)
                elif said[1] in OUTSIDE:
                    run.outside[said[1]] = run.outside.get(said[1], float(said[3]) / 100)  # a step's parts come first
            elif line.startswith("validation took"):
                run.validations.append(sum(map(float, re.findall(r"[a-z] ([\d.]+) \(", line))))
            if until == "first step" and "first" in run.seconds:
                break
        if until == "AP":
            run.ap = coco_ap(Path(folder), recipe)
    return run


def coco_ap(folder: Path, recipe: dict[str, Any]) -> float:
    """COCO's AP of the last weights in a folder, of either side: each one's own is another measure of other weights."""
    (weights,) = folder.rglob("last.pt")
    options = ["--weights", weights, "--data", recipe["data"], "--imgsz", recipe["imgsz"], "--mixed-precision", "no"]
    command = [sys.executable, ROOT / "train" / "validate.py", *options, "--no-plots", "--save-dir", folder / "val"]
    subprocess.run([*map(str, command)], cwd=folder, capture_output=True, check=True)
    return float(json.loads((folder / "val" / "metrics.json").read_text())["AP"])


def _trained(run: Run, stamp: float) -> None:
    """All steps of an epoch are done."""
    run.seconds.setdefault("trained", stamp)
    if before := run.seconds.get("validated"):
        run.epochs.append(stamp - before)


def _watched(command: list[str], folder: str, threads: int | None, run: Run) -> Any:
    """Run a command; its lines, each with the seconds since it was started. Its memory and its end go into `run`."""
    drop = ("WANDB_", "YOLO_", "OMP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "YOLO_CONFIG_DIR": str(KEPT),
        "XDG_CACHE_HOME": str(KEPT),
    }
    if not GPU:
        environment["ACCELERATE_USE_CPU"] = "true"
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    tree, done, lines = psutil.Process(process.pid), threading.Event(), []

    def measure() -> None:
        while not done.wait(1.0):
            run.memory = max(run.memory, proportional(tree))

    poll = threading.Thread(target=measure)
    poll.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append(line)
            yield time.perf_counter() - begun, line
        if process.wait():
            sys.exit(f"{' '.join(command)} failed:\n{''.join(lines)[-3000:]}")
        run.seconds["end"] = time.perf_counter() - begun
    finally:  # who asked may have heard enough
        done.set()
        poll.join()
        with contextlib.suppress(psutil.Error):
            for one in (*tree.children(recursive=True), tree):
                one.kill()
        process.wait()


# The table ------------------------------------------------------------------------------------------------------------
class Table:
    """Rows of ratios, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        print("| | Ultralytics | here | ratio | |\n| --- | --- | --- | --- | --- |", flush=True)

    def row(self, what: str, theirs: list[float], mine: list[float], unit: str, less: bool = False) -> None:
        """A row of what was measured in each turn.

        Args:
            what: was measured.
            theirs: by turn.
            mine: by turn.
            unit: of both, as in "{:.1f} s".
            less: whether less is better; the ratio is ours over theirs in either case.
        """
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        verdict = "equal" if low <= 1 <= high else "better" if (middle < 1) == less else "worse"
        cells = [what, *(unit.format(statistics.median(values)) for values in (theirs, mine))]
        cells += [f"{middle:.2f} ({low:.2f} to {high:.2f})", verdict]
        print(f"| {' | '.join(cells)} |", flush=True)
        self.rows.append({"what": what, "theirs": theirs, "ours": mine, "ratio": [low, middle, high], "less": less})


def turns(count: int, *sides: Callable[[], Run]) -> list[list[Run]]:
    """The runs of each side, made in turn."""
    made: list[list[Run]] = [[] for _ in sides]
    for _ in range(count):
        for runs, side in zip(made, sides, strict=True):
            runs.append(side())
    return made


def rate(runs: list[Run], images: int, what: str = "epochs") -> list[float]:
    """Images a second by run."""
    return [images / statistics.median(getattr(run, what)) for run in runs]


def whole(table: Table, name: str, made: list[list[Run]], images: tuple[int, int]) -> None:
    """The rows of two sides' whole runs."""
    theirs, mine = made
    table.row(f"{name}: training images/s", rate(theirs, images[0]), rate(mine, images[0]), "{:.1f}")
    table.row(
        f"{name}: validation images/s",
        rate(theirs, images[1], "validations"), rate(mine, images[1], "validations"), "{:.1f}",
    )  # fmt: skip
    seconds = [[run.seconds["end"] for run in runs] for runs in made]
    epochs = mine[0].command[mine[0].command.index("--epochs") + 1]
    table.row(f"{name}: whole run of {epochs} epochs", *seconds, "{:.1f} s", less=True)
    memory = [[run.memory / 1e6 for run in runs] for runs in made]
    table.row(f"{name}: peak memory", *memory, "{:.0f} MB", less=True)


def main() -> None:
    """Run the parts that are asked for; print Markdown, write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("same", "default", "bf16", "two", "compile", "start", "profile", "pipeline", "ap")
    parser.add_argument("--data", help="a data YAML with real images; without it the built-in shapes")
    parser.add_argument("--only", nargs="+", choices=parts, default=[*parts])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    parser.add_argument("--plot", type=Path, help="file for a picture of the ratios")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        job_ultralytics(**json.loads(given.job))
        return
    KEPT.mkdir(exist_ok=True)
    table, runs = Table(), {}
    try:
        race(given, table, runs)
    finally:  # a run that fails takes none with it that were measured before
        keep(given, table, runs)


def keep(given: argparse.Namespace, table: Table, runs: dict[str, Any]) -> None:
    """Write the JSON and the picture."""
    about = {name: version(name) for name in ("torch", "ultralytics", "accelerate", "opencv-python")}
    about |= {"python": platform.python_version(), "cores": str(os.cpu_count())}
    if given.json:
        every = {what: [[vars(run) for run in side] for side in sides] for what, sides in runs.items()}
        given.json.write_text(json.dumps({"about": about, "rows": table.rows, "runs": every}, indent=1))
    if given.plot:
        plot(table.rows, given.plot)


def race(given: argparse.Namespace, table: Table, runs: dict[str, Any]) -> None:
    """Run the parts that are asked for, a row after the other; what the rows are made of goes into `runs`."""
    from train.data.files import find_data
    from train.data.shapes import draw_shapes

    data = seen_by_both(str(given.data or draw_shapes(KEPT)))
    found = find_data(data)
    images = (len(found.images("train")), len(found.images("val")))
    used, few = set(given.only), given.turns
    if GPU and torch.cuda.device_count() < 2 and "two" in used:
        used.remove("two")
        print("(one GPU: no row of two processes)", flush=True)
    short = {"data": data, "imgsz": IMGSZ, "batch": BATCH, "epochs": SHORT}
    long = short | {"epochs": WHOLE}
    fp32 = ("--mixed-precision", "no")
    if "same" in used:
        what = "fp32, one thread and worker each" if not GPU else "fp32, one worker each"
        runs[what] = turns(few, lambda: ultralytics(long, 1, amp=False), lambda: ours(long, 1, *fp32))
        whole(table, what, runs[what], images)
    if used & {"default", "bf16"}:
        what = "fp32, as each runs by default"
        sides = [lambda: ultralytics(short, None, amp=False), lambda: ours(short, None, *fp32)]
        sides.append(lambda: ours(short, None, "--mixed-precision", "bf16"))
        sides += [lambda: ultralytics(short, None, amp=True)] * GPU  # which it has not on a CPU
        plain = turns(few, *sides)
        runs[what], runs["bf16"] = plain[:2], [plain[-1] if GPU else plain[0], plain[2]]
        whole(table, what, runs[what], images)
        theirs, mine = (rate(side, images[0]) for side in runs["bf16"])
        table.row("bf16 here, as each runs by default: training images/s", theirs, mine, "{:.1f}")
    if "two" in used:
        for precision in ("no", "bf16"):
            words = ("--mixed-precision", precision)
            what = f"two processes of one thread against one, {precision.replace('no', 'fp32')}: training images/s"
            sides = [lambda words=words: ours(short, 1, *words)]
            sides.append(lambda words=words: ours(short, 1, *words, ranks=2))
            runs[what] = turns(few, *sides)
            one, two = (rate(side, images[0]) for side in runs[what])
            table.row(what, one, two, "{:.1f}")
    if "compile" in used:
        what = "--compile against without, fp32, one thread"
        runs[what] = turns(few, lambda: ours(short, 1, *fp32), lambda: ours(short, 1, *fp32, "--compile"))
        plain, compiled = (rate(side, images[0]) for side in runs[what])
        table.row(f"{what}: training images/s", plain, compiled, "{:.1f}")
        first = [[run.seconds["trained"] for run in side] for side in runs[what]]
        table.row(f"{what}: command to the end of the first epoch", *first, "{:.1f} s", less=True)
    if "start" in used:
        for what, wandb, trackers in (("no trackers", False, "none"), ("W&B offline", True, "wandb")):
            runs[what] = turns(
                few,
                lambda wandb=wandb: ultralytics(short, None, wandb=wandb, until="first step"),
                lambda words=("--trackers", trackers, "--log-interval", "1"): ours(
                    short, None, *words, until="first step"
                ),
            )
            seconds = [[run.seconds["first"] for run in side] for side in runs[what]]
            table.row(f"command to first step, {what}", *seconds, "{:.2f} s", less=True)
        imports = ("from ultralytics.models.yolo.detect import DetectionTrainer", "import train.detect")
        table.row("import of the training script", *imported(few, *imports), "{:.2f} s", less=True)
    if "profile" in used:
        what = "fp32, one thread and worker each, --profile 20"
        sides = [lambda: ultralytics(short, 1, amp=False), lambda: ours(short, 1, *fp32, "--profile", "20")]
        runs[what] = turns(few, *sides)
        saves = [[statistics.median(run.saves) for run in side] for side in runs[what]]
        table.row("checkpoint: what an epoch waits for it", *saves, "{:.3f} s", less=True)
        outside = statistics.median(sum(run.outside.values()) for run in runs[what][1])
        print(f"| share of a step in {', '.join(OUTSIDE)} | | {outside:.1%} | | |", flush=True)
    if "pipeline" in used:
        pipeline(table, given.data, few)
    if "ap" in used:
        accuracy(table, runs, few)


def imported(count: int, *statements: str) -> list[list[float]]:
    """Seconds that a new Python needs for each of these, in turn."""
    made: list[list[float]] = [[] for _ in statements]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "YOLO_CONFIG_DIR": str(KEPT)}
    for _ in range(count):
        for seconds, statement in zip(made, statements, strict=True):
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], env=environment, check=True, capture_output=True)
            seconds.append(time.perf_counter() - begun)
    return made


def seen_by_both(data: str) -> str:
    """A YAML of links to the images and labels, beside which Ultralytics may write, and whose path both take alike."""
    from train.data.files import find_data
    from train.data.listing import label_file

    found, folder = find_data(data), KEPT / "links"
    shutil.rmtree(folder, ignore_errors=True)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i, file in enumerate(found.images(split)):
            (folder / "images" / split / f"{i:07}{Path(file).suffix}").symlink_to(file)
            if Path(label_file(file)).exists():
                (folder / "labels" / split / f"{i:07}.txt").symlink_to(label_file(file))
    content = {"path": str(folder), "train": "images/train", "val": "images/val", "names": found.names}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "data.yaml")


def pipeline(table: Table, data: str | None, count: int) -> None:
    """Samples a second of one worker of each side."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pairs, names = sources(data, folder)
        few = linked(pairs, names, folder / "few", 128, 8)
        theirs: list[dict[str, float]] = []
        mine: list[dict[str, float]] = []
        for _ in range(count):
            theirs.append(data_job("pipeline_ultralytics", few, cores="0"))
            mine.append(data_job("pipeline", few, folder / "kept", "", cores="0"))
    for share in (16, 2):
        for kind, words in (("none", "no cache"), ("ram", "--cache ram")):
            what = f"pipeline at 640 px with mosaic, one core, {share} positions of a batch, {words}: samples/s"
            table.row(what, [one[kind] for one in theirs], [one[f"{kind} {share}"] for one in mine], "{:.0f}")


def accuracy(table: Table, runs: dict[str, Any], seeds: int) -> None:
    """COCO's AP on the built-in shapes by the recipe of `make train`, a seed after the other."""
    from train.data.shapes import draw_shapes

    words = re.findall(r"--([\w-]+)(?: ([^\s-]\S*))?", quick())
    recipe = {name.replace("-", "_"): yaml.safe_load(value) if value else True for name, value in words}
    recipe["data"] = seen_by_both(str(draw_shapes(KEPT)))
    made = turns(
        1,
        *(lambda seed=seed: ultralytics(recipe | {"seed": seed}, None, until="AP", amp=False) for seed in range(seeds)),
        *(
            lambda seed=seed: ours(recipe | {"seed": seed}, None, "--mixed-precision", "no", until="AP")
            for seed in range(seeds)
        ),
    )
    theirs, mine = ([runs[0].ap for runs in side] for side in (made[:seeds], made[seeds:]))
    runs["AP"] = [[side[0] for side in made[:seeds]], [side[0] for side in made[seeds:]]]
    error = math.hypot(*(statistics.stdev(values) / len(values) ** 0.5 for values in (theirs, mine)))
    mean = [statistics.mean(values) for values in (theirs, mine)]
    verdict = "equal" if abs(mean[1] - mean[0]) <= error else "better" if mean[1] > mean[0] else "worse"
    what = f"AP on the built-in shapes, mean of {seeds} seeds, fp32"
    cells = [what, *(f"{value:.3f}" for value in mean), f"{mean[1] - mean[0]:+.3f} (standard error {error:.3f})"]
    print(f"| {' | '.join(cells)} | {verdict} |", flush=True)
    table.rows.append({"what": what, "theirs": theirs, "ours": mine, "error": error})


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """The ratios as bars to the right of 1 where this project is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if "ratio" in row][::-1]
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(rows) + 1), layout="constrained")
    for i, row in enumerate(rows):
        low, middle, high = sorted(1 / value if row["less"] else value for value in row["ratio"])
        colour = "tab:gray" if low <= 1 <= high else "tab:green" if middle > 1 else "tab:red"
        axes.barh(i, middle - 1, left=1, color=colour)
        axes.plot([low, high], [i, i], color="black", linewidth=1)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["what"] for row in rows], fontsize=8)
    axes.set_xscale("log", base=2)
    ticks = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axes.set_xlim(0.25, 4)
    words = "times as good as Ultralytics (two processes, --compile: as without); the line is the range of the turns"
    figure.supxlabel(words, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
