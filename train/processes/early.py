"""Imported first of all by every script and by the launcher, because importing torch and Ultralytics takes seconds.

In these seconds Ctrl-C would print a traceback, or be caught by a library that does not know what it is. And what the
script leaves in the temporary folder from here on lies in one folder, which goes when the process ends. Until all is
imported (`start_group` in meeting.py) nothing is collected: Python would search the modules again and again, for 0.5 s
of 3.
"""

import gc
import os
import sys
from pathlib import Path

from train.processes import parent, scratch, signals


def _is_script() -> bool:
    """Whether this process runs a script at the door or the launcher, and not a test or a notebook with them."""
    here, file = Path(__file__).resolve(), Path(getattr(sys.modules.get("__main__"), "__file__", None) or "").resolve()
    return file.parent == here.parents[1] or file == here.with_name("launcher.py")


def _check_numbers() -> None:
    """End where a launcher's variable is no number; Ultralytics would fail over it while it is imported."""
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        if not (value := os.environ.get(variable, "0")).isdecimal():
            print(f"error: {variable} is {value!r}; a launcher sets it to a whole number. Unset it.", file=sys.stderr)
            sys.exit(2)


if _is_script():
    gc.disable()
    _check_numbers()
    signals.during_imports()
    scratch.claim()
    parent.end_with_launcher()
