"""How fast evaluation is: `make bench-eval ARGS="--data coco128.yaml"`. Ratios, each pair measured in turn in one run.

The metric and the gather run on detections that are made here. Whole validations run on the images of --data, repeated
to 1,024, with a YOLOv8n at 320 px: --weights, or one that is trained on them for a few epochs. Every measurement is a
process of its own.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGES, CLASSES, TRUTHS, DETECTIONS = 5000, 80, 36_000, 750_000


# Jobs: what one process measures --------------------------------------------------------------------------------------
def scene() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Truth, and two ranks' detections as `evaluate` gathers them: 150 an image, a part of them hits, scores tied."""
    rng = np.random.default_rng(0)
    image, category = rng.integers(0, IMAGES, TRUTHS), rng.integers(0, CLASSES, TRUTHS)
    corner, size = rng.uniform(0, 500, (TRUTHS, 2)), np.exp(rng.uniform(2, 5.5, (TRUTHS, 2)))
    truth: dict[str, Any] = {
        "images": [{"id": i, "width": 640, "height": 640, "file_name": f"{i}.jpg"} for i in range(IMAGES)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(CLASSES)],
        "annotations": [
            {"id": i + 1, "image_id": int(image[i]), "category_id": int(category[i]), "iscrowd": 0}
            | {"bbox": [*corner[i].tolist(), *size[i].tolist()], "area": float(size[i].prod())}
            for i in range(TRUTHS)
        ],
    }
    source = rng.integers(0, TRUTHS, DETECTIONS)
    where, what = np.repeat(np.arange(IMAGES), DETECTIONS // IMAGES), rng.integers(0, CLASSES, DETECTIONS)
    score = np.round(rng.random(DETECTIONS) ** 3, 4)
    hit = rng.random(DETECTIONS) < 0.15
    where[hit], what[hit], score[hit] = image[source[hit]], category[source[hit]], np.round(rng.random(hit.sum()), 4)
    xy = corner[source] + rng.normal(0, 0.1, (DETECTIONS, 2)) * size[source]
    boxes = np.concatenate([xy, xy + size[source], score[:, None], what[:, None]], 1).astype(np.float32)
    order = np.lexsort((-score, where))
    boxes, where = boxes[order], where[order]
    shards = []
    for rank in range(2):
        mine = where % 2 == rank
        ids = list(range(rank, IMAGES, 2))
        counts = np.bincount(where[mine], minlength=IMAGES)[ids].tolist()
        shards.append({"weights": "", "ids": ids, "counts": counts, "boxes": boxes[mine], "losses": []})
    return truth, shards


class Memory:
    """Highest resident memory of this process above where it started, in bytes, sampled every 2 ms."""

    def __enter__(self) -> "Memory":
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # not glibc. What is free already would hide what is taken
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.start, self.peak, self.running = self.now(), 0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def now(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, self.now() - self.start)
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()


def job_metric(evaluator: str) -> dict[str, Any]:
    """From per-rank arrays to twelve numbers."""
    from tests.truths import truth_of
    from train.evaluation.coco import coco_metrics
    from train.evaluation.evaluate import as_detections

    content, shards = scene()
    truth = truth_of(content)
    categories = np.arange(CLASSES, dtype=np.float64)
    coco_metrics(truth_of(content | {"annotations": []}), as_detections([], categories), evaluator)  # imports
    started = time.perf_counter()
    with Memory() as memory:
        metrics, _ = coco_metrics(truth, as_detections(shards, categories), evaluator)
    return {"seconds": time.perf_counter() - started, "bytes": memory.peak, "metrics": metrics}


def job_gather() -> dict[str, Any] | None:
    """Gather and metric on two processes."""
    import torch

    from tests.truths import truth_of
    from train.evaluation.coco import coco_metrics
    from train.evaluation.evaluate import as_detections
    from train.processes.accelerator import start_processes
    from train.processes.collectives import on_main

    accelerator, _ = start_processes("no", [])
    content, shards = scene()
    truth = truth_of(content)
    shard = shards[accelerator.process_index]
    del shards
    categories = np.arange(CLASSES, dtype=np.float64)
    coco_metrics(truth_of(content | {"annotations": []}), as_detections([], categories))  # imports
    seconds = []
    growth = 0
    for _ in range(3):
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        with Memory() as memory:
            gathered = accelerator.gather_for_metrics([shard], use_gather_object=True)
            found = as_detections(gathered, categories)
            del gathered
            on_main(accelerator, lambda found=found: coco_metrics(truth, found))
        seconds.append(time.perf_counter() - started)
        growth = max(growth, memory.peak)
    torch.distributed.destroy_process_group()
    return {"seconds": statistics.median(seconds), "bytes": growth} if accelerator.is_main_process else None


def job_ultralytics(weights: str, data: str, save_json: str = "") -> dict[str, Any]:
    """`yolo val`: from the first batch to the metrics, the data set being scanned before."""
    import torch
    from ultralytics import YOLO

    import train  # noqa: F401  # Ultralytics' settings in a folder of this process

    torch.set_num_threads(1)
    model, clock = YOLO(weights), {}
    model.add_callback("on_val_start", lambda _: clock.setdefault("start", time.perf_counter()))
    model.add_callback("on_val_end", lambda _: clock.setdefault("end", time.perf_counter()))
    model.val(
        data=data, imgsz=320, batch=32, workers=0, plots=False, verbose=False, device="cpu", rect=True,
        save_json=bool(save_json),
    )  # fmt: skip
    return {"seconds": clock["end"] - clock["start"]}


# The run --------------------------------------------------------------------------------------------------------------
def job(name: str, *arguments: str, ranks: int = 1) -> dict[str, Any]:
    """Run a job in processes of its own, one thread each."""
    return json.loads(_launch(ranks, [__file__, "--job", name, *arguments]).splitlines()[-1])


def validation(weights: str, data: str, *options: str, ranks: int = 1) -> float:
    """Seconds that train/validate.py spends on the slowest rank, from the first batch to the metrics."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(ROOT / "train" / "validate.py"), "--weights", weights, "--data", data, "--imgsz", "320"]
        command += ["--workers", "0", "--no-plots", "--save-dir", f"{folder}/out", *options]
        said = _launch(ranks, command)
    stages = next(line for line in said.splitlines() if line.startswith("validation took")).split(": ", 1)[1]
    return sum(float(stage.split()[1]) for stage in stages.split(", "))


def _launch(ranks: int, command: list[str]) -> str:
    launcher = [sys.executable]
    if ranks > 1:
        config = ROOT / "accelerate_configs" / "multi_cpu.yaml"
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def repeated(data: str, images: int, folder: Path, names: dict[int, str] | None = None) -> str:
    """A data YAML over links to the train images of `data`, repeated under other names until there are so many; with
    `names` their labels are of these classes instead.
    """
    import yaml

    from train.data.files import find_data
    from train.data.listing import label_file

    found = find_data(data)
    files = found.images("train")
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for i in range(images):
        file, label = Path(files[i % len(files)]), Path(label_file(files[i % len(files)]))
        (folder / "images" / f"{i:06}{file.suffix}").symlink_to(file)
        if label.exists() and names is None:
            (folder / "labels" / f"{i:06}.txt").symlink_to(label)
        elif label.exists() and names is not None:
            rows = [row.split(maxsplit=1) for row in label.read_text().splitlines()]
            rows = [f"{int(category) % len(names)} {rest}\n" for category, rest in rows]
            (folder / "labels" / f"{i:06}.txt").write_text("".join(rows))
    about = {"path": str(folder), "train": "images", "val": "images", "names": names or found.names}
    if found.keypoints:
        about |= {"kpt_shape": [*found.keypoints], "flip_idx": [*found.flip_idx]}
    (folder / "data.yaml").write_text(yaml.safe_dump(about))
    return str(folder / "data.yaml")


def trained(data: str, folder: Path) -> str:
    """A YOLOv8n that finds something in these images."""
    options = ["--data", data, "--imgsz", "320", "--epochs", "20", "--mosaic", "0", "--trackers", "none", "--no-plots"]
    options += ["--project", str(folder), "--mixed-precision", "auto", "--nbs", "16", "--val-interval", "20"]
    _launch(2, [str(ROOT / "train" / "detect.py"), *options])
    return str(folder / "exp" / "weights" / "last.pt")


def main() -> None:
    """Measure everything and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="a data YAML with real images; without it only metric and gather are measured")
    parser.add_argument("--weights", help="a checkpoint for these classes; trained for a few epochs where not given")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--task", choices=("detect", "segment", "pose"), default="detect")
    parts = ("metric", "validation", "training")
    parser.add_argument("--only", nargs="+", choices=parts, default=[*parts], help="of another task than detect")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task != "detect":
        from tests.bench.tasks import measure

        measure(options.task, options.data, options.images, options.rounds, options.only)
        return
    if options.job:
        name, *arguments = options.job
        jobs = {"metric": job_metric, "gather": job_gather, "ultralytics": job_ultralytics}
        if name == "task-metric":
            from tests.bench.tasks import job_task_metric as found
        elif name == "task-masks":
            from tests.bench.tasks import job_task_masks as found
        else:
            found = jobs[name]
        result = found(*arguments)
        if result is not None:
            print(json.dumps(result))
        return

    rows: list[tuple[str, str, str, str]] = []
    ours = [job("metric", "hotcoco") for _ in range(3)]
    theirs = job("metric", "pycocotools")
    assert ours[0]["metrics"] == theirs["metrics"], "the evaluators disagree"
    seconds, memory = statistics.median(run["seconds"] for run in ours), max(run["bytes"] for run in ours)
    size = f"{IMAGES:,} images, {DETECTIONS:,} detections"
    rows.append(
        (
            f"metric, {size}",
            f"pycocotools {theirs['seconds']:.1f} s",
            f"{seconds:.2f} s",
            f"{theirs['seconds'] / seconds:.0f}x faster",
        )
    )
    rows.append(
        (
            "its peak memory",
            f"pycocotools {theirs['bytes'] / 1e6:.0f} MB",
            f"{memory / 1e6:.0f} MB",
            f"{memory / theirs['bytes']:.2f} of it",
        )
    )
    gather = job("gather", ranks=2)
    rows.append(
        (
            f"gather and metric, 2 processes, {size}",
            "",
            f"{gather['seconds']:.2f} s",
            f"{gather['bytes'] / DETECTIONS:.0f} bytes a detection at the peak",
        )
    )
    if options.data:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            weights = options.weights or trained(options.data, folder)
            data = repeated(options.data, options.images, folder)
            job("ultralytics", weights, data)  # leaves its label cache beside the links, as it does with everyone's
            kinds: dict[str, list[float]] = {"one": [], "two": [], "bf16": [], "yolo": []}
            for _ in range(options.rounds):
                kinds["one"].append(validation(weights, data, "--mixed-precision", "no"))
                kinds["two"].append(validation(weights, data, "--mixed-precision", "no", ranks=2))
                kinds["yolo"].append(job("ultralytics", weights, data)["seconds"])
                kinds["bf16"].append(validation(weights, data, "--mixed-precision", "bf16"))
            one, two, bf16, yolo = (statistics.median(values) for values in kinds.values())
            rate = {
                name: f"{options.images / value:.0f} images/s"
                for name, value in zip(kinds, (one, two, bf16, yolo), strict=True)
            }
            what = f"validation, {options.images:,} images at 320 px, one thread each"
            rows.append((f"{what}: 2 processes", f"1 process {rate['one']}", rate["two"], f"{one / two:.2f}x"))
            rows.append((f"{what}: fp32", f"`yolo val` {rate['yolo']}", rate["one"], f"{yolo / one:.2f}x"))
            rows.append((f"{what}: bf16", f"`yolo val` {rate['yolo']}", rate["bf16"], f"{yolo / bf16:.2f}x"))
    print("| | compared with | here | ratio |\n| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
