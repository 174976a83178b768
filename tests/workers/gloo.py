"""Run a script whose ranks talk by gloo, also about tensors on a GPU: gloo.py SCRIPT arguments."""

import runpy
import sys
from functools import partial

import train.processes.meeting as meeting

meeting.InitProcessGroupKwargs = partial(meeting.InitProcessGroupKwargs, backend="gloo")  # type: ignore
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
