"""What the index and the image cache are worth: `make bench-data ARGS="--data coco128.yaml"`.

usage: python -m tests.bench.data [--data DATA.yaml] [--images 1000000] [--folder FOLDER] [--only scan start …]

The images of --data (the built-in shapes without) stand under other names, as hard links in FOLDER, and lie in the page
cache. Ultralytics does the same work in turns with this project, each as its command line says. Medians of the turns;
memory is the proportional set of all processes. Prints Markdown.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "fixtures" / "tiny.yaml"
TURNS = 3
MANY = 60_000
# Images to train on and to validate on; and which part uses which
SIZES = {"few": (128, 128), "many": (MANY, 128), "val": (128, 5000), "cached": (1000, 8)}
USED = {
    "scan": ["many"],
    "start": ["few", "many", "most", "val"],
    "validation": ["few", "val"],
    "pipeline": ["few", "cached"],
}
OPTIONS = f"--model {TINY} --imgsz 64 --batch 16 --nbs 16 --optimizer SGD --trackers none --no-plots --log-interval 1"


# The data sets --------------------------------------------------------------------------------------------------------
def sources(data: str | None, folder: Path) -> tuple[list[tuple[Path, Path]], dict[int, str]]:
    """Copies of the images and labels, where links to them can be made; and the class names."""
    from train.data.files import find_data
    from train.data.listing import label_file
    from train.data.shapes import draw_shapes

    found = find_data(data or str(draw_shapes(folder / "drawn", {"train": 128, "val": 8})))
    (folder / "source").mkdir()
    pairs = []
    for file in map(Path, found.images("train")):
        image, label = folder / "source" / file.name, folder / "source" / f"{file.stem}.txt"
        shutil.copy(file, image)
        text = Path(label_file(str(file)))
        label.write_bytes(text.read_bytes() if text.exists() else b"")
        pairs.append((image, label))
    return pairs, found.names


def linked(pairs: list[tuple[Path, Path]], names: dict[int, str], folder: Path, train: int, val: int) -> str:
    """The YAML of a data set of so many links."""
    for split, images in (("train", train), ("val", val)):
        for kind, which in (("images", 0), ("labels", 1)):
            (folder / kind / split).mkdir(parents=True)
            for i in range(images):
                source = pairs[i % len(pairs)][which]
                os.link(source, folder / kind / split / f"{i:07}{source.suffix}")
    content = {"path": str(folder), "train": "images/train", "val": "images/val", "names": names}
    (folder / "data.yaml").write_text(json.dumps(content))
    return str(folder / "data.yaml")


# What one process does, for the turns ---------------------------------------------------------------------------------
def job_scan(data: str, kept: str) -> dict[str, float]:
    """Seconds of this project's first scan."""
    from accelerate import Accelerator

    from train.config.options import EvalConfig
    from train.data.files import find_data
    from train.data.scan import read_index

    accelerator, found = Accelerator(cpu=True), find_data(data)
    begun = time.perf_counter()
    read_index(found, ("train",), EvalConfig(index_dir=kept), accelerator)
    return {"seconds": time.perf_counter() - begun}


def job_scan_ultralytics(data: str) -> dict[str, float]:
    """Seconds of Ultralytics' first scan: its data set without a cache file."""
    import yaml
    from ultralytics.cfg import get_cfg
    from ultralytics.data.dataset import YOLODataset

    content = yaml.safe_load(Path(data).read_text())
    cache = Path(content["path"]) / "labels" / "train.cache"
    cache.unlink(missing_ok=True)
    begun = time.perf_counter()
    YOLODataset(f"{content['path']}/images/train", data=content, augment=False, hyp=get_cfg())
    seconds = time.perf_counter() - begun
    cache.unlink()
    return {"seconds": seconds}


