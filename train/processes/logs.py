"""Where this process writes its log, for those who have something to say when all else may be broken."""

import logging
from pathlib import Path
from typing import TextIO


def log_stream() -> TextIO | None:
    """This rank's open log file, where there is one."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            return handler.stream  # type: ignore[return-value]
    return None


def run_folder() -> Path | None:
    """The run's folder, as long as its log is open: it is in FOLDER/logs."""
    stream = log_stream()
    return Path(stream.name).parent.parent if stream is not None else None
