"""The only place where Accelerate is configured: launcher, device, backend, precision, timeouts, seeds.

`python -m train.processes --gpus 2 -- train/detect.py …` starts a script on so many processes; `make train` uses it.
"""

import argparse
import contextlib
import logging
import os
import platform
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast,
    broadcast_object_list,
    gather_object,
    set_seed,
)

import train
from train.config import C, InputError, Precision, parse
from train.watch import is_first, log_stream

T = TypeVar("T")
CONFIGS = Path(__file__).resolve().parent.parent / "accelerate_configs"


def _launched(variable: str, default: int) -> int:
    """What torchrun or accelerate launch tell each process they start."""
    return int(os.environ.get(variable, default))


def local_processes() -> int:
    """Processes of this run on this machine."""
    return _launched("LOCAL_WORLD_SIZE", 1)


def device_type() -> str:
    """`cuda`, `mps`, `cpu`, …: the kind of device this run uses; ACCELERATE_USE_CPU=true asks for the CPU."""
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "on")
    if wants_cpu or not torch.accelerator.is_available():
        return "cpu"
    return torch.accelerator.current_accelerator().type  # type: ignore[union-attr]


def check_devices(wanted: int, device: str) -> None:
    """Raise InputError where this machine has fewer devices than the processes that are to run on it."""
    if device == "mps" and wanted > 1:
        raise InputError(f"{wanted} processes were asked for, but Apple's MPS trains in one. Start one process.")
    if device in ("cpu", "mps"):
        return
    seen = torch.accelerator.device_count()
    if wanted > seen:
        raise InputError(
            f"{wanted} GPU processes were asked for, but PyTorch sees {seen} {device.upper()} device{'s'[: seen != 1]} "
            f"({_visible()}). Type GPUS={seen}, or CPUS={wanted} for processes on the CPU."
        )


def processes(number: int) -> str:
    """`1 process`, `2 processes`."""
    return "1 process" if number == 1 else f"{number} processes"


def _visible() -> str:
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "CUDA_VISIBLE_DEVICES is not set" if value is None else f"CUDA_VISIBLE_DEVICES={value!r}"


def pick_precision(wanted: Precision | None, device: str) -> tuple[str, str]:
    """Resolve `--mixed_precision` to Accelerate's value and say why.

    `auto` is bf16 where the hardware computes it, fp16 on CUDA devices that have tensor cores but no bf16 (T4, V100),
    else fp32.
    """
    if wanted is None:
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        wanted, reason = launcher, "the launcher's" if launcher != "no" else "the default"  # type: ignore[assignment]
    elif wanted != "auto":
        reason = "asked for"
    elif device == "cuda":
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            wanted, reason = "bf16", f"{name} computes bf16"
        elif capability >= (7, 0):
            wanted, reason = "fp16", f"{name} computes fp16 fast but has no bf16"
        else:
            wanted, reason = "no", f"{name} has neither bf16 nor tensor cores"
    elif device == "cpu" and _cpu_has_fast_bf16() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        wanted, reason = "bf16", "this CPU computes bf16"
    else:
        wanted, reason = "no", f"this {device.upper()} has no fast bf16"
    if wanted == "fp16" and device == "cpu":
        raise InputError("--mixed_precision is fp16, which the CPU does not compute. Say bf16, no or auto.")
    assert wanted is not None
    return wanted, reason


def _cpu_has_fast_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that PyTorch has reserved on the GPU, or this process's highest resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def start_processes(wanted_precision: Precision | None, trackers: list[str], seed: int = 0) -> tuple[Accelerator, str]:
    """Start this rank's part of the run (collective).

    Returns the accelerator and, for the banner, why it computes in the precision it does.

    Raises:
        InputError: fewer devices than processes, a precision the device lacks, or ranks that do not add up.
    """
    for tracker in trackers:
        if tracker not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"--trackers names {tracker!r}; Accelerate knows {', '.join(LOGGER_TYPE_TO_CLASS)}.")
        if tracker not in map(str, get_available_trackers()):
            raise InputError(
                f"--trackers names {tracker}, which is not installed: pip install {tracker}, or leave it out."
            )
    device = device_type()
    check_devices(local_processes(), device)
    precision, reason = pick_precision(wanted_precision, device)
    accelerator = Accelerator(
        cpu=device == "cpu",  # without it, several processes on a machine without GPU are each rank 0 of 1
        mixed_precision=precision,
        log_with=trackers or None,
        project_config=ProjectConfiguration(logging_dir="."),  # the run's folder, once the ranks have agreed on it
        # Ranks may hold different numbers of validation batches; training batches are dealt out evenly by number.
        dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=True),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(minutes=30)),
        ],
    )
    world = _launched("WORLD_SIZE", 1)
    if accelerator.num_processes != world:
        raise InputError(
            f"The launcher started {processes(world)}, but Accelerate counts {accelerator.num_processes}. "
            "Start the script with `accelerate launch` or `torchrun`, and on Apple's MPS as one process."
        )
    precisions = gather_object([precision])  # collective
    if len(set(precisions)) > 1:
        raise InputError(f"The ranks would compute in {', '.join(precisions)}. Say which with --mixed_precision.")
    set_seed(seed)
    return accelerator, reason


