"""How the ranks of a run meet, on one machine or several: within a limit, and with the same options."""

import gc
import os
import platform
import time
from dataclasses import asdict, fields, replace
from datetime import timedelta
from typing import Any

from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs, gather_object

from train.config.errors import InputError
from train.config.options import C, TrainConfig
from train.config.reading import AUTO
from train.config.sources import OF_A_MACHINE
from train.config.words import as_flag
from train.processes.devices import check_devices, check_launcher, device_type, launched, local_processes
from train.processes.exits import leave
from train.processes.store import connect, introduce, told

LONGEST = timedelta(minutes=30)  # that a rank waits in a collective, unless --hang-timeout asks for more
FOREVER = timedelta(days=1)
SAID = 30.0  # seconds between two lines while others are waited for


def meet(config: C) -> C:
    """Start the process group, and return the options that all ranks go by (collective).

    Of a run that is gone on with they are the main process's, which alone needs the run's folder; what belongs to a
    machine, such as the place of the data, is each one's own where its command line says so.

    Raises:
        InputError: the launcher's variables are wrong, there are fewer devices than processes, not all ranks have come
            within --hang-timeout, or their options differ.
    """
    check_launcher()
    device = device_type()
    check_devices(local_processes(), device)
    if launched("WORLD_SIZE", 1) == 1:
        start_group(device, config.hang_timeout)
        return config
    _wait_for_all(config.hang_timeout)
    start_group(device, config.hang_timeout)
    every = gather_object([(platform.node(), asdict(config))])
    _, first = every[0]
    if first.get("resume") not in (None, "", AUTO):
        own, plain = asdict(config), asdict(type(config)())
        kept = {name: own[name] for name in OF_A_MACHINE & own.keys() if own[name] != plain[name]}
        config = replace(config, **(first | kept | {"resume": own.get("resume") or first["resume"]}))
    elif different := _differences(every):
        raise InputError("\n".join(different))
    return config


def start_group(device: str, hang_timeout: float = 600) -> None:
    """Start the process group, unless that has been done."""
    # Before the process group has threads: imported later, one run of four ranks in four ended in an abort.
    # Not at the top of the file, for it takes 1.2 s, which --help and most mistakes need not wait for.
    import torchvision  # noqa: F401

    if not gc.isenabled():  # by early.py
        gc.freeze()  # what is there stays, and is not searched again; workers' memory stays their rank's
        gc.enable()
    timeout = max(LONGEST, timedelta(seconds=2 * hang_timeout)) if hang_timeout else FOREVER
    # without `cpu`, several processes on a machine without GPU are each rank 0 of 1
    PartialState(cpu=device == "cpu", **InitProcessGroupKwargs(timeout=timeout).to_kwargs())


def _wait_for_all(limit: float) -> None:
    """Wait until all ranks have come this far. NCCL has no limit of its own for its first meeting, and no words."""
    store, ranks, begun = connect(), launched("WORLD_SIZE", 1), time.monotonic()
    if store is None:  # of a launcher that has none yet: the first rank's, which torch.distributed waits for
        return
    introduce(store)
    store.set(f"here/{launched('RANK', 0)}", platform.node())
    said = begun
    while missing := [rank for rank in range(ranks) if not store.check([f"here/{rank}"])]:
        if end := told(store):
            leave(end)
        now = time.monotonic()
        some = ", ".join(map(str, missing[:8]))
        if limit and now - begun > limit:
            raise InputError(
                f"Of {ranks} processes {ranks - len(missing)} have met within {limit:g} s (--hang-timeout); rank"
                f"{'s'[: len(missing) > 1]} {some} did not come. Start all machines with the same number of processes "
                f"and machines, each with its own --machine_rank, and let them reach "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}."
            )
        if now - said > SAID and launched("LOCAL_RANK", 0) == 0:
            said = now
            print(f"still waiting for rank{'s'[: len(missing) > 1]} {some}, {now - begun:.0f} s", flush=True)
        time.sleep(0.1)


def _differences(every: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """A sentence for each option that is not the same on all ranks."""
    found = []
    host, first = every[0]
    for name in (field.name for field in fields(TrainConfig) if field.name in first and field.name not in OF_A_MACHINE):
        for rank, (other, options) in enumerate(every):
            if options[name] != first[name]:
                found.append(
                    f"{as_flag(name)} is {first[name]!r} on rank 0 ({host}) and {options[name]!r} on rank {rank} "
                    f"({other}); start all machines with the same options."
                )
                break
    return found
