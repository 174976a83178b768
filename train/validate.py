"""Evaluate a YOLO checkpoint, or a file of detections, with COCO's metric on one process or many.

    python train/validate.py --weights runs/detect/exp/weights/best.pt
    accelerate launch --multi_gpu --num_processes 2 train/validate.py --weights yolov8n.pt --data coco.yaml
    python train/validate.py --predictions detections.json --annotations instances_val2017.json
    make validate GPUS=2 ARGS="--weights yolov8n.pt --data coco.yaml"

Prints COCO's twelve numbers and a table by class, the same for any number of processes, and writes metrics.json,
predictions.json, ground_truth.json and pictures into --save-dir.
"""

from pathlib import Path

from accelerate import Accelerator

from train.checkpoint import new_folder
from train.coco import evaluate, measure
from train.config import InputError, ValConfig, parse
from train.data import ValSet, val_loader
from train.labels import check_usable, find_data
from train.model import check_imgsz, fetch_weights, inference_copy, largest_stride, load_detector, set_end2end
from train.processes import on_main, once_per_machine, resolved, run, start_processes
from train.report import Report
from train.truth import read_annotations, read_predictions, read_truth


def main(config: ValConfig) -> None:
    """Evaluate, from the checkpoint to the table. Every rank runs all of it."""
    config.check()
    accelerator, precision = start_processes(config.mixed_precision, [])
    report = Report(accelerator, config)
    if config.predictions:
        measure_file(config, accelerator, report)
        return
    config = resolved(config, accelerator)
    here = Path(config.weights).expanduser().is_file()
    weights = once_per_machine(accelerator, lambda: fetch_weights(config.weights))
    if not here:  # it has just been downloaded, and may say what it was trained with
        config = resolved(parse(ValConfig, __doc__ or "")[0], accelerator)
    model, _ = load_detector(weights, config.trust_checkpoint)
    stride = largest_stride(model)
    check_imgsz(config.imgsz, stride)
    if config.end2end is not None:
        set_end2end(model, config.end2end, config.weights)

    if not config.data:
        raise InputError(f"{config.weights} does not say what it was trained on; name the data set with --data.")
    data = once_per_machine(accelerator, lambda: find_data(config.data, config.single_cls))
    if len(model.names) != len(data.names):
        raise InputError(f"{config.weights} knows {len(model.names)} classes, {data.name} names {len(data.names)}.")
    report.say(f"reading the labels of {config.split}")
    report.watch.begin("reading labels")
    labels, truth, faults = read_truth(data, config, accelerator)
    report.watch.end()
    check_usable(data.name, None, labels, faults)
    val_set = ValSet(labels, data.names, data.channels, config.imgsz, stride, config.rect is not False)
    loader = val_loader(val_set, config, accelerator)

    report.open(on_main(accelerator, lambda: new_folder(Path("runs/detect"), "val", config.save_dir)), config)
    report.faults(faults)
    if model.names != data.names:
        first = next(i for i in data.names if model.names[i] != data.names[i])
        report.say(f"warning: class {first} is {model.names[first]} in the checkpoint, {data.names[first]} in the data")
    report.processes(config, precision)
    evaluated = inference_copy(model, accelerator.device, config.memory_format)
    result = evaluate(evaluated, report.watched(loader, "evaluating"), truth, config, accelerator)
    report.timing(result)
    report.evaluation(result, truth, config)
    report.say(f"results in {report.folder}")
    report.close()


def measure_file(config: ValConfig, accelerator: Accelerator, report: Report) -> None:
    """Measure detections that are already there; no model is needed."""
    if config.data:
        data = once_per_machine(accelerator, lambda: find_data(config.data, config.single_cls))
        labels, truth, faults = read_truth(data, config, accelerator)
        check_usable(data.name, None, labels, faults)
    else:
        truth = read_annotations(config.annotations)
    rows = read_predictions(config.predictions, truth)
    report.open(on_main(accelerator, lambda: new_folder(Path("runs/detect"), "val", config.save_dir)), config)
    report.say(f"{len(rows)} detections of {config.predictions}")
    report.evaluation(measure(truth, rows, config, accelerator), truth, config)
    report.say(f"results in {report.folder}")
    report.close()


if __name__ == "__main__":
    run(main, ValConfig, __doc__)
