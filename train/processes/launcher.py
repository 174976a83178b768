"""Start a script on so many processes: `python -m train.processes.launcher --gpus 2 -- train/detect.py …`.

`make train`, `make validate` and `make doctor` use it.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

import train
from train.config.errors import InputError
from train.processes.devices import check_devices, device_type, visible

CONFIGS = Path(__file__).resolve().parents[2] / "accelerate_configs"


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
                f"GPUS={gpus} was asked for, but PyTorch {torch.__version__} sees no GPU ({visible()}). "
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
    parser = argparse.ArgumentParser(prog="python -m train.processes.launcher", description=__doc__)
    parser.add_argument("--gpus", type=_number, help="processes, one on each GPU; empty for all GPUs there are")
    parser.add_argument("--cpus", type=_number, help="processes on the CPU")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="-- the script and its options")
    options = parser.parse_args()
    try:
        command = launch_command(options.gpus, options.cpus) + options.script[1:]
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    train.scratch.cleanup()
    if os.environ.get("YOLO_CONFIG_DIR") == train.scratch.name:  # else all ranks would share this process's
        del os.environ["YOLO_CONFIG_DIR"]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
