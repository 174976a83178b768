"""Work that one process does for all, and what all must have the same. Every function is collective."""

import platform
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object

from train.config.errors import InputError
from train.processes.devices import machine

T = TypeVar("T")


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


def gathered_by_main(accelerator: Accelerator, mine: T) -> list[T]:
    """What each rank has, by rank, on the main process; the others need no room for it (collective)."""
    if accelerator.num_processes == 1:
        return [mine]
    every: list[Any] | None = [None] * accelerator.num_processes if accelerator.is_main_process else None
    torch.distributed.gather_object(mine, every)
    return every or []


def once_per_machine(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run `work`, which may write files that its next call finds, on one process of each machine and then on the rest.

    Returns each process's own result. An error on one machine is every rank's error (collective).
    """
    results: list[T] = []
    first = accelerator.is_local_main_process
    together(lambda: results.append(work()) if first else None)
    together(lambda: None if first else results.append(work()))
    return results[0]


def together(work: Callable[[], Any]) -> None:
    """Do it on all ranks; an error on one is every rank's (collective)."""
    failure: Exception | None = None
    try:
        work()
    except Exception as error:
        failure = error
    for failed in gather_object([failure]):
        if failed is not None:
            raise failed


def first_of_machine(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do it on the first process of each machine alone, which hands its result to the machine's other processes; an
    error on one machine is every rank's (collective).
    """
    results: list[T] = []
    first = accelerator.is_local_main_process
    together(lambda: results.append(work()) if first else None)
    every = gather_object([(machine(), results)])
    return next(told[0] for number, told in every if number == machine() and told)


def check_same(what: str, value: Any, mend: str) -> None:
    """Raise InputError on all ranks where they have not the same value (collective).

    Args:
        what: the value is of, as the beginning of a sentence.
        value: of this rank, as it is shown.
        mend: a sentence.
    """
    every = gather_object([(platform.node(), value)])
    for rank, (host, other) in enumerate(every):
        if other != every[0][1]:
            raise InputError(
                f"{what}: rank 0 ({every[0][0]}) has {every[0][1]}, rank {rank} ({host}) has {other}. {mend}"
            )


def sync_from_main(module: torch.nn.Module) -> None:
    """Give every rank the main process's parameters and buffers (collective).

    The parameters are the same anyway; BatchNorm's running statistics are each rank's own between two forwards.
    """
    for tensor in module.state_dict().values():
        broadcast(tensor)  # in place, from process 0
