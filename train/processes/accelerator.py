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
from torch.nn.parallel import DistributedDataParallel

from train.config.errors import InputError
from train.config.options import C, Precision
from train.processes.devices import (
    YES,
    check_devices,
    device_type,
    lacks,
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
    check_launcher()
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
        dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=device == "cuda"),
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
    val_precision = getattr(config, "val_precision", None) or "no"
    if lacking := lacks(val_precision, accelerator.device.type):
        raise InputError(f"--val-precision is {val_precision}, which {lacking}. Say another, or leave it out.")
    channels_last = fast if config.channels_last is None else config.channels_last
    return replace(config, mixed_precision=accelerator.mixed_precision, channels_last=channels_last)


def check_launcher() -> None:
    """Raise InputError where the launcher asks for what these scripts do not do: it would change the loss, or nothing.

    Accelerate's default configuration, which anybody's `accelerate config` may have written, counts wherever
    `accelerate launch` is typed without --config_file.
    """
    mend = "Take it out of Accelerate's default_config.yaml, or name another with --config_file."
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if compiler.upper() != "NO":
        raise InputError(
            f"The launcher asks for torch.compile (dynamo_backend: {compiler}), which would compile for minutes at "
            f"each size of a batch. {mend}"
        )
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in YES:
            raise InputError(f"The launcher asks for {name}; these scripts train by data parallelism (DDP). {mend}")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):
        raise InputError(
            f"The launcher asks for gradient_accumulation_steps: {steps}, which would divide the loss. Say --nbs "
            f"(images in one step) to the script instead. {mend}"
        )


def without_buffer_broadcast(model: torch.nn.Module) -> torch.nn.Module:
    """The model that Accelerate prepared, without DDP's broadcast of all buffers before each forward.

    It changes no number: a forward in training reads no running statistics, and before validation the ranks get the
    main process's. Not as an argument of DDP's constructor, which would leave out the first broadcast, too.
    """
    if isinstance(model, DistributedDataParallel):
        model.broadcast_buffers = False
    return model
