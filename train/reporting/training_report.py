"""What a training has to say, from the banner to the last epoch."""

import platform
import time
import unicodedata
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from train.config.errors import InputError
from train.config.options import EvalConfig, TrainConfig
from train.config.words import printable
from train.data.labels import Labels
from train.data.sets import TrainSet
from train.evaluation.evaluate import Evaluation
from train.evaluation.truth import Truth
from train.processes import status
from train.processes.aside import Aside
from train.processes.collectives import on_main
from train.processes.cores import Usage, core_count, shared_cores
from train.reporting import lines
from train.reporting.report import Report, plots
from train.reporting.results import epoch_row
from train.reporting.tracking import Tracking
from train.training.engine import Progress
from train.training.optim import Schedule, epochs_within
from train.training.profile import Profile
from train.training.saves import copied
from train.training.state import TrainState

LINES, STEPS = 8, 10  # unless --log-interval is given: most lines of losses in an epoch, least steps between two
NAMED = 10  # images that are named in one go
DRAWN = 20.0  # seconds between two drawings of the pictures that change with the epochs


class TrainingReport(Report):
    """What train/detect.py speaks to.

    Args:
        accelerator: of the run.
        config: of the run, with what the device decides filled in.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig):
        super().__init__(accelerator, config)
        self.aside = Aside(at_once=config.workers == 0)
        self.tracking = Tracking(accelerator, self.say, self.aside, "wandb" in config.trackers)
        self.drawn = -DRAWN
        self.compiles = config.compile  # at the first batch
        self.usage = Usage.now()

    def banner(self, precision: str, origin: str, data: str, schedule: Schedule, train: TrainSet, val: Labels) -> None:
        """What is about to happen: processes, precision, model, data, the arithmetic of the batch.

        Args:
            precision: why it is the one that it is.
            origin: where the model's weights come from.
            data: the data set's name.
            schedule: of the run.
            train: the images to train on.
            val: the labels of the images to validate on.
        """
        config, ranks = schedule.config, self.accelerator.num_processes
        self.processes(config, precision)
        self.say(f"model      {origin}")
        self.say(lines.data_line(data, train.scanned, val))
        self.say(lines.batch_line(schedule, ranks))
        self.say(lines.optimizer_line(schedule))
        if not train.flips:
            self.say("warning: the data YAML names no flip_idx, so images are not flipped (--fliplr, --flipud)")
        if train.albumentations:
            self.say("augment    Albumentations is installed, so Ultralytics adds its blur, grey and CLAHE")
        if config.sync_bn and (ranks == 1 or self.accelerator.device.type != "cuda"):
            self.say("warning: --sync-bn is ignored; it needs several CUDA processes")
        if config.compress_gradients and ranks == 1:
            self.say("warning: --compress-gradients is ignored; there is one process")
        self.say(f"run        {self.folder}")
        self.names = train.data["names"]
        if shared := on_main(self.accelerator, self._shared_cores):  # collective
            self.say(f"warning: {shared}")
        if self.draws:
            self._draw(self._check_fonts)
            self._draw(lambda: plots().draw_labels(train.scanned, self.names, self.folder / "labels.png"))

    def _draw(self, picture: Callable[[], Any]) -> None:
        """Beside the training, after what has been asked for before."""
        self.aside.do(partial(self.going_on, "pictures", picture))

    def _shared_cores(self) -> str:
        """What it means that others keep the main process's cores busy; empty where they do not, or where it matters
        little: a process of one thread shares them fairly.
        """
        busy = Usage.now().others_since(self.usage)
        threads = torch.get_num_threads() if self.accelerator.device.type == "cpu" else 1
        cores = core_count()
        return shared_cores(busy, cores, platform.node()) if threads > 1 and busy > cores / 2 else ""

    def _check_fonts(self) -> None:
        lacking = "".join(c for c in plots().provide_fonts(self.names.values()) if unicodedata.category(c) != "So")
        if lacking:
            self.say(f"warning: no font here has {lacking[:40]}; pictures show boxes instead. Install one: fonts-noto")

    def start_trackers(self, config: TrainConfig, state: TrainState) -> None:
        """Start the trackers; the id of the W&B run goes into the run's folder and its checkpoints (collective)."""
        state.wandb_id = self.tracking.start(config, self.folder, state.wandb_id) or state.wandb_id
        if state.wandb_id:
            self.going_on("wandb_id.txt", lambda: self.results.write("wandb_id.txt", state.wandb_id + "\n"))

    def going_on_from(self, state: TrainState, said: list[str]) -> None:
        """A run goes on: what there is to say of it; results.csv has the epochs that its state has, and no other."""
        for line in said:
            self.say(line)
        self.going_on("results.csv", lambda: self.results.table(state.rows))

    def epoch_starts(self, state: TrainState, schedule: Schedule) -> None:
        """Say so in status.json and, on a terminal, by a progress bar."""
        epoch = state.epoch + 1
        self.epoch_number, self.where = epoch + 1, f"epoch {epoch + 1}/{schedule.config.epochs}"
        if self.results.writes:
            status.update(self.folder, epoch=epoch + 1)
        # What compiles takes as long as it takes, which is no hang.
        self.watch.begin(
            "compiling the model" if self.compiles else "waiting for the first batch", progress=not self.compiles
        )
        self.console.open_bar(sum(end >= state.batches for end in schedule.step_ends(epoch)), self.where, "step")

    def training_batch(self, i: int, batch: dict[str, Any]) -> None:
        """Draw one of the first batches of the main process, with its boxes."""
        if self.draws:
            file = self.folder / f"train_batch{i}.jpg"
            # Copies: the step goes on with the batch, and the drawing changes images and boxes.
            drawn = ("img", "cls", "bboxes", "batch_idx", "im_file", "masks", "keypoints")
            shown = copied({name: batch[name] for name in drawn if name in batch})
            self._draw(lambda: plots().draw_batch(shown, self.names, file))

    def lost(self, places: list[int], images: Labels) -> None:
        """Training images that could be read when the run began, and in whose places others stand from here on."""
        for place in places[:NAMED]:
            self.say(
                f"warning: {printable(images.file(place))} can no longer be read, as it could when the run began; the "
                "next image of the data set that can takes its place from here on (--strict ends the run instead)"
            )
        if len(places) > NAMED:
            self.say(f"warning: so it is with {len(places) - NAMED} other images")

    def measured(self, state: TrainState, progress: Progress) -> None:
        """The first step ends the silence, each moves the bar. What was measured goes to the bar and the trackers, and
        where a line is due to the console.

        Raises:
            Exception: that drawing, tracking or saving has raised beside the training, and should not have.
        """
        self.aside.check()
        self.watch.silent = ""
        if self.compiles:
            self.compiles = False
            self.watch.begin("", progress=True)
        self.console.advance()
        step, steps, window, lr = progress.step, progress.steps, progress.window, progress.lr
        if window is None:
            return
        assert state.whole is not None
        assert state.since is not None
        self.console.annotate(lines.bar_words(window, lr))
        if step == steps:  # the epoch's own line follows its last step
            return
        tracked = {f"train/{name}": value for name, value in window.means().items()} | window.speed()
        tracked |= {"epoch": self.epoch_number - 1 + step / steps, "global_step": progress.global_step, "lr": lr}
        self.tracking.log(tracked, progress.global_step)
        mark = max(-(-steps // LINES), STEPS)
        if self.config.log_interval is not None or step // mark != (step - window.steps) // mark:
            self.console.progress(f"{self.where}  {lines.step_line(step, steps, state.since, state.whole, lr)}")
            state.since = None

    def saved(self, failed: str, last: bool = False) -> None:
        """The state was saved, or why it was not, which is a warning, unless there is no other to come.

        Raises:
            InputError: the last one.
        """
        if failed and last:
            raise InputError(f"The weights are lost: {failed}. Free some space, or name another disk with --project.")
        if failed:
            self.say(f"warning: {failed}; the run goes on with what was saved before")

    def stopped(self, state: TrainState) -> None:
        """The run ends early."""
        self.console.close_bar()
        self.say(f"stopped after {state.where}")

    def trained(self, state: TrainState) -> None:
        """The epoch's last step is done: its line of losses, its times by rank in the logs, and who is slow."""
        assert state.whole is not None
        self.console.close_bar()
        self.watch.end()
        self.training = state.seconds
        self.say(f"{self.where}  {lines.train_line(state.whole, self.training)}")
        for line in lines.rank_lines(state.whole):
            self.console.logger.info(f"{self.where}  {line}")
        if slow := lines.slow_ranks(state.whole):
            self.say(slow)

    def epochs_within(self, hours: float | None, state: TrainState) -> int:
        """How many epochs fit into so many hours, by the first of them and the main process's clock (collective)."""
        assert hours is not None
        used, each = max(time.perf_counter() - self.begun, state.seconds), state.seconds
        epochs = on_main(self.accelerator, lambda: epochs_within(hours, used, each))
        self.say(
            f"plan: {epochs} epochs of {lines.clock(each)} in {hours:g} hours (--time); the learning rate ends there"
        )
        return epochs

    def epoch(self, state: TrainState, result: Evaluation | None, truth: Truth, last: bool) -> None:
        """The epoch's lines of metrics, where it was validated; its row in results.csv; pictures; its point in the
        trackers.

        Args:
            state: after the epoch; gets the row.
            result: of the validation, if there was one.
            truth: of the split.
            last: whether this may be the last epoch.
        """
        assert state.whole is not None
        self.aside.wait()  # what it draws and tracks is the detections of one epoch at a time
        val = self.config.val_name
        state.rows.append(epoch_row(state, state.whole, self.training, result, self.config))
        if result:
            best = f"best AP {state.best_ap:.4g} in epoch {state.best_epoch + 1}"
            self.say(f"{self.where}  {lines.val_line(val, result, best)}")
            self.timing(result)
        self.going_on("results.csv", lambda: self.results.table(state.rows))
        if self.draws and (last or time.perf_counter() - self.drawn > DRAWN):
            self._draw(partial(self._draw_epoch, [*state.rows], result, truth))
            self.drawn = time.perf_counter()
        self.tracking.epoch(state, state.whole.speed(), result, truth, last)

    def profile(self, profile: Profile, result: Evaluation | None, ends: bool) -> None:
        """Where the time went, once all steps have been looked at (collective).

        Args:
            profile: of the run.
            result: of the epoch's validation, if there was one.
            ends: whether no step may be to come.
        """
        stages = {name: mean for name, (_, mean) in result.seconds.items()} if result else {}
        if (found := profile.result(stages, ends)) is None:
            return
        for line in lines.profile_lines(*found):
            self.say(line)
        if profile.steps.count:
            folder = self.folder / "profile"
            self.going_on("the trace", lambda: profile.write(folder))
            self.say(f"profile    traces of the steps, by rank: {folder} (https://ui.perfetto.dev)")

    def _draw_epoch(self, rows: list[dict[str, Any]], result: Evaluation | None, truth: Truth) -> None:
        plots().draw_results(rows, self.config.val_name, self.folder / "results.png")
        if result:
            same = [(place, "") for place in plots().same_images(truth)]
            plots().draw_page(result.detections, truth, same, self.folder / "val_batch.jpg")

    def evaluation(self, evaluation: Evaluation, truth: Truth, config: EvalConfig) -> None:
        """As `Report.evaluation`, when all that is drawn or tracked beside the training is done (collective)."""
        self.aside.wait()
        super().evaluation(evaluation, truth, config)

    def keep_results(self, work: Callable[[], Any]) -> None:
        """A training has its weights: results that cannot be written are a warning."""
        self.going_on("results", work)

    def close(self, state: TrainState | None = None) -> None:
        """Finish the trackers, which get the weights of the run, the watch and the logs."""
        self.watch.end()
        self.tracking.close(state)
        super().close()
