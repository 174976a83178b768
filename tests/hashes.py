"""Print hashes of what trainings leave and say: two commits that print the same lines are bit-equal on this machine.

usage: python -m tests.hashes [--data coco128.yaml] [--only CASE …] [--keep FOLDER]

Five trainings, each on one process and on two, with a fixed seed: the quick recipe of the Makefile; the default recipe
for one epoch at 160 px (mosaic), on --data; YOLO26 with --end2end --multi-scale 0.5; --rect; a run that is killed in
its third epoch and resumed. Hashed are the weights in best.pt and last.pt, metrics.json, predictions.json, results.csv
without times and memory, and the console with times, memory and paths masked. The script knows the command line and
the files alone, nothing of the modules behind them, so that one copy of it can run on any two commits.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch

import train  # noqa: F401  # Ultralytics' settings in a folder of this process

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--imgsz 160 --batch 8 --nbs 16 --fraction 64 --val-limit 64 --warmup-epochs 1"
CASES = {
    "quick": "",  # the Makefile's
    "mosaic": "--imgsz 160 --epochs 1",
    "end2end": f"{SMALL} --epochs 2 --model yolo26n.yaml --end2end --multi-scale 0.5",
    "rect": f"{SMALL} --epochs 2 --rect",
    "resumed": f"{SMALL} --epochs 4 --log-interval 1",
}
COMMON = "--mixed-precision auto --trackers none --seed 0"
TIMES = {"seconds", "images_per_s", "peak_memory_gb"}  # columns of results.csv
MASKS = (  # what a run says of time, memory and places
    (r"\d+ images/s", "# images/s"),
    (r"data wait \d+% \(rank \d+\)", "data wait #"),
    (r"[\d.]+ GB \(rank \d+\)", "# GB"),
    (r"eta [\d:]+", "eta #"),
    (r"images in [\d.]+ s", "images in # s"),
    (r"(data|inference|postprocess|gather|metric) [\d.]+ \([\d.]+\)", r"\1 #"),
    (r"[\d.]+ ms an image", "# ms an image"),
    (r"took [\d:]+ \(h", "took # (h"),
)
PASSING = ("warning: slower than the median rank", "still ")  # lines that come and go with the load of the machine


def quick() -> str:
    """The recipe of `make train` on the built-in shapes."""
    found = re.search(r"^QUICK := ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    return found[1].replace("\\\n", " ")


def start(ranks: int, options: list[str], cwd: Path) -> subprocess.Popen:
    """Start train/detect.py on so many CPU processes that share the cores."""
    threads = max((os.cpu_count() or 1) // ranks, 1)
    base = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "YOLO_", "ACCELERATE_"))}
    base |= {"OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable]
    if ranks > 1:
        config = ROOT / "accelerate_configs" / "multi_cpu.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(ranks)]
    command += [str(ROOT / "train" / "detect.py"), *options]
    return subprocess.Popen(command, cwd=cwd, env=base, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)


def run(ranks: int, options: list[str], cwd: Path) -> str:
    """Train to the end; what the console got."""
    process = start(ranks, options, cwd)
    console, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(options)} on {ranks} processes ended with {process.returncode}:\n{console[-2000:]}")
    return console


def kill_in_the_third_epoch(ranks: int, options: list[str], cwd: Path) -> None:
    """Train until the first line of the third epoch, whose steps are not over, and kill every process of the run."""
    process = start(ranks, options, cwd)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 3/4  step 1/"):
            break
    else:
        sys.exit("the run ended before it could be killed")
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.communicate()


def digest(*parts: bytes) -> str:
    """SHA-256, short."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def of_weights(file: Path) -> str:
    """Of a checkpoint's tensors by name, with the epoch, the metrics and the class names that stand beside them."""
    checkpoint = torch.load(file, weights_only=False)  # this project's own, written a moment ago
    model = checkpoint["model"]
    parts = [json.dumps([checkpoint["epoch"], checkpoint["train_metrics"], list(model.names.items())]).encode()]
    for name, tensor in model.state_dict().items():
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), tensor.contiguous().numpy().tobytes()]
    return digest(*parts)


def of_results(file: Path) -> str:
    """Of results.csv without times and memory."""
    with open(file, newline="") as opened:
        rows = list(csv.DictReader(opened))
    return digest(json.dumps([{k: v for k, v in row.items() if k not in TIMES} for row in rows]).encode())


def of_console(text: str, cwd: Path) -> tuple[str, str]:
    """Of the console's lines, and the lines themselves."""
    lines = []
    for line in text.replace(str(cwd), "HERE").splitlines():
        if line.startswith(PASSING):
            continue
        for pattern, mask in MASKS:
            line = re.sub(pattern, mask, line)
        lines.append(line.rstrip())
    masked = "\n".join(lines)
    return digest(masked.encode()), masked


def main() -> None:
    """Run the cases and print a line for each hash."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes", help="data YAML of the case `mosaic`")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--keep", type=Path, help="leave the runs and the masked consoles in this folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = (given.keep or Path(temporary)).resolve()
        home.mkdir(parents=True, exist_ok=True)
        for name in given.only:
            for ranks in (1, 2):
                options = [*COMMON.split(), *(CASES[name] or quick()).split(), "--name", f"{name}{ranks}"]
                if name == "mosaic" and given.data != "shapes":
                    options += ["--data", str(Path(given.data).resolve())]
                folder = home / "runs" / "detect" / f"{name}{ranks}"
                if name == "resumed":
                    kill_in_the_third_epoch(ranks, options, home)
                    options = ["--resume", str(folder)]
                hashed, masked = of_console(run(ranks, options, home), home)
                (home / f"{name}{ranks}.txt").write_text(masked)
                hashes = {f"{part}.pt": of_weights(folder / "weights" / f"{part}.pt") for part in ("best", "last")}
                hashes |= {part: digest((folder / part).read_bytes()) for part in ("metrics.json", "predictions.json")}
                hashes |= {"results.csv": of_results(folder / "results.csv"), "console": hashed}
                for part, value in hashes.items():
                    print(f"{name:8} {ranks} {part:17} {value}", flush=True)


if __name__ == "__main__":
    main()
