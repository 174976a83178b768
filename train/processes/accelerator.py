"""The only place where Accelerate is configured: device, backend, precision, timeouts, seeds."""

import os
import platform
from dataclasses import replace
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
    set_seed,
)

from train.config.errors import InputError
from train.config.options import C, Precision
from train.processes.devices import (
    check_devices,
    device_type,
    launched,
    local_processes,
    pick_precision,
    processes,
)


def start_processes(wanted_precision: Precision | None, trackers: list[str], seed: int = 0) -> tuple[Accelerator, str]:
    """Start this rank's part of the run (collective).

    Returns the accelerator and, for the banner, why it computes in the precision it does.

    Raises:
        InputError: fewer devices than processes, a precision the device lacks, or ranks that do not add up.
    """
    # Before the process group has threads: imported later, one run of four ranks in four ended in an abort.
    # Not at the top of the file, for it takes 1.2 s, which --help and most mistakes need not wait for.
    import torchvision  # noqa: F401

    for tracker in trackers:
        if tracker not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"--trackers names {tracker!r}; Accelerate knows {', '.join(LOGGER_TYPE_TO_CLASS)}.")
        if tracker not in map(str, get_available_trackers()):
            raise InputError(
                f"--trackers names {tracker}, which is not installed: pip install {tracker}, or leave it out."
            )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if compiler.upper() != "NO":
        raise InputError(
            f"The launcher asks for torch.compile (dynamo_backend: {compiler}), which would compile for minutes at "
            "each size of a batch. Take it out of Accelerate's default_config.yaml, or name another with --config_file."
        )
    if launched("WORLD_SIZE", 1) > 1 and not os.environ.get("MASTER_ADDR"):
        raise InputError(
            "WORLD_SIZE says that a launcher has started several processes, but MASTER_ADDR is not set. Start the "
            "script with `accelerate launch` or `torchrun`, or unset WORLD_SIZE."
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
    world = launched("WORLD_SIZE", 1)
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