def job_pipeline(data: str, kept: str, cold: str) -> dict[str, float]:
    """Samples a second of one worker: 640 px, mosaic; by kind of cache, and positions that a rank has of a batch."""
    import cv2
    import torch
    from accelerate import Accelerator

    from train.config.options import TrainConfig
    from train.data.cache import cache_images
    from train.data.files import find_data
    from train.data.labels import train_labels
    from train.data.scan import read_index
    from train.data.sets import TrainSet
    from train.processes.allocator import keep_freed

    keep_freed()  # as a worker does
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    accelerator, found = Accelerator(cpu=True), find_data(data)
    sets: dict[str, TrainSet] = {}
    for kind in ("none", "ram", "disk"):
        config = TrainConfig(imgsz=640, epochs=1000, cache=None if kind == "none" else kind, index_dir=kept)  # type: ignore[arg-type]
        index = read_index(found, ("train",), config, accelerator)["train"]
        sets[kind] = TrainSet(train_labels(index, len(found.names), config), found, config)
        cache_images({"train": sets[kind]}, config, accelerator, lambda line: None, lambda images, _: images)
    rates: dict[str, list[float]] = {}
    for turn in range(2 if cold else 6):
        for kind, images in sets.items():
            for share in (16,) if cold else (16, 2):
                if cold:
                    forget([images.im_files[i] for i in range(len(images))])
                    forget([str(images.cached.file)] if images.cached is not None else [])
                done, begun = 0, time.perf_counter()
                for epoch in range(1 if share == 16 else 4):
                    for start in range(0, len(images) // 16 * 16, 16):
                        keys = [(10 * turn + epoch, start + p, False, ()) for p in range(share)]
                        done += len(images.__getitems__(keys))
                rates.setdefault(f"{kind} {share}", []).append(done / (time.perf_counter() - begun))
    return {name: statistics.median(values) for name, values in rates.items()}


def job_pipeline_ultralytics(data: str) -> dict[str, float]:
    """The same of Ultralytics' data set, from its buffer and with cache=ram."""
    import cv2
    import torch
    import yaml
    from ultralytics.cfg import get_cfg
    from ultralytics.data.dataset import YOLODataset

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    content, rates = yaml.safe_load(Path(data).read_text()), {}
    for kind in ("none", "ram"):
        images = YOLODataset(
            f"{content['path']}/images/train", data=content, augment=True, hyp=get_cfg(), imgsz=640,
            cache=kind == "ram", batch_size=16,
        )  # fmt: skip
        found = []
        for turn in range(6):
            random.seed(turn)
            order = random.sample(range(len(images)), len(images))
            begun = time.perf_counter()
            for i in order:
                images[i]
            found.append(len(order) / (time.perf_counter() - begun))
        rates[kind] = statistics.median(found)
    (Path(content["path"]) / "labels" / "train.cache").unlink(missing_ok=True)
    return rates


def job_clean() -> dict[str, float]:
    """Remove what killed runs have left in the memory."""
    from train.data import cache

    cache.sweep()
    return {}


def forget(files: list[str]) -> None:
    """Drop files from the page cache."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def job_start_ultralytics(data: str) -> dict[str, float]:
    """Train with Ultralytics until the first step is done; seconds since Python began."""
    from ultralytics import YOLO

    def done(trainer: Any) -> None:
        raise StopIteration

    model = YOLO(str(TINY))
    model.add_callback("on_train_batch_end", done)
    with contextlib.suppress(StopIteration):
        model.train(
            data=data, imgsz=64, batch=16, nbs=16, optimizer="SGD", workers=2, epochs=100, plots=False, device="cpu",
            project=tempfile.mkdtemp(), verbose=False,
        )  # fmt: skip
    memory = proportional(psutil.Process())
    return {"seconds": time.time() - psutil.Process().create_time(), "bytes": memory}


def job(name: str, *arguments: object, cores: str = "") -> dict[str, float]:
    """Run one of the above in a process of its own."""
    command = [*(["taskset", "-c", cores] if cores else []), sys.executable, "-m", "tests.bench.data", "--job", name]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "YOLO_VERBOSE": "false"}
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


# Whole runs -----------------------------------------------------------------------------------------------------------
def proportional(process: psutil.Process) -> int:
    """Bytes of a process and all below it, shared memory divided among those that share it."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += one.memory_full_info().pss
    return total


def run(
    data: str, folder: Path, ranks: int, until: str, *more: str, after: float = 3.0
) -> tuple[float, int, list[int], list[str]]:
    """Start a training, and end it some time after it has said something.

    Returns:
        seconds until it did; bytes then; bytes at the end of each epoch; all lines.
    """
    command = [sys.executable]
    if ranks > 1:
        config = ROOT / "accelerate_configs" / "multi_cpu.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(ranks)]
    plain = OPTIONS.replace("--imgsz 64 ", "") if "--imgsz" in more else OPTIONS
    command += [str(ROOT / "train" / "detect.py"), "--data", data, *plain.split(), "--workers", "2", *more]
    command += ["--index-dir", str(folder / "kept"), "--project", str(folder / "runs")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    lines, epochs = [], []
    while not re.search(until, line := process.stdout.readline()):
        if not line:
            raise SystemExit(f"{' '.join(command)} failed:\n" + "".join(lines[-20:]))
        lines.append(line)
        if " val  " in line:
            epochs.append(proportional(psutil.Process(process.pid)))
    seconds = time.perf_counter() - begun
    end = time.monotonic() + after
    while time.monotonic() < end:
        process.stdout.readline()
    memory = proportional(psutil.Process(process.pid))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return seconds, memory, epochs, [*lines, line]


def turns(count: int, *works: Callable[[], float]) -> list[float]:
    """Medians of several works, done in turn."""
    found: list[list[float]] = [[] for _ in works]
    for _ in range(count):
        for values, work in zip(found, works, strict=True):
            values.append(work())
    return [statistics.median(values) for values in found]


def row(*cells: str) -> None:
    """A row of the table."""
    print(f"| {' | '.join(cells)} |", flush=True)


FIRST = r"step 1/"


def scan(sets: dict[str, str], folder: Path) -> None:
    """The first scan."""

    def ours(cores: str) -> float:
        shutil.rmtree(folder / "scanned", ignore_errors=True)
        return job("scan", sets["many"], folder / "scanned", cores=cores)["seconds"]

    for cores, words in (("", "as each runs"), ("0", "on one core each")):
        mine, theirs = turns(
            TURNS,
            lambda cores=cores: ours(cores),
            lambda cores=cores: job("scan_ultralytics", sets["many"], cores=cores)["seconds"],
        )
        row(f"first scan of {MANY:,} images, {words}", f"{theirs:.1f} s", f"{mine:.1f} s", f"{theirs / mine:.2f}x")


def start(sets: dict[str, str], folder: Path) -> None:
    """From the command to the first step, with a valid index; and memory with 2 ranks of 2 workers."""
    for name in sets:
        run(sets[name], folder, 1, FIRST, after=0)  # so that the indexes are there
    quiet = ("--epochs", "1000", "--val-interval", "1000")

    def seconds(name: str) -> float:
        return run(sets[name], folder, 1, FIRST, *quiet, after=0)[0]

    few, many, most, val = turns(TURNS, *(lambda name=name: seconds(name) for name in ("few", "many", "most", "val")))
    job("start_ultralytics", sets["many"])
    theirs = job("start_ultralytics", sets["many"])
    row("command to the first step, 128 images", "", f"{few:.1f} s", "")
    row(f"the same, {MANY:,} images", f"{theirs['seconds']:.1f} s", f"{many:.1f} s", f"{many - few:+.1f} s")
    row(f"the same, {count(sets['most']):,} images", "", f"{most:.1f} s", f"{most - few:+.1f} s")
    row("the same, 128 images to train on and 5,000 to validate on", "", f"{val:.1f} s", f"{val - few:+.1f} s")
    memory = {name: run(sets[name], folder, 2, FIRST, *quiet)[1] / 1e6 for name in ("few", "many", "most")}
    base, size = memory["few"], index_size(folder, sets["most"]) / 1e6
    row("memory, 2 ranks of 2 workers, 128 images", "", f"{base:.0f} MB", "")
    added, other = memory["many"] - base, f"1 rank: {theirs['bytes'] / 1e6:.0f} MB"
    row(f"the same, {MANY:,} images", other, f"{memory['many']:.0f} MB", f"{added:+.0f} MB")
    added = memory["most"] - base
    words = f"{added:+.0f} MB; index {size:.0f} MB, {added / size:.2f} of it"
    row(f"the same, {count(sets['most']):,} images", "", f"{memory['most']:.0f} MB", words)


def validation(sets: dict[str, str], folder: Path) -> None:
    """Memory after a validation, of 128 and of 5,000 images; and over ten epochs."""
    sure = ("--epochs", "100", "--conf", "0.9")
    few, many = (run(sets[name], folder, 2, " val  ", *sure)[1] / 1e6 for name in ("few", "val"))
    what = "memory after a validation of 128 and of 5,000 images without detections, 2 ranks"
    row(what, "", f"{few:.0f} MB, {many:.0f} MB", f"{many - few:+.0f} MB")
    epochs = run(sets["few"], folder, 2, "epoch 11/.* val  ", "--epochs", "100", after=0)[2]
    second, tenth = epochs[1] / 1e6, epochs[9] / 1e6
    row("memory after epochs 2 and 10", "", f"{second:.0f} MB, {tenth:.0f} MB", f"{tenth - second:+.0f} MB")


def pipeline(sets: dict[str, str], folder: Path) -> None:
    """What the image cache gives, and what it takes."""
    ours = [job("pipeline", sets["few"], folder / "kept", "", cores="0") for _ in range(TURNS)]
    theirs = [job("pipeline_ultralytics", sets["few"], cores="0") for _ in range(TURNS)]
    rate = {name: statistics.median(one[name] for one in ours) for name in ours[0]}
    rate_theirs = {name: statistics.median(one[name] for one in theirs) for name in theirs[0]}
    for share in (16, 2):
        for kind, words in (("none", "no cache"), ("ram", "--cache ram"), ("disk", "--cache disk")):
            other = rate_theirs.get(kind) if share == 16 else None
            row(
                f"training pipeline, 640 px with mosaic, one core, {share} positions of a batch, {words}",
                f"{other:.0f}/s" if other else "", f"{rate[f'{kind} {share}']:.0f}/s",
                "" if kind == "none" else f"{rate[f'{kind} {share}'] / rate[f'none {share}']:.2f}x no cache",
            )  # fmt: skip
    cold = job("pipeline", sets["few"], folder / "kept", "cold", cores="0")
    for kind in ("ram", "disk"):
        row(
            f"the same with all files out of the page cache, --cache {kind}", "", f"{cold[f'{kind} 16']:.0f}/s",
            f"{cold[f'{kind} 16'] / cold['none 16']:.2f}x no cache ({cold['none 16']:.0f}/s)",
        )  # fmt: skip
    options = ("--epochs", "1000", "--val-interval", "1000", "--imgsz", "640")
    before = shutil.disk_usage("/dev/shm").used
    plain = run(sets["cached"], folder, 2, FIRST, *options, after=20)[1]
    _, cached, _, lines = run(sets["cached"], folder, 2, FIRST, *options, "--cache", "ram", after=20)
    said = next(line for line in lines if line.startswith("cache      train"))
    taken = (shutil.disk_usage("/dev/shm").used - before) / 1e6  # the killed run has left it
    found = f"{taken:.0f} MB in /dev/shm, {(cached - plain) / 1e6:.0f} MB of it mapped so far"
    row(
        "memory that --cache ram takes, 2 ranks of 2 workers",
        "one copy a rank",
        found,
        said.split(", ")[1].split(" in ")[0],
    )
    job("clean")


def count(data: str) -> int:
    """Train images."""
    return len(os.listdir(Path(data).parent / "images" / "train"))


def index_size(folder: Path, data: str) -> int:
    """Bytes of the largest index."""
    return max(file.stat().st_size for file in (folder / "kept").glob("*.labels*"))


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a data YAML with real images; without it the built-in shapes")
    parser.add_argument("--images", type=int, default=1_000_000, help="of the largest data set")
    parser.add_argument("--folder", type=Path, help="for links and indexes; a temporary one without")
    parts = {"scan": scan, "start": start, "validation": validation, "pipeline": pipeline}
    parser.add_argument("--only", nargs="+", choices=parts, default=[*parts])
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        name, *arguments = given.job
        print(json.dumps(globals()[f"job_{name}"](*arguments)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary)
        pairs, names = sources(given.data, folder)
        used = {name for part in given.only for name in USED[part]}
        sizes = SIZES | {"most": (given.images, 128)}
        sets = {name: linked(pairs, names, folder / name, *sizes[name]) for name in used}
        print("| | Ultralytics | here | |\n| --- | --- | --- | --- |")
        for part in given.only:
            parts[part]({name: sets[name] for name in USED[part]}, folder)


if __name__ == "__main__":
    main()