def resolved(config: C, accelerator: Accelerator) -> C:
    """The configuration with what the device decides filled in: precision and memory order.

    Raises:
        InputError: a precision that the device lacks.
    """
    fast = accelerator.device.type == "cuda" or (
        accelerator.device.type == "cpu"
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
    )
    if getattr(config, "val_precision", None) == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--val-precision is fp16, which the CPU does not compute. Say bf16 or no.")
    channels_last = fast if config.channels_last is None else config.channels_last
    return replace(config, mixed_precision=accelerator.mixed_precision, channels_last=channels_last)


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run `work` on the main process and hand its result, or its error, to every rank (collective).

    An error on the main process alone would leave the others waiting for it in their next collective.
    """
    outcome: list[Any] = [None, None]  # result, error
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    result, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    return result


def once_per_machine(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run `work`, which may write files that its next call finds, on one process of each machine and then on the rest.

    Returns each process's own result. An error on one machine is every rank's error (collective).
    """
    result: Any = None
    for turn in (True, False):
        failure = None
        if accelerator.is_local_main_process == turn:
            try:
                result = work()
            except InputError as error:
                failure = error
        failures = [failed for failed in gather_object([failure]) if failed is not None]
        if failures:
            raise failures[0]
    return result


def sync_from_main(module: torch.nn.Module) -> None:
    """Give every rank the main process's parameters and buffers (collective).

    The parameters are the same anyway; BatchNorm's running statistics are each rank's own between two forwards.
    """
    for tensor in module.state_dict().values():
        broadcast(tensor)  # in place, from process 0


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Before the processes know each other: only the first process of each machine prints."""
    if _launched("LOCAL_RANK", 0) == 0:
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def run(main: Callable[[C], None], kind: type[C], description: str) -> None:
    """Read the options and run a script's main with them.

    An error is said once: by the rank that failed first, with its number and the path of its log, where the traceback
    is. What a person can mend is one message: exit code 2 for bad input, 1 for a loss that is no longer a number.
    """
    code = 0
    logging.getLogger("train").addHandler(logging.NullHandler())  # else logging prints what no file takes yet
    try:
        with said_once():
            config, warnings = parse(kind, description)
            print("\n".join(warnings), end="\n" * bool(warnings), file=sys.stderr)
        main(config)
    except (InputError, FloatingPointError) as error:
        logging.getLogger("train").error(str(error))
        _say_first(f"error: {error}")
        code = 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        _say_first("interrupted")
        code = 130
    except Exception as error:
        code = 1
        logging.getLogger("train").exception("this rank failed")
        _say_first(_failure(error))
        if _launched("WORLD_SIZE", 1) > 1:  # nothing that waits for the other ranks may stand in the way of the exit
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code)
    if torch.distributed.is_initialized():  # left open, its threads may abort the process at exit
        torch.distributed.destroy_process_group()
    sys.exit(code)


def _say_first(text: str) -> None:
    """Say it on standard error, unless another rank has said that it failed: that one's error is the cause."""
    if torch.distributed.is_initialized():
        if not is_first("failed"):
            return
    elif _launched("LOCAL_RANK", 0) != 0:
        return
    print(text, file=sys.stderr, flush=True)


def _failure(error: Exception) -> str:
    """An unforeseen error for the console; the whole traceback where there is no log yet."""
    rank, ranks = _launched("RANK", 0), _launched("WORLD_SIZE", 1)
    lines = [f"error: rank {rank} of {ranks} on {platform.node()} failed: {type(error).__name__}: {error}"]
    if (log := log_stream()) is None:
        return "\n".join(["".join(traceback.format_exception(error)), *lines])
    ours = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}train{os.sep}" in f.filename]
    if ours:
        lines.append(f"  at {ours[-1].filename}:{ours[-1].lineno}, in {ours[-1].name}: {ours[-1].line}")
    return "\n".join([*lines, f"  the traceback is in {log.name}"])


def launch_command(gpus: int | None, cpus: int | None) -> list[str]:
    """The command that starts a script on so many GPUs or CPU processes; without either all GPUs, else one process.

    Raises:
        InputError: the numbers contradict each other or the machine.
    """
    if gpus is not None and cpus is not None:
        raise InputError(f"GPUS={gpus} and CPUS={cpus} were both given; give one.")
    if (gpus or cpus or 1) < 1 or gpus == 0 or cpus == 0:
        raise InputError(f"GPUS={gpus} CPUS={cpus}: at least one process is needed.")
    if cpus is not None:
        threads = max((os.cpu_count() or 1) // cpus, 1)
        environment = [
            "env",
            "ACCELERATE_USE_CPU=true",
            f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', threads)}",
        ]
        return [*environment, *_accelerate("multi_cpu.yaml", cpus)] if cpus > 1 else [*environment, sys.executable]
    device = device_type()
    if gpus is not None:
        if device == "cpu":
            raise InputError(
                f"GPUS={gpus} was asked for, but PyTorch {torch.__version__} sees no GPU ({_visible()}). "
                f"Type CPUS={gpus} for processes on the CPU, or install a CUDA build of torch and a driver."
            )
        check_devices(gpus, device)
    processes = gpus or (torch.accelerator.device_count() if device not in ("cpu", "mps") else 1)
    return _accelerate("multi_gpu.yaml", processes) if processes > 1 else [sys.executable]


def _accelerate(config: str, processes: int) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launcher, "--config_file", str(CONFIGS / config), "--num_processes", str(processes)]


def _number(text: str) -> int | None:
    return int(text) if text else None


def main() -> None:
    """Replace this process by the launch of a script, so that signals reach what was launched."""
    parser = argparse.ArgumentParser(prog="python -m train.processes", description=__doc__)
    parser.add_argument("--gpus", type=_number, help="processes, one on each GPU; empty for all GPUs there are")
    parser.add_argument("--cpus", type=_number, help="processes on the CPU")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="-- the script and its options")
    options = parser.parse_args()
    try:
        command = launch_command(options.gpus, options.cpus) + options.script[1:]
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    if train.settings is not None:  # else all ranks would share this process's
        train.settings.cleanup()
        del os.environ["YOLO_CONFIG_DIR"]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
