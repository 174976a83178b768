"""Experiment trackers: all of Accelerate's get the numbers, the W&B run also tables, charts and pictures.

Only the main process tracks. Whatever fails here is one warning; it neither ends a training nor keeps it waiting.
"""

import contextlib
import math
import netrc
import os
import platform
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from accelerate import Accelerator

from train.checkpoint import TrainState
from train.coco import COLUMNS, Evaluation, diagnose
from train.config import TrainConfig
from train.plots import CONFIDENCE, Box, boxes_on, same_images, small_picture
from train.processes import on_main

PACKAGES = ("torch", "torchvision", "accelerate", "ultralytics", "hotcoco", "pycocotools", "wandb", "numpy")
PROJECT = "yolo-accelerate"
RICH = 25  # tables, charts and pictures come at most about so often in a run
REACHED = 0.8  # seconds in which W&B's server must answer a connection, else the run is kept offline


class Tracking:
    """The trackers of one run; without any, its methods do nothing.

    Args:
        accelerator: holds the trackers.
        say: gives a line to the console.
        wandb: whether W&B will be used; its import and its service then start beside the reading of the data.
    """

    def __init__(self, accelerator: Accelerator, say: Callable[[str], None], wandb: bool = False):
        self.accelerator, self.say = accelerator, say
        self.run: Any = None  # of W&B, on the main process
        self.shown = -math.inf  # the last epoch that tables, charts and pictures were sent after
        # Else W&B reports to its makers at exit, offline runs included, and waits for a network that is not there.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.warming = threading.Thread(target=_warm, daemon=True)
        if wandb and accelerator.is_main_process:
            self.warming.start()

    def start(self, config: TrainConfig, folder: Path, wandb_id: str) -> str:
        """Start the trackers and say where the W&B run is (collective).

        Args:
            config: names the trackers and says what W&B is told.
            folder: of the run; the trackers write there.
            wandb_id: of the W&B run that is gone on with; empty for a new one.

        Returns:
            the id of the W&B run, empty where there is none.
        """
        self.accelerator.project_configuration.logging_dir = str(folder)
        lines, wandb_id = on_main(self.accelerator, lambda: self._start(config, folder, wandb_id))
        for line in lines:
            self.say(line)
        return wandb_id

    def _start(self, config: TrainConfig, folder: Path, wandb_id: str) -> tuple[list[str], str]:
        lines: list[str] = []
        values = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(config).items()}
        values |= {"command": " ".join(sys.argv), "git": git_state(), "processes": self.accelerator.num_processes}
        values |= {f"{name}_version": number for name, number in versions().items()}
        started: list[Any] = []
        project = config.wandb_project or os.environ.get("WANDB_PROJECT") or PROJECT
        for name in config.used_trackers:
            attempts: list[dict[str, Any]] = [{}]
            if name == "wandb":
                self.warming.join()
                try:
                    attempts, reason = _wandb_attempts(config, folder, wandb_id)
                except Exception as error:
                    attempts, reason = [], str(error)
                lines += [f"warning: {reason}"] if reason and attempts else []
            failure = reason if name == "wandb" and not attempts else ""
            for attempt in attempts:
                self.accelerator.log_with, self.accelerator.trackers = [name], []
                try:
                    self.accelerator.init_trackers(project, config=values, init_kwargs={name: attempt})
                    started += self.accelerator.trackers
                    failure = ""
                    break
                except Exception as error:
                    failure = f"{failure}; {error}" if failure and str(error) not in failure else str(error)
            if failure:
                failure = " ".join(failure.split())
                lines.append(f"warning: {name} did not start and stays off: {failure[:300]}")
            elif name == "wandb" and len(attempts) > 1 and attempt is not attempts[0]:
                lines.append("warning: W&B refused the run (a wrong key?); it is kept offline")
        self.accelerator.trackers = started
        if any(tracker.name == "wandb" for tracker in started):
            self.run = self.accelerator.get_tracker("wandb", unwrap=True)
            lines += self._wandb_started(folder)
        return lines, self.run.id if self.run else ""

    def _wandb_started(self, folder: Path) -> list[str]:
        """Say what the axes are; return where the run is to be found."""
        run = self.run
        run.define_metric("global_step")
        run.define_metric("epoch")
        run.define_metric("*", step_metric="global_step")
        run.define_metric("val*", step_metric="epoch")
        if run.disabled:
            return ["wandb      disabled by WANDB_MODE"]
        lines = []
        asked = Path(os.environ.get("WANDB_DIR") or folder)
        if asked.resolve() not in Path(run.dir).resolve().parents:
            lines.append(f"warning: W&B cannot write to {asked}; its files are in {Path(run.dir).parent}")
        place = f"offline; to send it: wandb sync {Path(run.dir).parent}" if run.offline else run.url
        return [*lines, f"wandb      {place}"]

    def log(self, values: dict[str, float], step: int) -> None:
        """One row of numbers; `step` rises from call to call."""
        if self.accelerator.trackers:
            # W&B would keep the row in memory until the next
            self._safely(lambda: self.accelerator.log(values, step=step, log_kwargs={"wandb": {"commit": True}}))

    def _safely(self, work: Callable[[], Any]) -> None:
        """Whatever goes wrong with a tracker ends the tracking, not the training."""
        try:
            work()
        except Exception as error:
            self.say(f"warning: the trackers failed and are off from here on: {error}")
            self.accelerator.trackers, self.run = [], None

    def epoch(
        self,
        row: dict[str, Any],
        rows: list[dict[str, Any]],
        speed: dict[str, float],
        result: Evaluation | None,
        state: TrainState,
        truth: dict[str, Any],
        config: TrainConfig,
        folder: Path,
        last: bool,
    ) -> None:
        """An epoch's numbers, and at most RICH times a run what W&B shows beyond numbers. Main process only.

        Args:
            row: of results.csv.
            rows: all of them so far.
            speed: throughput, waits and gradient norm of the epoch.
            result: the validation, if there was one.
            state: knows the best epoch.
            truth: COCO ground truth, whose `file_name` are paths.
            config: of the run.
            folder: has pictures of training batches.
            last: whether this may be the last epoch.
        """
        if not self.accelerator.trackers:
            return
        numbers = {name: value for name, value in row.items() if value is not None} | speed | {"lr": row["lr/pg0"]}
        step = row["global_step"]
        if self.run is not None:

            def rich() -> None:
                epoch = row["epoch"]
                shown: dict[str, Any] = {}
                if result and (last or epoch - self.shown >= config.epochs / RICH):
                    self.shown = epoch
                    shown |= charts(rows, config.val_name) | tables(result, truth, config.val_name)
                if len(rows) == 1:
                    shown |= _first_pictures(folder)
                if shown:
                    self.run.log(shown, step=step, commit=False)
                if result and state.best_epoch == state.epoch:
                    self.run.summary["best/AP"], self.run.summary["best/epoch"] = state.best_ap, epoch

            self._safely(rich)
        self.log(numbers, step)

    def close(self, folder: Path, state: TrainState | None) -> None:
        """Hand best.pt and last.pt to W&B as versions of one model, and finish the trackers."""
        if self.run is not None and state is not None:
            self._safely(lambda: _log_model(self.run, folder / "weights", state))
        self._safely(self.accelerator.end_training)


