"""What this machine has and what the launcher says: devices, precision, memory, the number of processes."""

import os
import resource
import sys
from pathlib import Path

import torch

from train.config.errors import InputError
from train.config.options import Precision

YES, NO = ("1", "true", "yes", "on", "t", "y"), ("0", "false", "no", "off", "f", "n", "")  # as Accelerate has it


def launched(variable: str, default: int) -> int:
    """A number that torchrun or accelerate launch tell each process they start: WORLD_SIZE, RANK, LOCAL_RANK, …"""
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        raise InputError(f"{variable} is {value!r}; a launcher sets it to a whole number. Unset it, or use a launcher.")
    return int(value)


def local_processes() -> int:
    """Processes of this run on this machine."""
    return launched("LOCAL_WORLD_SIZE", 1)


def machine() -> int:
    """Which of the run's machines this is; the first has the main process."""
    return launched("GROUP_RANK", launched("RANK", 0) // local_processes())


def device_type() -> str:
    """`cuda`, `mps`, `cpu`, …: the kind of device this run uses; ACCELERATE_USE_CPU=true asks for the CPU."""
    value = os.environ.get("ACCELERATE_USE_CPU", "false").lower()
    if value not in (*YES, *NO):
        raise InputError(f"ACCELERATE_USE_CPU is {value!r}; it must be true or false.")
    if value in YES or not torch.accelerator.is_available():
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
            f"({visible()}). Type GPUS={seen}, or CPUS={wanted} for processes on the CPU."
        )


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
            f"each size of a batch. Say --compile to train/detect.py instead. {mend}"
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
    if launched("WORLD_SIZE", 1) > 1 and not os.environ.get("MASTER_ADDR"):
        raise InputError(
            "WORLD_SIZE says that a launcher has started several processes, but MASTER_ADDR is not set. Start the "
            "script with `accelerate launch` or `torchrun`, or unset WORLD_SIZE."
        )


def processes(number: int) -> str:
    """`1 process`, `2 processes`."""
    return "1 process" if number == 1 else f"{number} processes"


def visible() -> str:
    """Which GPUs CUDA may see, in words."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "CUDA_VISIBLE_DEVICES is not set" if value is None else f"CUDA_VISIBLE_DEVICES={value!r}"


def pick_precision(wanted: Precision | None, device: str) -> tuple[str, str]:
    """Resolve `--mixed_precision` to Accelerate's value and say why.

    `auto` is bf16 where the hardware computes it, fp16 on CUDA devices that have tensor cores but no bf16 (T4, V100),
    else fp32.

    Raises:
        InputError: the device lacks the precision that was asked for.
    """
    name, capability = _card() if device == "cuda" else ("", (0, 0))
    if wanted is None:
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launcher not in ("bf16", "fp16", "no"):
            raise InputError(
                f"The launcher asks for {launcher}, which these scripts do not train in. Say --mixed-precision auto."
            )
        wanted, reason = launcher, "the launcher's" if launcher != "no" else "the default"  # type: ignore[assignment]
    elif wanted != "auto":
        reason = "asked for"
    elif device == "cuda":
        if not lacks("bf16", device):
            wanted, reason = "bf16", f"{name} computes bf16"
        elif capability >= (7, 0):
            wanted, reason = "fp16", f"{name} computes fp16 fast but has no bf16"
        else:
            wanted, reason = "no", f"{name} has neither bf16 nor tensor cores"
    elif device == "cpu" and _cpu_has_fast_bf16() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        wanted, reason = "bf16", "this CPU computes bf16"
    else:
        wanted, reason = "no", f"this {device.upper()} has no fast bf16"
    assert wanted is not None
    if lacking := lacks(wanted, device):
        raise InputError(f"--mixed_precision is {wanted}, which {lacking}. Say --mixed_precision auto.")
    return wanted, reason


def lacks(precision: str, device: str) -> str:
    """Why this rank's device does not compute in this precision, as the end of a sentence; empty where it does."""
    if precision == "fp16" and device == "cpu":
        return "the CPU does not compute"
    # PyTorch says that older cards have bf16, too: it emulates it, slowly, and cuDNN may refuse it.
    if precision == "bf16" and device == "cuda" and not torch.version.hip:
        name, capability = _card()
        if capability < (8, 0):
            return f"{name} does not compute"
    return ""


def own_gpu() -> int:
    """Index of the GPU that this rank will use; it is known before Accelerate makes it the current one."""
    return launched("LOCAL_RANK", 0) % max(torch.cuda.device_count(), 1)


def _card() -> tuple[str, tuple[int, int]]:
    """Name and capability of this rank's GPU."""
    return torch.cuda.get_device_name(own_gpu()), torch.cuda.get_device_capability(own_gpu())


def _cpu_has_fast_bf16() -> bool:
    """Whether training in bf16 is faster than in fp32: 2.5 times here by AMD's AVX-512, 0.78 times by Intel's, which is
    left where a virtual machine hides AMX.
    """
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and not _is_intel()


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that PyTorch has reserved on the GPU, or this process's highest resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
