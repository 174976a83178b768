"""Where the machines of a run find and leave what belongs to it."""

import uuid
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

import train
from train.processes.collectives import first_of_machine, on_main
from train.processes.devices import local_processes, machine
from train.processes.files import new_folder


def hand_out(accelerator: Accelerator, file: Path) -> str:
    """The path under which this rank finds a file of the main process's machine (collective).

    Other machines need not have it, or have it as it was once: they get a copy in the temporary folder.
    """
    if accelerator.num_processes == local_processes():
        return str(file)
    content = on_main(accelerator, file.read_bytes)
    copy = Path(train.scratch.name) / file.name
    if machine() == 0:  # the main process's machine
        return str(file)
    copy.write_bytes(content)
    return str(copy)


def folder_here(accelerator: Accelerator, folder: Path, project: Path, resume: str) -> Path:
    """The run's folder as this rank's machine has it (collective).

    It is the main process's where that stands at the same place of this machine's options, as on a shared disk. Else it
    is a folder of this machine's own, a new one, where nothing is put but the logs of its ranks.

    Args:
        accelerator: of the run.
        folder: of the main process, which has just made it.
        project: that holds the runs of this machine.
        resume: the run that is gone on with, if it is one: then a folder that is there is the right one.
    """
    if accelerator.num_processes == local_processes():
        return folder
    token = broadcast_object_list([f".{uuid.uuid4().hex}"])[0]
    if accelerator.is_main_process:
        (folder / token).touch()
    accelerator.wait_for_everyone()
    place = Path(resume) if resume else project / folder.name
    own = folder if accelerator.is_main_process or (place / token).exists() else None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / token).unlink()
    return first_of_machine(accelerator, lambda: own or new_folder(project, folder.name, resume))
