"""Evaluate a YOLO checkpoint, or a file of detections, with COCO's metric on one process or many.

    python train/validate.py --weights runs/detect/exp/weights/best.pt
    accelerate launch --multi_gpu --num_processes 2 train/validate.py --weights yolov8n.pt --data coco.yaml
    python train/validate.py --predictions detections.json --annotations instances_val2017.json
    make validate GPUS=2 ARGS="--weights yolov8n.pt --data coco.yaml"

Prints COCO's numbers of boxes, and of masks or keypoints where the checkpoint finds such, and a table by class, the
same for any number of processes, and writes metrics, predictions and truth as JSON, and pictures, into --save-dir.
"""

from train.processes import early  # noqa: F401  # first, see there

# isort: split

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from train.config.errors import InputError
from train.config.objects import Carries, Objects
from train.config.options import ValConfig
from train.config.reading import parse, typed
from train.config.sources import FROM_CHECKPOINT
from train.config.words import printable
from train.data.check import Check
from train.data.labels import Labels, check_usable, val_labels
from train.data.listing import DataFiles
from train.data.loaders import val_loader
from train.data.scan import check_ahead, read_data, read_index
from train.data.sets import ValSet
from train.evaluation.cocofiles import (
    check_predictions,
    read_annotated,
    read_predictions,
    read_truth,
    with_annotations,
)
from train.evaluation.detections import Detections
from train.evaluation.evaluate import evaluate, measure
from train.evaluation.truth import Truth
from train.model.build import check_imgsz, largest_stride, set_end2end
from train.model.inference import digest, inference_copy
from train.model.tasks import TASKS, task_of, with_sigmas
from train.model.weights import best_of_run, fetch_weights, load_detector, trained_with
from train.processes.accelerator import resolved, start_processes
from train.processes.collectives import check_same, on_main, once_per_machine
from train.processes.devices import device_type, lacks
from train.processes.files import check_file, check_folder, new_folder
from train.processes.meeting import meet
from train.processes.places import folder_here
from train.processes.script import run, said_once
from train.reporting.report import Report


def main(config: ValConfig) -> None:
    """Evaluate, from the checkpoint to the table. Every rank runs all of it."""
    config.check()
    check_folder(Path(config.save_dir or "runs"), "--save-dir")
    check_file(config.log_file, "--log-file")
    ahead = check_ahead(config, config.split)  # beside all that comes before the labels
    config = meet(config)
    accelerator, precision = start_processes(config.mixed_precision, [])
    report = Report(accelerator, config)
    if config.predictions:
        measure_file(config, accelerator, report, ahead)
        return
    config = resolved(config, accelerator)
    here = Path(best_of_run(config.weights)).is_file()
    weights = once_per_machine(accelerator, lambda: fetch_weights(config.weights, "--weights"))
    if not here:  # it has just been downloaded, and may say what it was trained with
        with said_once():
            config = parse(ValConfig, __doc__ or "", kept=validated_with)[0]
        config = resolved(config, accelerator)
    model, _ = load_detector(weights, config.trust_checkpoint)
    check_same("The weights to evaluate (by a hash)", digest(model), "Give all machines the same --weights.")
    task, stride = task_of(model), largest_stride(model)
    check_imgsz(config.imgsz, stride)
    if config.end2end is not None:
        set_end2end(model, config.end2end, config.weights)

    if not config.data:
        raise InputError(f"{config.weights} does not say what it was trained on; name the data set with --data.")
    data = read_data(config, task.carries, accelerator, report.say, ahead)
    if len(model.names) != len(data.names):
        raise InputError(f"{config.weights} knows {len(model.names)} classes, {data.name} names {len(data.names)}.")
    if task.carries == "keypoints" and [*model.model[-1].kpt_shape] != [*data.keypoints]:
        found, theirs = [*model.model[-1].kpt_shape], [*data.keypoints]
        raise InputError(f"{config.weights} finds keypoints of kpt_shape {found}, {data.name} has {theirs}.")
    trained = tuple(getattr(model, "kpt_oks_sigmas", None) or ())
    config = with_sigmas(config, task, replace(data, sigmas=data.sigmas or trained))
    labels, truth = split_to_validate(data, config, task.carries, accelerator, report, ahead)
    loader = val_loader(ValSet(labels, data, config, stride, judged=False), config, accelerator)

    open_folder(report, config, task.name, accelerator)
    report.faults(config.data, labels)
    if model.names != data.names:
        first = next(i for i in data.names if model.names[i] != data.names[i])
        report.say(f"warning: class {first} is {model.names[first]} in the checkpoint, {data.names[first]} in the data")
    if task.carries == "keypoints" and trained and trained != config.sigmas:
        report.say("warning: OKS sigmas are not those that the checkpoint was trained with; --sigmas sets them")
    report.processes(config, precision)
    evaluated = inference_copy(model, accelerator.device, config.memory_format)
    result = evaluate(evaluated, report.watched(loader, "evaluating"), truth, config, accelerator)
    report.timing(result)
    report.evaluation(result, truth, config)
    report.say(f"{report.taken()}; results in {report.folder}")
    report.close()


