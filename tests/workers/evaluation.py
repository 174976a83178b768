"""Evaluates every case of a list on however many processes there are, and writes what came out.

Arguments: weights, a JSON list of [name, options of ValConfig], and the folder for the results; perhaps again.
"""

import json
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from ultralytics.cfg import get_cfg

from train.config.options import ValConfig
from train.data.files import find_data
from train.data.labels import val_labels
from train.data.loaders import val_loader
from train.data.scan import read_index
from train.data.sets import ValSet
from train.evaluation.cocofiles import read_annotated, read_truth
from train.evaluation.evaluate import evaluate
from train.model.build import set_end2end
from train.model.inference import inference_copy
from train.model.tasks import task_of, with_sigmas
from train.model.weights import load_detector
from train.processes.accelerator import resolved, start_processes


def main(accelerator: Accelerator, weights: str, cases: list, folder: Path) -> None:
    rank = accelerator.process_index
    model, _ = load_detector(weights)
    model.args = get_cfg(overrides=model.args)  # the losses' gains
    batches, indexes = [], {}
    for name, options in cases:
        config = resolved(ValConfig(weights=weights, workers=0, imgsz=160, **options), accelerator)
        config = replace(config, mixed_precision=options.get("mixed_precision", "no"))
        task = task_of(model)
        data = find_data(config.data, carries=task.carries)
        config = with_sigmas(config, task, data)
        annotated = read_annotated(config, accelerator, task.carries)
        if config.data not in indexes:
            indexes[config.data] = read_index(data, (config.split,), config, accelerator)[config.split]
        index = indexes[config.data]
        labels = val_labels(index, len(data.names), config, task.carries)
        truth = read_truth(labels, data, config, accelerator, annotated)
        loader = list(val_loader(ValSet(labels, data, config, 32), config, accelerator))
        batches.append([name, *gather_object([len(loader)])])
        other = deepcopy(model)
        if config.end2end is not None:
            set_end2end(other, config.end2end, weights)
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
            found = result.detections
            arrays = {
                "detections": found.rows,
                "metrics": [*result.metrics.values()],
                "losses": [*result.losses.values()],
            }
            for kind, curves in result.curves.items():
                arrays |= {f"{kind}_pr": curves.pr, f"{kind}_f1": curves.f1, f"{kind}_ap": curves.ap["AP"]}
            arrays |= {"masks": found.masks} if found.masks is not None else {}
            arrays |= {"keypoints": found.keypoints} if found.keypoints is not None else {}
            np.savez(folder / f"{name}.npz", **arrays)
            for kind in found.iou_types:
                entries = [*found.results(kind, truth.sizes_by_id(np.arange(len(truth))))]
                (folder / f"{name}.{kind}.json").write_text(json.dumps(entries))
            counts = {"images": result.images, "boxes": result.boxes, "per_class": result.per_class}
            stages = {stage: list(seconds) for stage, seconds in result.seconds.items()}
            (folder / f"{name}.json").write_text(json.dumps(counts | {"metrics": result.metrics, "seconds": stages}))
            (folder / f"{name}.truth.json").write_text(json.dumps(truth.dataset()))
    if accelerator.is_main_process:
        (folder / "batches.json").write_text(json.dumps(batches))


accelerator, _ = start_processes("no", [])
for first in range(1, len(sys.argv), 3):
    weights, cases, folder = sys.argv[first : first + 3]
    main(accelerator, weights, json.loads(Path(cases).read_text()), Path(folder))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
