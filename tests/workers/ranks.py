"""Says its rank; or fails on the main process alone; or gathers after an uneven loop."""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from train.config.errors import InputError
from train.config.options import TrainConfig
from train.processes.accelerator import start_processes
from train.processes.collectives import gathered_by_main, on_main
from train.processes.script import run

task = sys.argv.pop() if len(sys.argv) > 1 else ""


def fail() -> None:
    raise InputError("only the main process knows")


def main(config: TrainConfig) -> None:
    if task == "alone":
        from accelerate.state import PartialState

        PartialState._shared_state.update(
            {"_cpu": True, "backend": None}
        )  # as a launcher that is not torch's leaves it
        for name, value in (("distributed_type", "NO"), ("num_processes", 1), ("process_index", 0)):
            PartialState._shared_state[name] = value
        PartialState._shared_state |= {"local_process_index": 0, "device": torch.device("cpu"), "debug": False}
    accelerator, _ = start_processes(None, [])
    if task == "fail":
        on_main(accelerator, fail)
        print(f"rank {accelerator.process_index} still here")
    elif task == "gather":
        gather(accelerator)
    else:
        total = accelerator.reduce(torch.tensor(accelerator.process_index), "sum").item()
        rank, ranks = accelerator.process_index, accelerator.num_processes
        sys.stdout.write(f"rank {rank} of {ranks}, sum {total}, on {accelerator.device.type}\n")  # one write a line


def gather(accelerator: Accelerator) -> None:
    loader = accelerator.prepare(DataLoader(range(7), batch_sampler=[[0, 1, 2], [3, 4], [5, 6]]))
    for _ in loader:
        pass
    mine = [accelerator.process_index] * (accelerator.process_index + 1)
    accelerator.print("gathered", accelerator.gather_for_metrics([mine], use_gather_object=True))
    sys.stdout.write(f"rank {accelerator.process_index} was handed {gathered_by_main(accelerator, mine)}\n")


run(main, TrainConfig, "")
