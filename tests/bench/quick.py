"""How steady the quick recipe is: `make bench-quick`. Trains it for five seeds in bf16 and in fp32.

Prints the AP50 that each ended with and the seconds from the command to its end; installation does not count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.hashes import ROOT, quick


def main() -> None:
    """Train, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "no"])
    given = parser.parse_args()
    print("| precision | AP50 by seed | seconds |\n| --- | --- | --- |")
    for precision in given.precisions:
        found, seconds = [], []
        for seed in given.seeds:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, str(ROOT / "train" / "detect.py"), *quick().split()]
                command += ["--mixed-precision", precision, "--seed", str(seed), "--trackers", "none"]
                environment = os.environ | {"PYTHONPATH": str(ROOT)}
                started = time.perf_counter()
                done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
                seconds.append(time.perf_counter() - started)
                metrics = json.loads(Path(folder, "runs/detect/exp/metrics.json").read_text())
                found.append(metrics["AP50"])
        name = precision.replace("no", "fp32")
        values = ", ".join(f"{value:.3f}" for value in found)
        print(f"| {name} | {values} | {min(seconds):.0f} to {max(seconds):.0f} |", flush=True)


if __name__ == "__main__":
    main()
