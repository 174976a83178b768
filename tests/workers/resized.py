"""A training bar on a terminal whose width changes under it."""

import fcntl
import struct
import sys
import termios
import time

from accelerate import Accelerator

from train.config.options import TrainConfig
from train.reporting.report import Report

WORDS = "box 1.234 cls 5.012 dfl 1.234 lr 0.00143 26 images/s"
console = Report(Accelerator(cpu=True), TrainConfig(hang_timeout=0)).console
for i, columns in enumerate((120, 60, 45)):
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    sys.stdout.write(f"<{columns}>")  # for the test, which has the bytes alone
    if not i:
        console.open_bar(100, "epoch 1/300", "step")
    for _ in range(2):
        time.sleep(0.11)  # the bar moves every tenth of a second
        console.advance()
        console.annotate(WORDS)
console.close_bar()
sys.stdout.write("<end>")
