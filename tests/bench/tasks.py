"""What masks and keypoints cost: `make bench-eval TASK=segment ARGS="--data coco8-seg.yaml"`, or TASK=pose.

The metric runs on detections that are made here, from what the ranks hand over to the numbers. Validation runs on the
images of --data, repeated under other names, with a model that is trained on the built-in shapes, whose classes the
labels then have; keypoints are validated on the shapes themselves, since other keypoints are another model's. Training
runs beside Ultralytics', in turn, as in race.py.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from tests.bench.evaluation import _launch, job, repeated, validation
from tests.bench.race import KEPT, ROOT, Table, ours, rate, turns, ultralytics
from train.data.shapes import draw_shapes
from train.evaluation.detections import Detections
from train.evaluation.truth import Truth
from train.model.tasks import TASKS

IMAGES, EACH, TRUTHS, CLASSES, SIZE = 5000, 100, 36_000, 80, (480, 640)
MODELS = {"segment": "yolov8n-seg.yaml", "pose": "yolov8n-pose.yaml"}
NAMES = {0: "circle", 1: "square", 2: "triangle"}
SOUGHT = 50  # detections in an image, that a validation with masks is to have at least


# The metric -----------------------------------------------------------------------------------------------------------
def ellipse(rng: np.random.Generator) -> np.ndarray:
    """An outline of 24 points somewhere on an image."""
    centre, size = rng.uniform((20, 20), (620, 460)), np.exp(rng.uniform(1.8, 4.8, 2))
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.clip(centre + size * np.stack((np.cos(angles), np.sin(angles)), 1), 0, (639, 479))


def scene(task: str) -> tuple[Truth, list[dict[str, Any]]]:
    """Truth, and what two ranks hand over: of EACH detections an image a part hits, and scores tie."""
    from tests.truths import truth_of

    rng = np.random.default_rng(0)
    image, category = np.sort(rng.integers(0, IMAGES, TRUTHS)), rng.integers(0, CLASSES, TRUTHS)
    outlines = [ellipse(rng) for _ in range(TRUTHS)]
    annotations, runs = [], []
    for i, outline in enumerate(outlines):
        low, high = outline.min(0), outline.max(0)
        one = {"id": i + 1, "image_id": int(image[i]), "category_id": int(category[i]), "iscrowd": 0}
        one |= {"bbox": [*low, *(high - low)], "area": float((high - low).prod() * 0.53)}
        if task == "segment":
            mask = coco_mask.frPyObjects([outline.ravel().tolist()], *SIZE)[0]
            runs.append(mask["counts"])
            one |= {"area": float(coco_mask.area(mask))}
            one["beside"] = {"segmentation": {"size": [*SIZE], "counts": mask["counts"].decode()}}
        else:
            one["beside"] = {"keypoints": _keypoints(outline).ravel().tolist(), "num_keypoints": 17}
        annotations.append(one)
    first = np.searchsorted(image, np.arange(IMAGES + 1))
    boxes, extras, counts = [], [], []
    for i in range(IMAGES):
        here = np.arange(first[i], first[i + 1])
        hits = rng.choice(here, min(len(here), 8), replace=False) if len(here) else here
        chosen = np.concatenate((hits, rng.integers(0, TRUTHS, EACH - len(hits))))
        classes = np.where(np.arange(EACH) < len(hits), category[chosen], rng.integers(0, CLASSES, EACH))
        for k, c in zip(chosen, classes, strict=True):
            moved = outlines[k] + rng.normal(0, 2, 2)
            boxes.append([*moved.min(0), *moved.max(0), round(rng.random(), 2), c])
            extras.append(runs[k] if task == "segment" else _keypoints(moved))
        counts.append(EACH)
    table = np.array(boxes, np.float32)
    half = IMAGES // 2
    shards = []
    for ids in (range(half), range(half, IMAGES)):
        part = slice(ids.start * EACH, ids.stop * EACH)
        beside = extras[part] if task == "segment" else np.array(extras[part], np.float32)
        shards.append({"ids": [*ids], "counts": [EACH] * len(ids), "boxes": table[part], "extras": beside})
    content = {
        "images": [{"id": i, "height": SIZE[0], "width": SIZE[1], "file_name": f"{i}.jpg"} for i in range(IMAGES)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(CLASSES)],
        "annotations": annotations,
    }
    return truth_of(content, sigmas=[0.05] * 17), shards


def _keypoints(outline: np.ndarray) -> np.ndarray:
    return np.concatenate((outline[:17], np.full((17, 1), 2.0)), 1)


def job_task_metric(task: str, evaluator: str) -> dict[str, Any]:
    """From what the ranks hand over to the numbers of masks or keypoints."""
    from tests.bench.evaluation import Memory
    from train.evaluation.coco import coco_metrics
    from train.evaluation.evaluate import as_detections

    truth, shards = scene(task)
    kind = TASKS[task].iou_types[1]
    nothing = Truth(truth.ids[:1], truth.categories, truth.sizes[:1], str, own=truth.marks(np.array([], int)))
    nothing.sigmas = truth.sigmas
    coco_metrics(nothing, Detections(np.zeros((0, 7)), [], np.zeros((0, 17, 3))), evaluator, iou_type=kind)  # imports
    started = time.perf_counter()
    with Memory() as memory:
        found = as_detections(shards, np.arange(CLASSES, dtype=np.float64), TASKS[task].iou_types)
        metrics, _ = coco_metrics(truth, found, evaluator, iou_type=kind)
    return {"seconds": time.perf_counter() - started, "bytes": memory.peak, "metrics": metrics}


def job_task_masks(weights: str, data: str) -> dict[str, list[float]]:
    """IoU by size of masks with those that Ultralytics' save_json writes."""
    from tests.bench.masks import overlaps

    return overlaps(weights, data, 320)


