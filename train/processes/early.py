"""Imported first of all by every script and by the launcher, because importing torch and Ultralytics takes seconds.

In these seconds Ctrl-C would print a traceback, or be caught by a library that does not know what it is. And what the
script leaves in the temporary folder from here on lies in one folder, which goes when the process ends.
"""

import sys
from pathlib import Path

from train.processes import parent, scratch, signals


def _is_script() -> bool:
    """Whether this process runs a script at the door or the launcher, and not a test or a notebook with them."""
    here, file = Path(__file__).resolve(), Path(getattr(sys.modules.get("__main__"), "__file__", None) or "").resolve()
    return file.parent == here.parents[1] or file == here.with_name("launcher.py")


if _is_script():
    signals.during_imports()
    scratch.claim()
    parent.end_with_launcher()
