"""train/detect.py, or $SCRIPT, that ends at a chosen place: killed.py WHAT options, on the main process.

WHAT is `stop:N`, SIGUSR1 before the gradients of step N are contributed; `kill:OPERATION:NAME:N`, SIGKILL before the
N-th operation (os.rename, os.link, os.remove, open) on a file of weights/ whose name begins with NAME, or in the N-th
`step` or `validation`; `full:N:M`, no file may be larger than 100 kB from step N to M; or `run`, nothing;
`stop` may stand behind another with a +.
"""

import os
import resource
import runpy
import signal
import sys
from pathlib import Path

import train.evaluation.evaluate
from train.processes.aside import finish
from train.processes.stops import Stop

given = sys.argv.pop(1).split("+")
stops = [int(part.partition(":")[2]) for part in given if part.startswith("stop:")]
what = next((part.split(":") for part in given if not part.startswith("stop:")), ["run"])
detect = os.environ.get("SCRIPT") or str(Path(__file__).resolve().parents[2] / "train" / "detect.py")
sys.argv[0] = detect
seen, LARGEST = 0, 100_000


def count() -> None:
    """One more; the N-th is the last."""
    global seen
    seen += 1
    if seen == int(what[3]):
        os.kill(os.getpid(), signal.SIGKILL)


def watch_files(event: str, arguments: tuple) -> None:
    """An audit hook: called before each operation."""
    if event == what[1]:
        paths = [Path(os.fsdecode(part)) for part in arguments[:2] if isinstance(part, str | bytes | os.PathLike)]
        if any(path.parent.name == "weights" and path.name.startswith(what[2]) for path in paths):
            count()


announce, detect_boxes = Stop.announce, train.evaluation.evaluate.detect


def announced(self: Stop, step: int) -> None:
    """Before the gradients of a step."""
    if step in stops:
        signal.raise_signal(signal.SIGUSR1)
    if what[0] == "full" and step in (int(what[1]), int(what[2]) + 1):
        limit = LARGEST if step == int(what[1]) else resource.RLIM_INFINITY
        finish()  # what was saved before is written beside the steps
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if what[:2] == ["kill", "step"]:
        count()
    announce(self, step)


def detected(*arguments, **options):
    """In a validation."""
    count()
    return detect_boxes(*arguments, **options)


if os.environ.get("RANK", "0") == "0":
    Stop.announce = announced  # type: ignore[method-assign]
    if what[:2] == ["kill", "validation"]:
        train.evaluation.evaluate.detect = detected
    elif what[0] == "kill":
        sys.addaudithook(watch_files)
runpy.run_path(detect, run_name="__main__")
