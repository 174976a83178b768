"""Plain training and evaluation scripts for YOLO detectors on Hugging Face Accelerate.

Ultralytics reads the variables below while it is imported, so they stand in the one place that runs before every
module of this package. They stop it from pip-installing, from running pickled code and from writing its settings to
the user's home from several processes at once. Whoever sets a variable beforehand keeps their own value.
"""

import contextlib
import fcntl
import os
import socket
import tempfile

os.environ.setdefault("YOLO_OFFLINE", "1")  # no DNS look-up at import; official weights are still fetched when named
os.environ.setdefault("YOLO_AUTOINSTALL", "0")  # never pip-install what a checkpoint or a YAML names
os.environ.setdefault("ULTRALYTICS_SAFE_LOAD", "1")  # checkpoints load with torch's weights_only rules
os.environ.setdefault("YOLO_VERBOSE", "false")  # no banner at import; train/reporting/console.py opens its log again

SCRATCH, LONGEST = "yoloacc-", 58  # workers' sockets lie below: a path of more than 107 bytes would hang them
_short = len(os.fsencode(tempfile.gettempdir())) <= LONGEST or not os.access("/tmp", os.W_OK)
scratch = tempfile.TemporaryDirectory(prefix=SCRATCH, dir=None if _short else "/tmp")  # removed when the process ends
# Held as long as this process or a worker lives, whatever kills it: without, the next run removes the folder.
LOCK, HOST = ".yolo-accelerate.lock", socket.gethostname().encode()
_lock = os.open(os.path.join(scratch.name, LOCK), os.O_CREAT | os.O_RDWR)
with contextlib.suppress(OSError):  # a disk without locks; then nobody can tell, and it stays
    fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(_lock, HOST)
os.environ.setdefault("YOLO_CONFIG_DIR", scratch.name)
if not os.access(os.path.expanduser("~"), os.W_OK):  # a container's user without a home; matplotlib would say so
    os.environ.setdefault("MPLCONFIGDIR", scratch.name)
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # stacks of C++ on the console when a store or a peer is gone
os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")  # a broken image is one line of this project, not five of OpenCV's

if os.environ.get("MPLBACKEND", "").startswith("module://"):  # a notebook's, which scripts in their own Python lack
    os.environ["MPLBACKEND"] = "Agg"