# Weights & Biases -----------------------------------------------------------------------------------------------------
def _wandb_attempts(config: TrainConfig, folder: Path, wandb_id: str) -> tuple[list[dict[str, Any]], str]:
    """Options of wandb.init to try one after the other, and why the first is offline where that is worth a line."""
    import wandb  # half a second, so only where it is used

    settings = wandb.Settings(
        silent=True,
        init_timeout=20,
        finish_timeout=60,
        x_transaction_log_flush_interval=2,  # what a killed run may lose, in seconds
    )
    options: dict[str, Any] = {"settings": settings}
    flags = {"entity": config.wandb_entity, "tags": config.wandb_tags, "group": config.wandb_group}
    flags |= {"notes": config.wandb_notes, "name": config.wandb_name}
    options |= {name: value for name, value in flags.items() if value}
    if not os.environ.get("WANDB_NAME"):
        options.setdefault("name", folder.name)
    if not os.environ.get("WANDB_DIR"):
        options["dir"] = str(folder)
    if wandb_id:
        options |= {"id": wandb_id, "resume": "allow"}
    offline = options | {"mode": "offline"}
    mode = os.environ.get("WANDB_MODE", "")
    if mode and mode != "online":
        return [options], ""
    server = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
    if has_key(server):
        if not reachable(server):  # wandb.init would wait for a minute and a half
            return [offline], f"W&B's server {server} does not answer; the run is kept offline"
    elif not wandb.login(prompt=False):  # else wandb.init would ask, where there is a terminal
        return [offline], "W&B has no key; the run is kept offline" if mode else ""
    return [options, offline], ""


def has_key(server: str) -> bool:
    """Whether this machine has a key for W&B's server: in the environment or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(server).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def reachable(url: str) -> bool:
    """Whether a server, or the proxy before it, takes a connection within REACHED seconds, name lookup included."""
    parts = urlparse(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urlparse(proxy if "//" in proxy else f"//{proxy}")
    port = parts.port or (80 if parts.scheme == "http" else 443)
    answers: list[bool] = []

    def connect() -> None:
        try:
            with socket.create_connection((parts.hostname or "", port), timeout=REACHED):
                answers.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)  # a name server that is silent would hold the main thread
    thread.start()
    thread.join(REACHED)
    return bool(answers)


def _warm() -> None:
    """What takes long the first time: a second, that nobody needs to wait for."""
    with contextlib.suppress(Exception):  # it comes again where it is told
        import wandb

        wandb.setup()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results may depend on."""
    found = {d.name.lower(): d.version for d in distributions() if d.name.lower() in PACKAGES}
    return found | {"python": platform.python_version()}


