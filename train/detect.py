"""Train a YOLO detector on one process or many.

    python train/detect.py                                                # the built-in shapes, one process
    accelerate launch train/detect.py --data coco.yaml --model yolov8n.pt
    accelerate launch --multi_gpu --num_processes 2 train/detect.py --data coco.yaml --batch 64
    torchrun --nproc_per_node 2 train/detect.py --data coco.yaml --batch 64
    make train GPUS=2 ARGS="--data coco.yaml --epochs 50"

`--help` lists the options. A run leaves its weights, results.csv, metrics and logs in runs/detect/exp, exp2, …
"""

from train.processes import early  # noqa: F401  # first, see there

# isort: split

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from train.config.errors import InputError
from train.config.options import TrainConfig
from train.config.reading import AUTO
from train.config.words import seconds_of
from train.data.cache import cache_images
from train.data.fingerprint import fingerprint
from train.data.labels import check_usable, train_labels, val_labels
from train.data.loaders import train_loader, val_loader
from train.data.scan import check_ahead, read_data, read_index
from train.data.sets import TrainSet, ValSet
from train.evaluation.cocofiles import read_annotated, read_truth, with_annotations
from train.evaluation.evaluate import Evaluation, evaluate
from train.model.build import (
    ModelEMA,
    build_model,
    check_imgsz,
    compile_forward,
    largest_stride,
    of_the_loss,
    rebuild_model,
    set_class_weights,
    size_in_words,
)
from train.model.inference import digest, inference_copy
from train.model.loss import end_of_epoch, set_length
from train.model.tasks import TASKS, build_criterion, with_sigmas
from train.model.weights import fetch_weights, load_detector
from train.processes.accelerator import resolved, settle_buckets, start_processes, without_buffer_broadcast
from train.processes.collectives import check_same, on_main, once_per_machine, sync_from_main
from train.processes.files import cache_folder, check_file, check_folder
from train.processes.meeting import meet
from train.processes.places import folder_here, hand_out
from train.processes.script import run
from train.processes.signals import Ended, limit
from train.processes.stops import Stop
from train.reporting.training_report import TrainingReport
from train.training.engine import train_one_epoch
from train.training.lost import LostImages
from train.training.meter import Meter
from train.training.optim import Schedule, build_optimizer
from train.training.resume import find_run, in_place, indivisible, nothing_left, open_folder, read_run
from train.training.saves import Saves
from train.training.state import TrainState