# The run --------------------------------------------------------------------------------------------------------------
def measure(task: str, data: str | None, images: int, rounds: int, only: list[str]) -> None:
    """Measure these parts and print Markdown tables."""
    if "metric" in only:
        measure_metric(task)
    if not {"validation", "training"} & {*only}:
        return
    KEPT.mkdir(exist_ok=True)
    shapes = str(draw_shapes(KEPT, carries=TASKS[task].carries))
    if "validation" in only and data:
        measure_validation(task, data, shapes, images, rounds)
    if "training" in only:
        measure_training(task, shapes, rounds)


def measure_metric(task: str) -> None:
    """The rows of the metric alone."""
    mine = [job("task-metric", task, "hotcoco") for _ in range(3)]
    theirs = job("task-metric", task, "pycocotools")
    assert mine[0]["metrics"] == theirs["metrics"], "the evaluators disagree"
    seconds, memory = statistics.median(run["seconds"] for run in mine), max(run["bytes"] for run in mine)
    what = f"{TASKS[task].iou_types[1]}, {IMAGES:,} images of {EACH} detections, {TRUTHS:,} truths"
    print("| | compared with | here | ratio |\n| --- | --- | --- | --- |")
    times = theirs["seconds"] / seconds
    print(f"| {what} | pycocotools {theirs['seconds']:.1f} s | {seconds:.2f} s | {times:.0f}x faster |", flush=True)
    part = memory / theirs["bytes"]
    print(
        f"| its peak memory | pycocotools {theirs['bytes'] / 1e6:.0f} MB | {memory / 1e6:.0f} MB | {part:.2f} of it |"
    )


def measure_validation(task: str, data: str, shapes: str, images: int, rounds: int) -> None:
    """The rows of whole validations."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = trained(task, shapes, folder)
        (folder / "many").mkdir()
        source = data if task == "segment" else shapes
        many = repeated(source, images, folder / "many", NAMES if task == "segment" else None)
        job("ultralytics", weights, many)  # leaves its label cache beside the links
        kinds: dict[str, list[float]] = {"one": [], "two": [], "yolo": []}
        for _ in range(rounds):
            kinds["one"].append(validation(weights, many, "--mixed-precision", "no"))
            kinds["two"].append(validation(weights, many, "--mixed-precision", "no", ranks=2))
            kinds["yolo"].append(job("ultralytics", weights, many, "json")["seconds"])
        found = detections(weights, many, folder)
        one, two, yolo = (statistics.median(values) for values in kinds.values())
        rates = [f"{images / value:.1f} images/s" for value in (one, two, yolo)]
        what = f"validation, {images:,} images at 320 px, {found:.0f} detections an image, fp32, one thread each"
        print(f"| {what} | `yolo {task} val save_json=True` {rates[2]} | {rates[0]} | {yolo / one:.2f}x |", flush=True)
        print(f"| the same, 2 processes | 1 process {rates[0]} | {rates[1]} | {one / two:.2f}x |", flush=True)
        if task == "segment":
            from tests.bench.masks import in_words

            print(f"\n{in_words(job('task-masks', weights, shapes))}\n")
        if task == "segment" and found < SOUGHT:  # of keypoints a detection costs next to nothing
            sys.exit(f"{found:.0f} detections an image; a comparison needs {SOUGHT}")


def measure_training(task: str, shapes: str, rounds: int) -> None:
    """The row of training."""
    table = Table()
    recipe = {"data": shapes, "model": MODELS[task], "imgsz": 320, "batch": 16, "epochs": 3}
    made = turns(
        rounds,
        lambda: ultralytics(recipe, 1, amp=False),
        lambda: ours(recipe, 1, "--mixed-precision", "no", script=task),
    )
    number = len(list(Path(shapes).parent.glob("images/train/*.jpg")))
    table.row(
        f"training images/s, {MODELS[task]}, fp32, one thread and worker each",
        *(rate(s, number) for s in made),
        "{:.1f}",
    )


def trained(task: str, shapes: str, folder: Path) -> str:
    """A model that finds the built-in shapes."""
    options = ["--data", shapes, "--imgsz", "320", "--epochs", "6", "--mosaic", "0", "--trackers", "none", "--no-plots"]
    options += ["--project", str(folder), "--mixed-precision", "auto", "--nbs", "16", "--val-interval", "6"]
    options += ["--optimizer", "AdamW", "--lr0", "0.002", "--model", MODELS[task]]
    _launch(2, [str(ROOT / "train" / f"{task}.py"), *options])
    return str(folder / "exp" / "weights" / "last.pt")


def detections(weights: str, data: str, folder: Path) -> float:
    """Detections in an image, of a validation."""
    command = [str(ROOT / "train" / "validate.py"), "--weights", weights, "--data", data, "--imgsz", "320"]
    _launch(1, [*command, "--val-limit", "64", "--no-plots", "--save-dir", str(folder / "look")])
    return len(json.loads((folder / "look" / "predictions.json").read_text())) / 64
