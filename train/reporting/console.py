"""The console and the logs: whole lines or a live bar from the main process, one log file for each rank."""

import contextlib
import logging
import logging.handlers
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from tqdm import tqdm

from train.config.options import EvalConfig
from train.config.words import printable
from train.processes.watch import Watch

T = TypeVar("T")
WIDE = 100  # columns that a bar needs beside the numbers; below, numbers come first and the bar has what is left
NARROW = "{desc}: {n_fmt}/{total_fmt}{postfix} {remaining} {bar}"
NO_TERMINAL = ("JPY_PARENT_PID", "KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG", "CI")


class Log(logging.FileHandler):
    """A log file; where it cannot be written any more, that is said once and the run goes on."""

    def __init__(self, file: Path, say: Callable[[str], None]):
        super().__init__(file, encoding="utf-8", errors="backslashreplace")
        self.say, self.failed = say, False

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        """Instead of a traceback for each line."""
        if not self.failed:
            self.failed = True
            self.say(f"warning: {self.baseFilename} cannot be written ({sys.exc_info()[1]}); the run goes on")

    def close(self) -> None:
        """Close the file, whose last lines may have found no room."""
        with contextlib.suppress(OSError):
            super().close()


class Console:
    """What one process says. Lines that are said before the run has a folder go to its log once it has one.

    Args:
        accelerator: of the run; its main process alone prints.
        config: progress, colours and levels.
    """

    def __init__(self, accelerator: Accelerator, config: EvalConfig):
        self.accelerator, self.config = accelerator, config
        self.bar: tqdm | None = None
        self.printing = threading.RLock()
        self.columns = 0  # of the terminal when the bar was drawn last
        # A notebook's `!command` and some CI runners give their commands a terminal that nobody looks at as one.
        terminal = sys.stdout.isatty() and not any(name in os.environ for name in NO_TERMINAL)
        wants_bar = config.progress == "bar" or (config.progress == "auto" and terminal)
        self.shows_bar = wants_bar and accelerator.is_main_process
        # https://no-color.org and https://force-color.org
        self.colours = bool(os.environ.get("FORCE_COLOR")) or (terminal and not os.environ.get("NO_COLOR"))
        level = getattr(logging, config.log_level.upper())
        self.logger = logging.getLogger("train")
        self.early = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
        self.handlers: list[logging.Handler] = [self.early]
        logging.getLogger().addHandler(self.early)
        logging.raiseExceptions = False  # what a library's own log cannot take or write is not for the console
        logging.captureWarnings(True)  # Python's warnings go to the logs of the ranks that gave them
        # DDP's about 1x1 convolutions in NHWC, whose two strides are the same (pytorch #157862)
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        self.logger.setLevel(level)
        for name in ("ultralytics", "torch", "accelerate"):  # to the logs; their own handlers print, on every rank
            library = logging.getLogger(name)
            library.handlers, library.propagate = [], True
            library.setLevel(level if name == "ultralytics" else max(level, logging.WARNING))
        self.watch = Watch(accelerator.process_index, accelerator.num_processes, config.hang_timeout, self._heartbeat)

    def say(self, line: str) -> None:
        """A line on the console, from the main process, and in the log of every rank."""
        line = printable(line)
        self.logger.log(logging.WARNING if line.startswith("warning:") else logging.INFO, line)
        self.watch.last_line = time.monotonic()
        if not self.accelerator.is_main_process:  # accelerator.print alone would say it once on each machine
            return
        if self.colours and line.startswith("warning:"):
            line = f"\x1b[33m{line}\x1b[0m"
        bar = self.bar  # the watch speaks from a thread of its own, while this one may close the bar
        with self._going_on():
            if bar is None:
                self.accelerator.print(line, flush=True)
            else:
                self._fit(bar)
                bar.write(line)

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """A console that nobody reads any more, or whose disk is full, goes silent; the run goes on with its logs.

        One thread at a time: the watch and what is done beside the training speak, too.
        """
        try:
            with self.printing:
                yield
        except OSError as error:
            self.bar, self.shows_bar = None, False
            with contextlib.suppress(OSError):  # else Python fails to flush at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.logger.warning(f"warning: the console is gone ({error.strerror}); the run goes on, and says all here")

    def progress(self, line: str) -> None:
        """A line on how far work has come: only in the logs where there is a bar, or where none is wanted."""
        if self.shows_bar or self.config.progress == "off":
            self.logger.info(line)
        else:
            self.say(line)

    def _heartbeat(self, line: str) -> None:
        if self.config.progress != "off":
            self.say(line)

    def open_bar(self, total: int, words: str, unit: str) -> None:
        """On a terminal: a live bar, until `close_bar`."""
        if self.shows_bar:
            colour = "green" if self.colours else None
            with self._going_on():
                self.bar = tqdm(
                    total=total, desc=words, unit=unit, leave=False, dynamic_ncols=True, file=sys.stdout, colour=colour
                )
                self._fit(self.bar)

    def _fit(self, bar: tqdm) -> None:
        """Before the bar is drawn: what stands in it follows the terminal's width, and so does what is left of it."""
        columns = _columns()
        if columns < self.columns and _wraps_again():  # the line lies on several rows now, and tqdm clears one
            up = -(-self.columns // columns) - 1
            sys.stdout.write(f"\x1b[{up}A\r\x1b[J" if up else "\r\x1b[J")
            bar.sp = tqdm.status_printer(sys.stdout)  # the old one would fill the line to its former length
        self.columns = columns
        bar.bar_format = None if columns >= WIDE else NARROW

    def advance(self) -> None:
        """Move the bar by one, where there is one."""
        if self.bar is not None:
            with self._going_on():
                self._fit(self.bar)
                self.bar.update()

    def annotate(self, words: str) -> None:
        """Words behind the bar, where there is one."""
        if self.bar is not None:
            with self._going_on():
                self._fit(self.bar)
                self.bar.set_postfix_str(words)

    def close_bar(self) -> None:
        """Take the bar away, where there is one."""
        if self.bar is not None:
            with self._going_on():
                self._fit(self.bar)
                self.bar.close()
            self.bar, self.columns = None, 0

    def counted(self, items: Iterable[T], total: int, words: str, unit: str) -> Iterator[T]:
        """The items, under a bar on a terminal; elsewhere nothing is said of them."""
        self.open_bar(total, words, unit)
        try:
            for item in items:
                yield item
                self.advance()
        finally:
            self.close_bar()

    def open_logs(self, folder: Path) -> None:
        """Start this rank's log, and on the main process the file that --log-file names."""
        rank = self.accelerator.process_index
        (folder / "logs").mkdir(parents=True, exist_ok=True)  # parents: on another machine
        files = [folder / "logs" / f"rank{rank}.log"]
        if self.config.log_file and self.accelerator.is_main_process:
            files.append(Path(self.config.log_file))
            files[-1].parent.mkdir(parents=True, exist_ok=True)
        logs = [Log(file, self.say) for file in files]
        for log in logs:
            log.setFormatter(logging.Formatter(f"%(asctime)s rank{rank} %(levelname)s %(message)s"))
            for record in self.early.buffer:
                log.handle(record)
        logging.getLogger().removeHandler(self.early)
        for log in logs:
            logging.getLogger().addHandler(log)
        self.early.buffer.clear()
        self.handlers = [*logs]

    def close(self) -> None:
        """End the watch and close the logs."""
        self.watch.close()
        for handler in self.handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):  # a bar that was asked for where there is no terminal
        return 80


def _wraps_again() -> bool:
    """Whether the terminal breaks lines anew when its width changes: all that are in common use but these do."""
    return "XTERM_VERSION" not in os.environ and os.environ.get("TERM") != "linux" and "STY" not in os.environ