def main(config: TrainConfig) -> None:
    """Train, from the configuration to the last checkpoint. Every rank runs all of it."""
    task = TASKS[config.task]  # what is different in train/segment.py and train/pose.py, which call this, too
    # All that can be wrong is found before the first label is read: a million of them take minutes.
    config.check()
    if not config.resume or not in_place(config):
        check_folder(Path(config.project), "--project")
    check_file(config.log_file, "--log-file")
    if config.time_limit:
        limit(seconds_of(config.time_limit))
    ahead = check_ahead(config, "train", config.split, carries=task.carries)  # beside all that comes before the labels
    config = meet(config)
    accelerator, why_precision = start_processes(
        config.mixed_precision, config.used_trackers, config.seed, config.compress_gradients
    )
    if config.resume == AUTO:
        found = on_main(accelerator, lambda: find_run(config))
        config = replace(config, resume=found, name=Path(found).name if found else config.name)
    saved, notes = on_main(accelerator, lambda: read_run(config)) if config.resume else (None, [])
    given, config = config, resolved(config, accelerator)
    report = TrainingReport(accelerator, config)
    if saved and nothing_left(config, saved):
        report.say(f"nothing is left to train: {config.resume} has its {saved['epoch'] + 1} epochs; more with --epochs")
        report.close()
        return
    ranks = accelerator.num_processes
    if config.batch % ranks:
        raise InputError(indivisible(config, ranks))
    data = read_data(config, task.carries, accelerator, report.say, ahead)
    check_same("The classes of --data", data.names, "Start all machines with the same data set.")
    config = with_sigmas(config, task, data)

    # Model. A run that is gone on with has kept its architecture; state.load() below brings its weights.
    if saved:
        model = rebuild_model(config, saved["architecture"], saved["names"], data)
    else:
        source = once_per_machine(accelerator, lambda: fetch_weights(config.model))
        model, origin = build_model(config, source, data)
    check_same("The weights to start from (by a hash)", digest(model), "Give all machines the same --model.")
    stride = largest_stride(model)
    check_imgsz(config.imgsz, stride)
    size = size_in_words(model, config.imgsz)

    # Data: an index of all labels, which was kept, or is read now by all ranks together, and mapped by each.
    report.watch.begin("reading labels")
    judged = with_annotations(config, data)
    annotated = read_annotated(judged, accelerator, task.carries)
    index = read_index(data, ("train", config.split), config, accelerator, ahead, report.say, report.reading)
    train_images = train_labels(index["train"], len(data.names), config, task.carries, config.fraction)
    val_images = val_labels(index[config.split], len(data.names), config, task.carries)
    on_main(accelerator, lambda: check_usable(data.name, train_images, val_images, config))
    truth = read_truth(val_images, data, judged, accelerator, annotated)
    before = saved["images"] if saved else {}
    images: dict[str, Tensor] = {}  # what they are now; the main process keeps it with the run
    on_main(
        accelerator,
        lambda: images.update(fingerprint(train_images, val_images, truth.own_numbers, before, config.resume)),
    )
    report.watch.end()

    # The model's moving average (a copy, so it comes before the loss is attached), and the loss.
    set_class_weights(model, train_images.counts[0], config.cls_pw)
    model = model.to(accelerator.device, memory_format=config.memory_format)
    ema = ModelEMA(model)
    if config.sync_bn and ranks > 1 and accelerator.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    meter = Meter(accelerator, model, config.profile)
    model.criterion = build_criterion(model, None if config.local_loss_norm else meter.sum_over_ranks, ranks)

    # What Accelerate prepares (loaders within train_loader and val_loader; rates are the schedule's, set in each step),
    # and the state that a killed run goes on from.
    detector = model  # without the wrapping that prepare() adds
    train_set = TrainSet(train_images, data, config, stride)
    val_set = ValSet(val_images, data, config, stride)
    report.watch.begin("caching images")
    cache_images({"train": train_set, "val": val_set}, config, accelerator, report.say, report.caching)
    report.watch.end()
    if config.compile:
        compile_forward(detector, accelerator.device, cache_folder() / "compiled")
    schedule = Schedule(config, len(train_set), len(data.names), saved["picked"] if saved else "")
    model, optimizer = accelerator.prepare(model, build_optimizer(model, schedule))
    model = without_buffer_broadcast(model)
    settle_buckets(model.train(), data.channels, 2 * stride, of_the_loss(detector))
    train_batches, positions = train_loader(train_set, schedule.batches, accelerator)
    val_batches = val_loader(val_set, config, accelerator)
    state = TrainState(detector, model, ema, optimizer, accelerator, picked=schedule.optimizer)
    if saved:
        state.load(saved, meter)
        origin = f"{config.model}, resumed after {state.where}"
    if state.length:
        schedule = schedule.over(state.length)

    # The run writes nothing before here, where nothing can be wrong with the input any more.
    folder = on_main(accelerator, lambda: open_folder(config, saved))
    stays = config.resume if saved and in_place(config) else ""
    report.open(folder_here(accelerator, folder, Path(config.project), stays), given)
    weights = folder / "weights"  # the main process's, which alone writes there
    report.start_trackers(config, state)
    report.faults(config.data, train_images, val_images)
    report.banner(why_precision, f"{origin}; {size}", data.name, schedule, train_set, val_images)
    if saved:
        report.going_on_from(state, notes)

    # What validation depends on is kept in the checkpoints, so that validate.py repeats it: the YAML's whole path, too.
    validated = replace(config, data=data.name, mixed_precision=config.val_precision or config.mixed_precision)
    saves, stop = Saves(state, meter, given, images, weights), Stop(accelerator)
    lost = LostImages(accelerator, positions, state.lost)
    best: tuple[int, Evaluation] | None = None
    while not is_last(state.epoch, state, schedule.config):
        epoch = state.epoch + 1
        positions.set(epoch, state.batches, schedule.closed(epoch))
        state.begin()
        report.epoch_starts(state, schedule)
        batches = served(meter.timed(train_batches), state, report, lost)
        for progress in train_one_epoch(state, batches, schedule, meter, report.watch, stop):
            stop.begin()  # there is something to save from here on
            due = saves.due(progress) or progress.end
            if due or progress.window is not None:
                report.lost(lost.share(), train_images)  # collective
                state.lost = [*lost.known]
            report.measured(state, progress)
            if due:
                report.saved(saves.save())
            if progress.end:  # a signal, or the time is up: all ranks end after this step
                report.saved(saves.settle())
                report.stopped(state)
                raise Ended(progress.end)
        report.trained(state)
        report.saved(saves.save())  # what follows may take long, or more memory than there is
        stop.agree()
        plans = config.time is not None and epoch == 0
        ends = plans or is_last(epoch, state, schedule.config)
        if not ends:  # the workers go on meanwhile
            positions.set(epoch + 1, 0, schedule.closed(epoch + 1))
            train_batches.start()

        state.finish(epoch)
        sync_from_main(ema.ema)  # BatchNorm's running statistics are each rank's own
        result: Evaluation | None = None
        if ends or (epoch + 1) % config.val_interval == 0:
            with meter.profile.within("validation"):
                evaluated = inference_copy(ema.ema, accelerator.device, config.memory_format, losses=True)
                batches = report.watched(val_batches, "validating")
                result = evaluate(evaluated, batches, truth, validated, accelerator, stop)
            state.note(result)  # is it the best so far?
            del evaluated  # a copy in the device's memory
        # Your own code for an epoch goes here. `result` has the metrics of all ranks, and, on the main process alone,
        # the detections of all ranks; it is None where the epoch was not validated (--val-interval).
        if plans:  # once, by the main process's clock; from here on the plan counts
            state.length = report.epochs_within(config.time, state)
            schedule = schedule.over(state.length)
            set_length(detector, state.length)
        end_of_epoch(detector)  # of an end-to-end model's two losses one fades into the other
        report.epoch(state, result, truth, last=ends)
        report.saved(saves.save(validated, result))
        if result is not None and state.best_epoch == epoch:
            best = epoch, result
        report.profile(meter.profile, result, is_last(epoch, state, schedule.config))
        stop.agree()
    failed = saves.settle()
    report.saved(failed or ("" if state.best_epoch >= 0 else "no best.pt could be written"), last=True)
    if state.epoch + 1 < schedule.config.epochs:
        report.say(f"stopped: no better epoch than {state.best_epoch + 1} for {config.patience} epochs (--patience)")

    if best is None or best[0] != state.best_epoch:  # it was before the run was resumed, or could not be saved
        best_model, _ = load_detector(hand_out(accelerator, weights / "best.pt"))
        evaluated = inference_copy(best_model, accelerator.device, config.memory_format)
        result = evaluate(evaluated, report.watched(val_batches, "validating"), truth, validated, accelerator, stop)
        best = state.best_epoch, result
    report.say(f"best.pt, epoch {state.best_epoch + 1}:")
    report.evaluation(best[1], truth, validated)
    report.say(f"{report.taken()}; results in {folder}")
    report.close(state)
    stop.close()


def is_last(epoch: int, state: TrainState, config: TrainConfig) -> bool:
    """Whether no epoch follows this one, counted from 0, as far as is known of the best one."""
    return epoch + 1 >= config.epochs or epoch - state.best_epoch >= config.patience


def served(
    batches: Iterable[dict[str, Any]], state: TrainState, report: TrainingReport, lost: LostImages
) -> Iterator[dict[str, Any]]:
    """This rank's batches of an epoch on their way to the forward; `train_loader` says what is in a batch."""
    for i, batch in enumerate(batches, state.batches):
        # Your own code for a batch goes here. It runs on every rank with that rank's share of the global batch, which
        # is on the device; images are uint8 and not yet rescaled by --multi-scale.
        if state.epoch < 0 and i < 3:
            report.training_batch(i, batch)
        lost.note(batch)
        yield batch


if __name__ == "__main__":
    run(main, TrainConfig, __doc__)
