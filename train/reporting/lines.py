"""Console lines, made out of numbers by pure functions."""

import statistics
import unicodedata

from train.config.options import EvalConfig
from train.data.labels import Labels
from train.evaluation.coco import COLUMNS, METRICS, metric_names
from train.evaluation.detections import KINDS, prefix
from train.evaluation.evaluate import Evaluation
from train.processes.devices import processes
from train.training.meter import Window
from train.training.optim import Schedule
from train.training.profile import WARM, Laps

SLOWER = 1.2  # times the median of the ranks
NOTHING = "\u2013"  # in a table, where the metric is -1
SIZES = {"s": "small", "m": "medium", "l": "large"}


# Before the first epoch -----------------------------------------------------------------------------------------------
def data_line(name: str, train: Labels, val: Labels) -> str:
    """Images, boxes and images without a box of the two splits."""
    counts = []
    for labels, use in ((train, "train"), (val, "validate")):
        by_class, empty = labels.counts
        counts.append(f"{len(labels)} images with {by_class.sum()} boxes to {use} on ({empty} without a box)")
    return f"data       {name}: {', '.join(counts)}"


def batch_line(schedule: Schedule, ranks: int) -> str:
    """The arithmetic of the batch."""
    config, accumulated = schedule.config, schedule.full_accumulation
    return (
        f"batch      {config.batch} images over {processes(ranks)} x {accumulated} accumulated = "
        f"{config.batch * accumulated} a step; {schedule.batches} batches an epoch, {config.epochs} epochs"
    )


def optimizer_line(schedule: Schedule) -> str:
    """The optimizer and its rates, and whether it was picked."""
    picked = " (picked: --optimizer auto)" if schedule.config.optimizer == "auto" else ""
    return f"optimizer  {schedule.optimizer}, lr {schedule.lr0:g}, weight decay {schedule.weight_decay:.3g}{picked}"


# Within and after an epoch --------------------------------------------------------------------------------------------
def bar_words(window: Window, lr: float) -> str:
    """What stands behind the training bar."""
    losses = " ".join(_numbers(window.means()).split())
    return f"{losses} lr {lr:.3g} {window.images / max(window.seconds):.0f} images/s"


def step_line(step: int, steps: int, since: Window, whole: Window, lr: float) -> str:
    """Losses since the last line, throughput of all ranks, data wait and memory of the worst rank, time that is left.

    Args:
        step, steps: that is done, and of the epoch.
        since: what was measured since the last line.
        whole: what was measured since the epoch began.
        lr: learning rate of the first group.
    """
    left = (steps - step) * max(whole.seconds) / step
    line = f"step {step}/{steps}  {_numbers(since.means())}  lr {lr:.3g}"
    return f"{line}  {since.images / max(since.seconds):.0f} images/s  {_worst(since)}  eta {clock(left)}"


def train_line(whole: Window, seconds: float) -> str:
    """An epoch's losses, and how long its training took."""
    rate = f"{whole.images / seconds:.0f} images/s"
    return f"train  {_numbers(whole.means())}  {whole.images} images in {seconds:.1f} s, {rate}  {_worst(whole)}"


def rank_lines(whole: Window) -> list[str]:
    """Step time, data wait and forward of each rank."""
    return [
        f"rank {rank}: {seconds / whole.steps:.4f} s a step, of it {_own(whole, rank):.4f} s its own "
        f"(data wait {whole.waits[rank] / whole.steps:.4f} s, forward {whole.forwards[rank] / whole.steps:.4f})"
        for rank, seconds in enumerate(whole.seconds)
    ]


def slow_ranks(whole: Window) -> str:
    """A warning that names the ranks which take longer than the median rank for what is their own; empty if none do."""
    own = [_own(whole, rank) for rank in range(len(whole.seconds))]
    median = statistics.median(own)
    named = [
        f"rank {rank} by {seconds / median - 1:.0%} (data wait {whole.waits[rank] / whole.steps:.3f} s, "
        f"forward {whole.forwards[rank] / whole.steps:.3f} s a step)"
        for rank, seconds in enumerate(own)
        if seconds > SLOWER * median
    ]
    return f"warning: slower than the median rank: {', '.join(named)}" if named else ""


def val_line(name: str, result: Evaluation, best: str) -> str:
    """An epoch's validation.

    Args:
        name: what the metrics are filed under.
        result: of the validation.
        best: which epoch is the best so far, in words.
    """
    names = ["P", "R", *METRICS[:3]]
    names += [prefix(kind) + name for kind in result.iou_types[1:] for name in METRICS[:2]]
    shown = _numbers(result.losses | {metric: result.metrics[metric] for metric in names})
    return f"{name}    {shown}  {result.images} images  ({best})"


def timing_line(result: Evaluation) -> str:
    """Where the time of a validation went."""
    parts = [f"{stage} {slowest:.2f} ({mean:.2f})" for stage, (slowest, mean) in result.seconds.items()]
    each = 1000 * sum(slowest for slowest, _ in result.seconds.values()) / max(result.images, 1)
    return f"validation took, in s, slowest rank (mean): {', '.join(parts)}; {each:.1f} ms an image"