def open_folder(report: Report, config: ValConfig, task: str, accelerator: Accelerator) -> None:
    """Make the folder for the results, on other machines one for their logs alone (collective)."""
    runs = Path("runs") / task
    place = Path(config.save_dir).parent if config.save_dir else runs
    folder = on_main(accelerator, lambda: new_folder(runs, "val", config.save_dir))
    report.open(folder_here(accelerator, folder, place, config.save_dir), config)


def validated_with(config: ValConfig, given: frozenset[str]) -> dict[str, Any]:
    """Options that the checkpoint was validated with, as far as a checkpoint may set them.

    Args:
        config: names the checkpoint; where it is not there yet, it says nothing.
        given: names of the options that the user gave.
    """
    weights = best_of_run(config.weights)
    if not weights.endswith(".pt") or not Path(weights).is_file():
        return {}
    trained = trained_with(weights, config.trust_checkpoint)
    kept = typed(ValConfig, {key: value for key, value in trained.items() if key in FROM_CHECKPOINT}, weights)
    if {"data", "split"} & given:
        kept.pop("annotations", None)  # of that data and split
    if "data" in given:
        kept.pop("sigmas", None)
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":  # the launcher was told
        kept.pop("mixed_precision", None)
    elif "mixed_precision" not in given and (lacking := lacks(kept.get("mixed_precision") or "no", device_type())):
        was = f"{weights} was validated in {kept['mixed_precision']}, which {lacking}"
        print(f"{printable(was)}; --mixed-precision auto takes its place", file=sys.stderr)
        kept["mixed_precision"] = "auto"
    return kept


def split_to_validate(
    data: DataFiles,
    config: ValConfig,
    carries: Carries,
    accelerator: Accelerator,
    report: Report,
    ahead: Check | None,
) -> tuple[Labels, Truth]:
    """The labels and the truth of the split (collective)."""
    report.watch.begin("reading labels")
    config = with_annotations(config, data)
    annotated = read_annotated(config, accelerator, carries)
    index = read_index(data, (config.split,), config, accelerator, ahead, report.say, report.reading)
    labels = val_labels(index[config.split], len(data.names), config, carries)
    on_main(accelerator, lambda: check_usable(data.name, None, labels, config))
    truth = read_truth(labels, data, config, accelerator, annotated)
    report.watch.end()
    return labels, truth


def measure_file(config: ValConfig, accelerator: Accelerator, report: Report, ahead: Check | None) -> None:
    """Measure detections that are already there; no model is needed. The main process alone reads them."""
    here: list[Detections] = []

    def read() -> tuple[int, Carries, int]:
        here.append(read_predictions(config.predictions))
        if here[0].keypoints is not None:
            return len(here[0]), "keypoints", here[0].keypoints.shape[1]
        return len(here[0]), "boxes" if here[0].masks is None else "polygons", 0

    number, carries, keypoints = on_main(accelerator, read)
    found = here[0] if here else Detections(np.zeros((0, 7)))
    task = next(task for task in TASKS.values() if task.carries == carries)
    if config.data:
        data = read_data(config, carries, accelerator, report.say, ahead)
        config = with_sigmas(config, task, data)
        _, truth = split_to_validate(data, config, carries, accelerator, report, ahead)
    else:
        annotated = read_annotated(config, accelerator, carries)

        def labelled() -> int:  # where no detection tells
            assert annotated is not None
            return len(annotated.beside[0]["keypoints"]) // 3 if annotated.beside else 17

        if carries == "keypoints" and not keypoints:
            keypoints = on_main(accelerator, labelled)
        objects = Objects(names={}, keypoints=(keypoints, 3) if keypoints else ())
        config = with_sigmas(config, task, objects)
        truth = read_truth(None, objects, config, accelerator, annotated)
    on_main(accelerator, lambda: check_predictions(config.predictions, found, truth))
    open_folder(report, config, task.name, accelerator)
    report.say(f"{number} detections of {config.predictions}")
    report.evaluation(measure(truth, found, config, accelerator), truth, config)
    report.say(f"{report.taken()}; results in {report.folder}")
    report.close()


if __name__ == "__main__":
    run(main, ValConfig, __doc__, kept=validated_with)
