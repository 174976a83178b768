"""See what each process sees, and what is wrong with it, before a training does.

    make doctor GPUS=2
    accelerate launch --multi_gpu --num_processes 2 train/doctor.py --mixed-precision bf16

Prints a table by rank, a checked and timed all-reduce, and in plain words what is wrong and how to mend it. Exit code 1
where something is wrong.
"""

from train.processes import early  # noqa: F401  # first, see there

# isort: split

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import distributed

from train.config.errors import InputError
from train.config.options import Precision
from train.processes.cores import Usage, core_count, shared_cores
from train.processes.devices import device_type, local_processes, pick_precision
from train.processes.files import check_folder

PACKAGES = ("torch", "torchvision", "accelerate", "ultralytics", "hotcoco", "pycocotools", "wandb")
BUSY = 0.5  # seconds in which is looked what other processes do
ROOM = 2e9  # bytes on the disk that a run of the largest model takes with its checkpoints and pictures
BATCH_BYTES = (16 + 32) * 3 * 640 * 640  # of uint8 images, to train and to validate on; each has workers of its own
Facts = dict[str, Any]
SHOWN: dict[str, Callable[[Any], str]] = {
    "shared memory": lambda free: f"{free / 1e9:.1f} GB free" if free else str(free),
    "disk": lambda free: f"{free / 1e9:.1f} GB free",
    "busy with others": lambda busy: f"{busy:.1f} cores",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the training will be asked for."""

    mixed_precision: Precision | None = None
    """Precision of the training; unset takes what the launcher says."""
    workers: int = 8
    """Data-loading processes of each rank."""
    project: str = "runs/detect"
    """Folder that will hold the runs."""


def facts(options: Options) -> Facts:
    """What this rank sees."""
    local, rank = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("RANK", 0))
    kind = device_type()
    seen: Facts = {"rank": rank, "host": socket.gethostname(), "address": address(), "pid": os.getpid()}
    seen |= {"device": kind, "name": platform.processor() or platform.machine(), "memory": "", "capability": ""}
    seen |= {"GPUs seen": torch.cuda.device_count(), "ranks on this host": local_processes()}
    if kind == "cuda":
        index = local % max(torch.cuda.device_count(), 1)
        card = torch.cuda.get_device_properties(index)
        seen |= {"device": f"cuda:{index}", "name": card.name, "memory": f"{card.total_memory / 1e9:.0f} GB"}
        seen |= {"capability": f"{card.major}.{card.minor}", "uuid": str(getattr(card, "uuid", index))}
    seen["driver"] = driver()
    seen["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    seen["CUDA of torch"] = torch.version.cuda or "none: a CPU build"
    seen["backend"] = "nccl" if kind == "cuda" else "gloo"
    seen["NCCL"] = distributed.is_nccl_available()
    for name in PACKAGES:
        try:
            seen[name] = version(name)
        except PackageNotFoundError:
            seen[name] = "not installed"
    seen["python"] = platform.python_version()
    seen["cores"] = core_count()
    before = Usage.now()
    time.sleep(BUSY)
    seen["busy with others"] = Usage.now().others_since(before)
    seen["threads"] = torch.get_num_threads()
    seen["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "not set")
    seen["shared memory"] = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None
    seen["run folder"], seen["run folder fault"] = os.path.abspath(options.project), ""
    there = Path(seen["run folder"])
    while not there.exists():
        there = there.parent
    seen["disk"] = shutil.disk_usage(there).free
    try:
        check_folder(Path(options.project), "--project")
    except InputError as error:
        seen["run folder fault"] = str(error)
    seen["open files"] = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        precision, reason = pick_precision(options.mixed_precision, kind)
        seen |= {"precision": f"{precision} ({reason})", "precision fault": ""}
    except InputError as error:
        seen |= {"precision": "none", "precision fault": str(error)}
    return seen


def address() -> str:
    """What this machine's name leads to, which gloo talks by."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "none"


def driver() -> str:
    """Version of NVIDIA's driver; empty where there is none."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return said.stdout.split()[0] if said.returncode == 0 and said.stdout else ""
    except (OSError, subprocess.TimeoutExpired):
        return ""


def findings(ranks: list[Facts], options: Options) -> list[str]:
    """What is wrong and how to mend it, one sentence or two each, with the ranks it is about."""
    found: list[str] = []
    for host in dict.fromkeys(seen["host"] for seen in ranks):
        here = [seen for seen in ranks if seen["host"] == host]
        first, wanted = here[0], here[0]["ranks on this host"]
        cuda = first["device"].startswith("cuda")
        if first["driver"] and first["CUDA of torch"].startswith("none"):
            found.append(
                f"{host} has an NVIDIA driver ({first['driver']}), but torch {first['torch']} is a CPU build. "
                "Install one for CUDA: see https://pytorch.org/get-started/locally."
            )
        elif first["driver"] and not first["GPUs seen"]:
            found.append(
                f"{host} has an NVIDIA driver, but PyTorch sees no GPU (CUDA_VISIBLE_DEVICES is "
                f"{first['CUDA_VISIBLE_DEVICES']}). Set it to the GPUs to use, or unset it."
            )
        if cuda and wanted > first["GPUs seen"]:
            found.append(
                f"{wanted} processes were started on {host}, which has {first['GPUs seen']} GPUs for them. "
                f"Start {first['GPUs seen']}: GPUS={first['GPUs seen']} or --num_processes {first['GPUs seen']}."
            )
        by_device: dict[str, list[int]] = {}
        for seen in here:
            if cuda:
                by_device.setdefault(str(seen.get("uuid", seen["device"])), []).append(seen["rank"])
        for shared in (held for held in by_device.values() if len(held) > 1):
            found.append(
                f"Ranks {', '.join(map(str, shared))} are on one GPU of {host}. Start fewer processes, or make more "
                f"GPUs visible (CUDA_VISIBLE_DEVICES is {first['CUDA_VISIBLE_DEVICES']})."
            )
        if cuda and len(ranks) > 1 and not first["NCCL"]:
            found.append(f"torch {first['torch']} on {host} has no NCCL, which GPUs talk by. Install a CUDA build.")
        workers = min(options.workers, first["cores"] // wanted)
        # Three batches in the hands of each worker that validates, two in those of each that begins the next epoch.
        needed = 5 * BATCH_BYTES * workers * wanted
        if first["shared memory"] is not None and first["shared memory"] < needed:
            found.append(
                f"/dev/shm on {host} has {first['shared memory'] / 1e6:.0f} MB free; {workers} workers in each of "
                f"{wanted} ranks need about {needed / 1e6:.0f} MB. Start the container with --shm-size=8g or "
                "--ipc=host, or train with --workers 0."
            )
        if first["threads"] * wanted > first["cores"]:
            found.append(
                f"{wanted} ranks of {first['threads']} threads share the {first['cores']} cores of {host}. "
                f"Set OMP_NUM_THREADS={max(first['cores'] // wanted, 1)}."
            )
        elif not cuda and first["threads"] * wanted * 2 <= first["cores"] - (first["OMP_NUM_THREADS"] == "not set"):
            found.append(
                f"{wanted} ranks of {first['threads']} threads leave most of the {first['cores']} cores of {host} idle "
                f"(launchers set one thread). Set OMP_NUM_THREADS={first['cores'] // wanted}."
            )
        if not cuda and first["threads"] > 1 and first["busy with others"] > first["cores"] / 2:
            found.append(shared_cores(first["busy with others"], first["cores"], host))
        if len({seen["host"] for seen in ranks}) > 1 and first["address"].startswith(("127.", "none")):
            found.append(
                f"The name {host} leads to {first['address']}, by which other machines cannot reach it. Set "
                "GLOO_SOCKET_IFNAME to the network interface between the machines (ip addr), or mend /etc/hosts."
            )
        if first["disk"] < ROOM:
            found.append(
                f"{first['disk'] / 1e9:.1f} GB are free for {first['run folder']} on {host}. A run takes up to "
                f"{ROOM / 1e9:.0f} GB: free some space, or name another disk with --project."
            )
        if 0 <= first["open files"] < 1024:
            found.append(f"{host} allows {first['open files']} open files, too few for workers: ulimit -n 4096.")
    faults = [seen[kind] for kind in ("precision fault", "run folder fault") for seen in ranks]
    found += dict.fromkeys(fault for fault in faults if fault)
    for name in ("python", *PACKAGES):
        if len(versions := {seen[name] for seen in ranks}) > 1:
            found.append(f"The ranks have different versions of {name}: {', '.join(sorted(versions))}. Make them one.")
    return found


def table(ranks: list[Facts]) -> list[str]:
    """The facts as lines, a column for each rank; what all have in common is said once."""
    lines = []
    for name in ranks[0]:
        if name in ("uuid", "precision fault", "run folder fault"):
            continue
        values = [SHOWN.get(name, str)(seen[name]) for seen in ranks]
        shown = values[:1] if len(set(values)) == 1 and name != "rank" else values
        lines.append(f"{name:22}" + "".join(f"{value:<28}" if len(shown) > 1 else value for value in shown).rstrip())
    return lines


def all_reduce(device: torch.device, megabytes: int = 32) -> tuple[bool, float]:
    """Whether a sum over the ranks is right, and the seconds that it takes (collective).

    Raises:
        RuntimeError: it fails, or takes longer than two minutes.
    """
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    tensor, right, seconds = torch.empty(megabytes * 250_000, device=device), True, []
    backend = "nccl" if device.type == "cuda" else "gloo"
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # an error in time, where NCCL would abort the process
    group: Any = distributed.new_group(backend=backend, timeout=timedelta(minutes=2))
    for _ in range(4):
        tensor.fill_(rank + 1)
        started = time.perf_counter()
        distributed.all_reduce(tensor, group=group)
        right &= bool((tensor == ranks * (ranks + 1) / 2).all())  # waits for the device
        seconds.append(time.perf_counter() - started)
    return right, min(seconds)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def main(options: Options) -> int:
    """Every rank runs all of it; the first one speaks. Returns the exit code."""
    seen, ranks = facts(options), int(os.environ.get("WORLD_SIZE", 1))
    everyone: list[Facts] = [seen]
    if ranks > 1:
        everyone = [{} for _ in range(ranks)]
        try:
            # gloo, not Accelerate's choice: the ranks must be able to talk where the GPUs or NCCL are what is wrong
            distributed.init_process_group("gloo", timeout=timedelta(minutes=2))
            distributed.all_gather_object(everyone, seen)
        except RuntimeError as error:
            print(
                f"wrong: rank {seen['rank']} on {seen['host']} ({seen['address']}) and the others cannot talk "
                f"({_first_line(error)}). Start all {ranks} processes, let the machines reach each other, and set "
                "GLOO_SOCKET_IFNAME to the network interface between them (ip addr).", file=sys.stderr, flush=True,
            )  # fmt: skip
            return 1
    speaks = seen["rank"] == 0
    wrong = findings(everyone, options)
    if speaks:
        print("\n".join(table(everyone)))
    if ranks > 1 and not (wrong and seen["device"].startswith("cuda")):
        device = torch.device(seen["device"])
        try:
            right, seconds = all_reduce(device)
        except RuntimeError as error:
            print(
                f"wrong: the all-reduce of rank {seen['rank']} failed ({_first_line(error)}). On one machine try "
                "NCCL_P2P_DISABLE=1; on several set NCCL_SOCKET_IFNAME to the network interface between them (ip "
                "addr). NCCL_DEBUG=WARN says more.", file=sys.stderr, flush=True,
            )  # fmt: skip
            os._exit(1)  # shutting down what has failed would wait for it
        if speaks:
            print(f"{'all-reduce':22}32 MB in {seconds * 1000:.1f} ms, {'right' if right else 'WRONG'}")
        if not right:
            wrong.append("The sum over the ranks is wrong: the machine or its interconnect cannot be trusted.")
    elif ranks > 1 and speaks:
        print(f"{'all-reduce':22}not tried while something is wrong")
    if speaks:
        print("\n".join(f"wrong: {sentence}" for sentence in wrong) or "nothing wrong found", flush=True)
    if ranks > 1:
        distributed.barrier()
        distributed.destroy_process_group()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
