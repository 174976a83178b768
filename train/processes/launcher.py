"""Start a script on so many processes: `python -m train.processes.launcher --gpus 2 -- train/detect.py …`.

`make train`, `make validate` and `make doctor` use it. Several processes are started by Accelerate's launcher, in this
process: the first failure's exit code is handed on, and no traceback of the launcher's stands behind its message.
"""

from train.processes import early  # noqa: F401  # first, see there

# isort: split

import argparse
import contextlib
import gc
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import psutil
import torch

import train
from train.config.errors import InputError
from train.processes import signals, status
from train.processes.cores import core_count
from train.processes.devices import check_devices, device_type, visible
from train.processes.parent import LAUNCHER
from train.processes.scratch import clean_up

HANDED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # to the processes; torchrun itself would die of the last
BY_SIGNAL = {signals.end_by(number).code for number in signals.SIGNALS}
PATIENCE = 60  # seconds that they may take to finish a step and to save; torchrun's own is 30
CONFIGS = Path(__file__).resolve().parents[2] / "accelerate_configs"


def launch_options(gpus: int | None, cpus: int | None) -> tuple[dict[str, str], list[str]]:
    """Environment and options of Accelerate's launcher that start a script on so many GPUs or CPU processes.

    Without either it is all GPUs, else one process. Options are empty where one process needs no launcher.

    Raises:
        InputError: the numbers contradict each other or the machine.
    """
    if gpus is not None and cpus is not None:
        raise InputError(f"GPUS={gpus} and CPUS={cpus} were both given; give one.")
    for name, number in (("GPUS", gpus), ("CPUS", cpus)):
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}; it must be 1 or more.")
    if cpus is not None:
        threads = os.environ.get("OMP_NUM_THREADS", str(max(core_count() // cpus, 1)))
        environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": threads}
        return environment, _options("multi_cpu.yaml", cpus)
    device = device_type()
    if gpus is not None:
        if device == "cpu":
            raise InputError(
                f"GPUS={gpus} was asked for, but PyTorch {torch.__version__} sees no GPU ({visible()}). "
                f"Type CPUS={gpus} for processes on the CPU, or install a CUDA build of torch and a driver."
            )
        check_devices(gpus, device)
    processes = gpus or (torch.accelerator.device_count() if device not in ("cpu", "mps") else 1)
    return {}, _options("multi_gpu.yaml", processes)


def _options(config: str, processes: int) -> list[str]:
    if processes == 1:
        return []
    return ["--config_file", str(CONFIGS / config), "--num_processes", str(processes)]


def launch(arguments: list[str]) -> int:
    """Run Accelerate's launcher; return the exit code of the first process that failed, 0 where none did."""
    # Imported here, for one process needs none of it: 1.5 s
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # torchrun's thirty lines behind what the rank has said
    told = Path(train.scratch.name)
    os.environ |= {LAUNCHER: str(os.getpid()), status.TOLD: str(told)}
    for name in ("PET_SIGNALS_TO_HANDLE", "TORCHELASTIC_SIGNALS_TO_HANDLE"):  # torchrun's option, and before it had one
        os.environ.setdefault(name, HANDED_ON)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(PATIENCE))
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        own = {-number for number in signals.SIGNALS}  # by which torchrun ends the others
        killed = [
            rank for rank, failure in error.failures.items() if failure.exitcode < 0 and failure.exitcode not in own
        ]
        rank = killed[0] if killed else error.get_first_failure()[0]
        code = error.failures[rank].exitcode
        reason = f"rank {rank} ended with code {code}"
        if code < 0:
            name = signal.Signals(-code).name
            reason = f"rank {rank} was killed by {name}{', perhaps out of memory' * (name == 'SIGKILL')}"
            code = 128 - code
        try:
            said = int((told / "said").read_text())  # the cause has been said, by a rank that may be another
            if killed and said in BY_SIGNAL:  # of which torchrun's own signal was the consequence
                raise ValueError
            code = said
        except (OSError, ValueError):
            print(f"error: {reason}", file=sys.stderr)
        _note(told, "failed", reason, rank)
        return code
    except SignalException as error:
        end = signals.end_by(error.sigval)
        _see_off(error.sigval)
        _note(told, end.state, end.reason, None)
        return end.code
    return 0


def _see_off(number: int) -> None:
    """Wait for processes that are left, and hand on what comes meanwhile: a second signal has ended torchrun's wait."""
    left = psutil.Process().children()

    def hand_on(number: int, _: FrameType | None = None) -> None:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    for handled in signals.SIGNALS:
        signal.signal(handled, hand_on)
    hand_on(number)
    _, alive = psutil.wait_procs(left, PATIENCE)
    for process in alive:
        process.kill()


def _note(told: Path, state: str, reason: str, rank: int | None) -> None:
    """Keep in the run's folder how it ended, if it has one and the main process could not do it any more."""
    with contextlib.suppress(OSError):
        status.end(Path((told / "run").read_text()), state, reason, rank)


def _number(name: str, text: str) -> int | None:
    """A number of processes; None where nothing was said."""
    if not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name} is {text!r}; it must be a whole number.") from None


def check_environment() -> None:
    """Raise InputError where a variable that PyTorch and Accelerate read is not what they need."""
    threads = os.environ.get("OMP_NUM_THREADS") or "1"  # or one for each level, as 4,2
    if not all(number.strip().isdecimal() and int(number) for number in threads.split(",")):
        raise InputError(f"OMP_NUM_THREADS is {threads!r}; it must be a whole number from 1. Mend it or unset it.")


def main() -> None:
    """Launch a script; one process takes the place of this one, so that signals reach it."""
    parser = argparse.ArgumentParser(prog="python -m train.processes.launcher", description=__doc__)
    parser.add_argument("--gpus", default="", help="processes, one on each GPU; empty for all GPUs there are")
    parser.add_argument("--cpus", default="", help="processes on the CPU")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="-- the script and its options")
    given = parser.parse_args()
    gc.enable()  # which early.py leaves to who has imported all: this process may wait for days
    try:
        check_environment()
        environment, options = launch_options(_number("GPUS", given.gpus), _number("CPUS", given.cpus))
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    os.environ.update(environment)
    for name in ("YOLO_CONFIG_DIR", "MPLCONFIGDIR"):  # else all ranks would share this process's
        if os.environ.get(name) == train.scratch.name:
            del os.environ[name]
    script = given.script[1:]
    if not options:
        clean_up()
        signals.hold()
        os.execv(sys.executable, [sys.executable, *script])
    sys.exit(launch([*options, *script]))


if __name__ == "__main__":
    main()
