"""Evaluate a YOLO checkpoint with COCO's metric on one process or many.

    python train/validate.py --weights runs/detect/exp/weights/best.pt --data coco.yaml
    accelerate launch --multi_gpu --num_processes 2 train/validate.py --weights yolov8n.pt --data coco.yaml
    make validate GPUS=2 ARGS="--weights yolov8n.pt --data coco.yaml"

Prints COCO's twelve numbers and AP by class, the same for any number of processes, and writes metrics.json,
predictions.json and ground_truth.json into --save-dir.
"""

import time
from pathlib import Path

from train.checkpoint import new_folder
from train.coco import evaluate, ground_truth
from train.config import InputError, ValConfig
from train.data import ValSet, val_loader
from train.labels import check_usable, find_data, scan
from train.model import check_imgsz, fetch_weights, inference_copy, largest_stride, load_detector, set_end2end
from train.processes import on_main, once_per_machine, run, start_processes
from train.report import Report


def main(config: ValConfig) -> None:
    """Evaluate, from the checkpoint to the table. Every rank runs all of it."""
    accelerator, precision = start_processes(config.mixed_precision, [])
    report = Report(accelerator)
    weights = once_per_machine(accelerator, lambda: fetch_weights(config.weights))
    model, checkpoint = load_detector(weights, config.trust_checkpoint)
    config = config.with_defaults(checkpoint.get("train_args") or {})
    config.check()
    stride = largest_stride(model)
    check_imgsz(config.imgsz, stride)

    if config.end2end is not None:
        set_end2end(model, config.end2end, config.weights)

    data = once_per_machine(accelerator, lambda: find_data(config.data, config.single_cls))
    if len(model.names) != len(data.names):
        raise InputError(f"{config.weights} knows {len(model.names)} classes, {data.name} names {len(data.names)}.")
    files = data.images(config.split)
    report.say(f"reading the labels of {len(files)} {config.split} images")
    labels, faults = scan(files, data.names, config, accelerator)
    check_usable(data.name, None, labels, faults)
    truth = ground_truth(labels, data.names)
    loader = val_loader(ValSet(labels, data.names, data.channels, config.imgsz, stride), config, accelerator)

    report.open(on_main(accelerator, lambda: new_folder(Path("runs/detect"), "val", config.save_dir)), config)
    report.faults(faults)
    if model.names != data.names:
        first = next(i for i in data.names if model.names[i] != data.names[i])
        report.say(f"warning: class {first} is {model.names[first]} in the checkpoint, {data.names[first]} in the data")
    report.processes(config, precision)
    started = time.perf_counter()
    result = evaluate(
        inference_copy(model, accelerator.device, config.memory_format), loader, truth, config, accelerator
    )
    report.say(f"evaluated {result.images} images in {time.perf_counter() - started:.1f} s")
    report.evaluation(result, truth)
    report.say(f"results in {report.folder}")
    report.close()


if __name__ == "__main__":
    run(main, ValConfig, __doc__)
