"""How much memory, shared memory and disk there is left for what the processes of a run share."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
SHARED = Path("/dev/shm")
# Beginnings of file systems' names
NETWORKS = ("afs", "beegfs", "ceph", "cifs", "gcsfuse", "gluster", "gpfs", "lustre", "nfs", "s3fs", "smb", "sshfs")


def memory() -> int:
    """Bytes that may be taken up yet: of the machine, and within the limit of a container."""
    return min([psutil.virtual_memory().available, *_left(CGROUPS, OWN_CGROUPS)])


def disk(folder: Path) -> int:
    """Bytes free on the disk of a folder, or of where it would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def network_disk(folder: Path) -> str:
    """The file system of a folder, or of where it would be made, where that is one of a network; else nothing."""
    there = str(folder.absolute())
    mounts = [p for p in psutil.disk_partitions(all=True) if f"{there}/".startswith(p.mountpoint.rstrip("/") + "/")]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""
    return kind if kind.removeprefix("fuse.").startswith(NETWORKS) else ""


def control_groups(cgroups: Path, own: Path, controller: str) -> Iterator[Path]:
    """This process's control groups of both versions, and those around them, that may limit something.

    Args:
        cgroups: where the groups are mounted.
        own: a line for each hierarchy, number:controllers:path.
        controller: `cpu` or `memory`.
    """
    try:
        hierarchies = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # not Linux
        return
    for _, controllers, path in hierarchies:
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroups / controller if controllers else cgroups
        # In a container the path may be the host's, of which nothing is mounted here but the end, as the root.
        group = Path(os.path.normpath(f"{root}/{path}"))
        yield from (root, *(place for place in (group, *group.parents) if root in place.parents))


def _left(cgroups: Path, own: Path) -> Iterator[int]:
    """What each control group leaves: its limit less what is in use and would not be given up for more."""
    for group in control_groups(cgroups, own, "memory"):
        for most, used, given_up in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                limit, now = (int((group / name).read_text()) for name in (most, used))
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # there is no such file, or it says `max`
                continue
            yield max(limit - now + int(stat.get(given_up, 0)), 0)