def _own(whole: Window, rank: int) -> float:
    """Seconds a step that are this rank's own: under DDP the rest is shared waiting."""
    return (whole.waits[rank] + whole.forwards[rank]) / whole.steps


def _worst(window: Window) -> str:
    """Data wait and memory of the ranks that have most of it."""
    wait, holder = _argmax(window.waits), _argmax(window.memory)
    share = window.waits[wait] / max(window.seconds[wait], 1e-9)
    return f"data wait {share:.0%} (rank {wait})  {window.memory[holder] / 1e9:.2f} GB (rank {holder})"


def _argmax(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _numbers(values: dict[str, float]) -> str:
    return "  ".join(f"{name.removesuffix('_loss')} {value:.4g}" for name, value in values.items())


# --profile ------------------------------------------------------------------------------------------------------------
def profile_lines(steps: Laps, ends: Laps) -> list[str]:
    """Where the time of a step and of an epoch's end went, by what was looked at of them."""
    if not steps.count:
        return [f"profile    nothing to tell: the run ended within its first {WARM + 1} steps"]
    found = []
    for what, laps in (("step", steps), ("end of an epoch", ends)):
        if laps.count:
            rows = {part: seconds / laps.count for part, seconds in laps.seconds.items() if seconds}
            if "validation" in rows:
                rows["validation: other"] = rows.pop("validation")
            wall = laps.wall / laps.count
            found.append(f"profile    {what}, mean of {laps.count}: {1000 * wall:.1f} ms")
            for part, seconds in (rows | {"all parts": sum(rows.values())}).items():
                found.append(f"profile      {part:24}{1000 * seconds:10.1f} ms{seconds / wall:8.1%}")
    return found


# The table ------------------------------------------------------------------------------------------------------------
def table(evaluation: Evaluation, config: EvalConfig) -> list[str]:
    """The metrics of all classes and of each, and AP and AR by size: of boxes, and then of masks or keypoints."""
    found = [line for kind in evaluation.iou_types for line in _table_of(kind, evaluation, config)]
    everything = [
        *evaluation.metrics.values(),
        *(v for values in _occurring(evaluation).values() for v in values.values()),
    ]
    if -1 in everything:
        found.append(f"{NOTHING}: nothing to measure, for there is no labelled object of this kind (-1 in the files)")
    ap = [(KINDS[kind][1], evaluation.metrics[f"{prefix(kind)}AP"]) for kind in evaluation.iou_types]
    images = f"{evaluation.images} images" + (" (a subset)" if config.subset else "")
    found.append(f"{', '.join(f'{name}AP {value:.4f}' for name, value in ap)} on {images} of {config.split}")
    if ap[0][1] < 0:
        found.append("AP is -1: these images have no labelled object.")
    return found


def _occurring(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    return {name: values for name, values in evaluation.per_class.items() if values["boxes"]}


def _table_of(kind: str, evaluation: Evaluation, config: EvalConfig) -> list[str]:
    """The part of the table that is measured by one of COCO's iou types."""
    before, word, _ = KINDS[kind]
    m = {name.removeprefix(before): value for name, value in evaluation.metrics.items() if name.startswith(before)}
    everything = evaluation.metrics | {"images": evaluation.images, "boxes": evaluation.boxes}
    lines = [f"{f'class {word}'.strip():20}" + "".join(f"{name:>8}" for name in COLUMNS)]
    occurring = _occurring(evaluation)
    for name, values in ({"all": everything} | occurring).items():
        numbers = "".join(f"{values[c]:8d}" for c in COLUMNS[:2])
        lines.append(f"{_padded(name, 20)}{numbers}{''.join(_measured(values[before + c]) for c in COLUMNS[2:])}")
    if (never := len(evaluation.per_class) - len(occurring)) and kind == evaluation.iou_types[0]:
        lines.append(f"{never} of {len(evaluation.per_class)} classes do not occur here and do not count")
    names = metric_names(config.max_dets, (kind,))
    sizes = [
        [name.removeprefix(before) for name in names if name[-1] in "sml" and what in name] for what in ("AP", "AR")
    ]
    for named in sizes:
        label = f"{word}{named[0][:2]} {', '.join(SIZES[name[-1]] for name in named)}"
        lines.append(f"{label:44}" + "".join(_measured(m[name]) for name in named))
    if kind == "keypoints":
        rest, label = ["AR", "AR50", "AR75"], f"{word}AR, AR50, AR75"
    else:
        rest = [f"AR{count}" for count in config.max_dets]
        label = f"{word}AR at {', '.join(map(str, config.max_dets))} detections an image"
    lines.append(f"{label:44}" + "".join(_measured(m[name]) for name in rest))
    return lines


def _padded(name: str, columns: int) -> str:
    """A name cut or filled to so many columns of a terminal, on which Chinese characters and emoji take two."""
    kept, left = "", columns - 1
    for character in name:
        wide = 0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if wide > left:
            break
        kept, left = kept + character, left - wide
    return kept + " " * (left + 1)


def _measured(value: float) -> str:
    return f"{NOTHING:>8}" if value == -1 else f"{value:8.3f}"
