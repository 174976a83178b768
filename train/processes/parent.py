"""A rank outlives no launcher: where that is gone, killed without a chance to end its ranks, the rank ends itself.

By looking who its parent is, in a thread, and without torch: it must work while modules are imported, while the main
thread waits for other ranks, and without the store, which the launcher kept.
"""

import contextlib
import os
import signal
import threading
import time

import psutil

from train.processes.exits import End, end_now, saving
from train.processes.signals import SIGNALS

LAUNCHER = "YOLO_ACCELERATE_LAUNCHER"  # our launcher's process number, for the ranks that it starts
INTERVAL = 0.5  # seconds between two looks
LAUNCHERS = {"torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate", "accelerate-launch",
             "accelerate.commands.launch", "train.processes.launcher", "launcher.py"}  # fmt: skip
GONE = "the launcher is gone"


def end_with_launcher() -> None:
    """Start looking, where a launcher has started this process."""
    parent = os.getppid()
    if _is_launcher(parent):
        threading.Thread(target=_look, args=(parent,), name="parent", daemon=True).start()
    elif _orphaned(parent):
        _end()


def end_with_parent(_: int = 0) -> None:
    """In a loader's worker: end it when its rank is gone, or wants it to; no signal of others, for which the rank needs
    it: Ctrl-C, a launcher's and a scheduler's go to all processes.

    torch looks for that too, but not while an image is read.
    """
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # for this thread and those that it starts
    threading.Thread(target=_serve, args=(os.getppid(),), name="parent", daemon=True).start()


def _serve(parent: int) -> None:
    while os.getppid() == parent:
        if not hasattr(signal, "sigtimedwait"):
            time.sleep(INTERVAL)
        elif (told := signal.sigtimedwait(SIGNALS, INTERVAL)) is not None and told.si_pid == parent:
            os._exit(0)  # torch takes another code for a failure of its own
    os._exit(1)


def _is_launcher(process: int) -> bool:
    if os.environ.get(LAUNCHER) == str(process):
        return True
    if not {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        return False  # its parent is a shell, which it may outlive
    with contextlib.suppress(psutil.Error):
        return any(os.path.basename(part) in LAUNCHERS for part in psutil.Process(process).cmdline())
    return False


def _orphaned(parent: int) -> bool:
    """Whether the launcher that has just started this rank is gone already."""
    if "LOCAL_RANK" not in os.environ:
        return False
    launcher = os.environ.get(LAUNCHER, "")
    if launcher.isdecimal():
        return not psutil.pid_exists(int(launcher))
    return parent == 1 and "TORCHELASTIC_RUN_ID" in os.environ


def _look(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(INTERVAL)
    # On Ctrl-C Accelerate's launcher of one process goes at once, and what it has started saves meanwhile.
    if not saving.is_set() or "TORCHELASTIC_RUN_ID" in os.environ:
        _end()


def _end() -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, f"error: {GONE}; the run ends with it\n".encode())
    rank = os.environ.get("RANK", "0")
    end_now(End("failed", GONE, int(rank) if rank.isdecimal() else 0, 1))
