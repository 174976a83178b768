"""Imported first of all by every script, because importing torch and Ultralytics takes seconds.

In these seconds Ctrl-C would print a traceback, or be caught by a library that does not know what it is. And what the
script leaves in the temporary folder from here on lies in one folder, which goes when the process ends.
"""

import sys
from pathlib import Path

from train.processes import scratch, signals


def _is_script() -> bool:
    """Whether this process runs one of the scripts at the door, and not a test or a notebook that imports them."""
    file = getattr(sys.modules.get("__main__"), "__file__", None) or ""
    return Path(file).resolve().parent == Path(__file__).resolve().parents[1]


if _is_script():
    signals.during_imports()
    scratch.claim()
