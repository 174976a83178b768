"""What the tests share: small data sets that they draw themselves, and real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.data.shapes import draw_shapes

ROOT = Path(__file__).resolve().parent.parent
DETECT = ROOT / "train" / "detect.py"
VALIDATE = ROOT / "train" / "validate.py"
TINY = ROOT / "tests" / "fixtures" / "tiny.yaml"  # a model of 40,000 weights


def launch(
    ranks: int, script: Path, *options: object, cwd: Path, **environment: str | None
) -> subprocess.CompletedProcess:
    """Run a script on so many CPU processes of one thread each, as the README's commands do."""
    command = [sys.executable]
    if ranks > 1:
        config = ROOT / "accelerate_configs" / "multi_cpu.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(ranks)]
    command += [str(script), *map(str, options)]
    base = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "YOLO_", "ACCELERATE_"))}
    base |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "WANDB_MODE": "offline", **environment}
    base = {key: value for key, value in base.items() if value is not None}
    return subprocess.run(command, cwd=cwd, env=base, capture_output=True, text=True, timeout=400)


def succeed(*args: object, **kwargs: object) -> str:
    """`launch`, which must end well; its standard output."""
    done = launch(*args, **kwargs)  # type: ignore[arg-type]
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data YAML of a small shapes data set: 40 images to train on, 21 to validate on."""
    return draw_shapes(tmp_path_factory.mktemp("small"), {"train": 40, "val": 21})


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose best.pt has learnt something: the built-in shapes, one process."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = "--imgsz 160 --epochs 8 --batch 16 --nbs 16 --warmup-epochs 1 --mosaic 0 --val-interval 4 --trackers none"
    succeed(1, DETECT, *recipe.split(), "--mixed-precision", "auto", cwd=folder, OMP_NUM_THREADS="2")
    return folder / "runs" / "detect" / "exp"
