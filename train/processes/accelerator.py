"""The only place where Accelerate is configured: device, backend, precision, timeouts, seeds."""

import platform
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    gather_object,
    set_seed,
)
from torch.nn.parallel import DistributedDataParallel

from train.config.errors import InputError
from train.config.options import C, Precision
from train.processes.devices import device_type, lacks, launched, pick_precision, processes
from train.processes.meeting import start_group


def start_processes(
    wanted_precision: Precision | None, trackers: list[str], seed: int = 0, compressed: bool = False
) -> tuple[Accelerator, str]:
    """Set Accelerate up for this rank's part of a run whose ranks have met, see `meet` (collective).

    Args:
        wanted_precision: as the user has said it.
        trackers: to be started later.
        seed: of Python's, NumPy's and torch's generators.
        compressed: whether gradients are summed over the ranks in bf16.

    Returns the accelerator and, for the banner, why it computes in the precision it does.

    Raises:
        InputError: a tracker that is not there, a precision the device lacks, or ranks that do not add up.
    """
    for tracker in trackers:
        if tracker not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"--trackers names {tracker!r}; Accelerate knows {', '.join(LOGGER_TYPE_TO_CLASS)}.")
        if tracker not in map(str, get_available_trackers()):
            raise InputError(
                f"--trackers names {tracker}, which is not installed: pip install {tracker}, or leave it out."
            )
    device = device_type()
    start_group(device)
    precision, reason = pick_precision(wanted_precision, device)
    accelerator = Accelerator(
        cpu=device == "cpu",  # without it, several processes on a machine without GPU are each rank 0 of 1
        mixed_precision=precision,
        log_with=trackers or None,
        project_config=ProjectConfiguration(logging_dir="."),  # the run's folder, once the ranks have agreed on it
        # Ranks may hold different numbers of validation batches; training batches are dealt out evenly by number.
        dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=device == "cuda"),
        kwargs_handlers=[
            # Not static_graph: its first all-reduce comes after the backward and lays out other buckets, so that three
            # ranks and more have other sums; `make test-cuda` prints what it would be worth.
            DistributedDataParallelKwargs(
                find_unused_parameters=False,
                gradient_as_bucket_view=True,
                comm_hook=DDPCommunicationHookType.BF16 if compressed else DDPCommunicationHookType.NO,
            ),
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


def without_buffer_broadcast(model: torch.nn.Module) -> torch.nn.Module:
    """The model that Accelerate prepared, without DDP's broadcast of all buffers before each forward.

    It changes no number: a forward in training reads no running statistics, and before validation the ranks get the
    main process's. Not as an argument of DDP's constructor, which would leave out the first broadcast, too.
    """
    if isinstance(model, DistributedDataParallel):
        model.broadcast_buffers = False
    return model


def settle_buckets(model: torch.nn.Module, channels: int, size: int, apart: list[torch.nn.Parameter]) -> None:
    """Have DDP lay out the gradients as it will after the first backward, on more than two ranks (collective).

    Sums over more than two ranks depend on that layout, bit by bit; a run that is gone on with would begin with another
    one than the whole run has at that step. One backward of an empty image each does it, and leaves nothing else.

    Args:
        model: that Accelerate prepared, in training mode.
        channels: of an image.
        size: of its sides, in pixels; the model has to take it.
        apart: parameters that no forward uses, but the loss does.
    """
    if not isinstance(model, DistributedDataParallel) or torch.distributed.get_world_size() < 3:
        return
    buffers = {name: value.clone() for name, value in model.module.named_buffers()}
    device = next(model.parameters()).device
    with torch.compiler.set_stance("force_eager"):  # a compiled model takes the size of the first batch for every one's
        outputs = _tensors(model(torch.zeros(1, channels, size, size, device=device)))
    torch.stack([output.float().sum() for output in (*outputs, *apart)]).sum().backward()
    model.zero_grad()
    with torch.no_grad():
        for name, value in model.module.named_buffers():
            value.copy_(buffers[name])


def _tensors(outputs: Any) -> list[torch.Tensor]:
    """What a loss is computed from, in a model's nested outputs: all but the features, of which it takes the shapes."""
    if isinstance(outputs, dict):
        return [tensor for name, part in outputs.items() if name != "feats" for tensor in _tensors(part)]
    if isinstance(outputs, tuple):
        return [tensor for part in outputs for tensor in _tensors(part)]
    return [outputs] if isinstance(outputs, torch.Tensor) and outputs.requires_grad else []