def git_state() -> str:
    """Commit of the working directory's repository, with -dirty where files differ from it; empty where it has none."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=5,
        )  # fmt: skip
        return done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def charts(rows: list[dict[str, Any]], val: str) -> dict[str, Any]:
    """Train and validation loss in one chart for each loss."""
    import wandb

    shown = {}
    for name in (key.removeprefix("train/") for key in rows[0] if key.startswith("train/")):
        measured = [row for row in rows if row[f"{val}/{name}"] is not None]
        xs = [[row["epoch"] for row in rows], [row["epoch"] for row in measured]]
        ys = [[row[f"train/{name}"] for row in rows], [row[f"{val}/{name}"] for row in measured]]
        shown[f"losses/{name}"] = wandb.plot.line_series(xs, ys, keys=["train", val], title=name, xname="epoch")
    return shown


def tables(result: Evaluation, truth: dict[str, Any], val: str) -> dict[str, Any]:
    """AP by class, precision-recall curves, the confusion matrix, and images with truth and detections as boxes."""
    import wandb

    by_class = [[name, *(values[c] for c in COLUMNS)] for name, values in result.per_class.items()]
    shown: dict[str, Any] = {f"{val}/per_class": wandb.Table(columns=["class", *COLUMNS], data=by_class)}
    by_id = {category["id"]: category["name"] for category in truth["categories"]}
    names = [by_id[id_] for id_ in result.curves.category_ids]
    curves = [
        [name, round(i / 20, 2), float(precision[i * 5])]
        for name, precision in zip(names, result.curves.pr, strict=True)
        for i in range(21)
        if precision[0] >= 0
    ]
    shown[f"{val}/PR_curve"] = wandb.plot_table(
        "wandb/area-under-curve/v0", wandb.Table(columns=["class", "recall", "precision"], data=curves),
        {"x": "recall", "y": "precision", "class": "class"},
        {"title": "Precision-recall at IoU 0.50", "x-axis-title": "Recall", "y-axis-title": "Precision"},
    )  # fmt: skip
    if diagnosis := diagnose(truth, result.detections):
        labels = [*names, "background"]
        counts = [
            [labels[i], labels[j], int(count)] for (i, j), count in np.ndenumerate(diagnosis["confusion"]) if count
        ]
        shown[f"{val}/confusion_matrix"] = wandb.plot_table(
            "wandb/confusion_matrix/v1", wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=counts),
            {"Actual": "Actual", "Predicted": "Predicted", "nPredictions": "nPredictions"},
            {"title": f"Confusion at confidence {CONFIDENCE}"},
        )  # fmt: skip
    pictures = []
    for image in same_images(truth):
        marks, found = boxes_on(image, truth, result.detections)
        boxes = {
            kind: {"box_data": [_wandb_box(mark, image, by_id) for mark in some], "class_labels": by_id}
            for kind, some in (("truth", marks), ("detections", found))
        }
        picture = small_picture(image["file_name"])
        if picture is not None:
            shot = wandb.Image(picture, boxes=boxes, caption=Path(image["file_name"]).name, file_type="jpg")
            pictures.append([Path(image["file_name"]).name, shot, len(marks), len(found)])
    shown[f"{val}/examples"] = [picture[1] for picture in pictures]  # a panel with a slider over the epochs
    shown[f"{val}/images"] = wandb.Table(columns=["file", "image", "boxes", "detections"], data=pictures)
    return shown


def _wandb_box(mark: Box, image: dict, names: dict[int, str]) -> dict[str, Any]:
    """A box (ltwh in the image's pixels) as W&B has it: corners as shares of the image."""
    (x, y, w, h), category, score = mark
    across, down = image["width"], image["height"]
    position = {"minX": x / across, "maxX": (x + w) / across, "minY": y / down, "maxY": (y + h) / down}
    box: dict[str, Any] = {"position": position, "class_id": category, "box_caption": names[category]}
    if score is not None:
        box |= {"scores": {"score": score}, "box_caption": f"{names[category]} {score:.2f}"}
    return box


def _first_pictures(folder: Path) -> dict[str, Any]:
    """The labels and the first training batches."""
    import wandb

    batches = [wandb.Image(str(file)) for file in sorted(folder.glob("train_batch*.jpg"))]
    shown: dict[str, Any] = {"train/batches": batches} if batches else {}
    if (folder / "labels.png").exists():
        shown["train/labels"] = wandb.Image(str(folder / "labels.png"))
    return shown


def _log_model(run: Any, weights: Path, state: TrainState) -> None:
    """best.pt and last.pt as versions of one model artifact."""
    import wandb

    for name, epoch in (("last", state.epoch + 1), ("best", state.best_epoch + 1)):
        metadata = {"epoch": epoch} | ({"AP": state.best_ap} if name == "best" else {"AP": state.last_ap})
        artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=metadata)
        artifact.add_file(str(weights / f"{name}.pt"), policy="immutable")  # the file itself, no copy
        run.log_artifact(artifact, aliases=[name, f"epoch-{epoch}"])
