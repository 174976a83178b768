"""Evaluates every case of a list on however many processes there are, and writes what came out.

Arguments: weights, a JSON list of [name, options of ValConfig], and the folder for the results.
"""

import json
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from ultralytics.cfg import get_cfg

from train.config.options import ValConfig
from train.data.files import find_data
from train.data.labels import val_labels
from train.data.loaders import val_loader
from train.data.scan import read_index
from train.data.sets import ValSet
from train.evaluation.cocofiles import read_truth
from train.evaluation.evaluate import evaluate
from train.model.inference import inference_copy
from train.model.weights import load_detector
from train.processes.accelerator import resolved, start_processes

weights, cases, folder = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
accelerator, _ = start_processes("no", [])
rank = accelerator.process_index
model, _ = load_detector(weights)
model.args = get_cfg(overrides=model.args)  # the losses' gains
batches = []
for name, options in cases:
    config = resolved(ValConfig(weights=weights, workers=0, imgsz=160, **options), accelerator)
    config = replace(config, mixed_precision=options.get("mixed_precision", "no"))
    data = find_data(config.data)
    index = read_index(data, (config.split,), config, accelerator)[config.split]
    labels = val_labels(index, len(data.names), config)
    truth = read_truth(labels, data.names, config, accelerator)
    val_set = ValSet(labels, data.names, 3, config.imgsz, 32, config.rect is not False)
    loader = list(val_loader(val_set, config, accelerator))
    batches.append([name, *gather_object([len(loader)])])
    other = deepcopy(model)
    if name == "weights" and rank == accelerator.num_processes - 1:
        next(other.parameters()).data[0] += 1e-7
    copy = inference_copy(other, accelerator.device, config.memory_format, losses=True)
    broken = ""
    if name == "missing" and rank == accelerator.num_processes - 1:
        loader = loader[:-1]
    if name == "twice" and rank == 0:
        loader.append(loader[0])
    try:
        result = evaluate(copy, loader, truth, config, accelerator)
    except RuntimeError as error:
        broken = str(error)
    said = gather_object([broken])
    if accelerator.is_main_process:
        if any(said):
            (folder / f"{name}.txt").write_text("\n".join(said))
            continue
        curves = result.curves
        np.savez(
            folder / f"{name}.npz", detections=result.detections, metrics=list(result.metrics.values()),
            losses=list(result.losses.values()), pr=curves.pr, f1=curves.f1, ap=curves.ap["AP"],
        )  # fmt: skip
        counts = {"images": result.images, "boxes": result.boxes, "per_class": result.per_class}
        stages = {stage: list(seconds) for stage, seconds in result.seconds.items()}
        (folder / f"{name}.json").write_text(json.dumps(counts | {"metrics": result.metrics, "seconds": stages}))
        (folder / f"{name}.truth.json").write_text(json.dumps(truth.dataset()))
if accelerator.is_main_process:
    (folder / "batches.json").write_text(json.dumps(batches))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
