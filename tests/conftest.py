"""What the tests share: small data sets that they draw themselves, and real processes."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from filelock import FileLock

from tests.hashes import quick
from train.data.shapes import draw_shapes
from train.model.tasks import TASKS
from train.training.saves import states

ROOT = Path(__file__).resolve().parent.parent
DETECT, SEGMENT, POSE = (ROOT / "train" / f"{task}.py" for task in ("detect", "segment", "pose"))
VALIDATE = ROOT / "train" / "validate.py"
CACHE = pytest.StashKey[tempfile.TemporaryDirectory]()
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


def state_of(run: Path) -> dict[str, Any]:
    """The newest saved state of a run."""
    return torch.load(states(run / "weights")[0], weights_only=True)


def pytest_configure(config: pytest.Config) -> None:
    """Indexes of the tests' data go into a folder of this run, that pytest-xdist's workers share."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ.setdefault("MPLCONFIGDIR", matplotlib.get_cachedir())  # it takes seconds to make
        config.stash[CACHE] = tempfile.TemporaryDirectory(prefix="index-")
        os.environ["XDG_CACHE_HOME"] = config.stash[CACHE].name


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data YAML of a small shapes data set: 40 images to train on, 21 to validate on."""
    return draw_shapes(tmp_path_factory.mktemp("small"), {"train": 40, "val": 21})


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> dict[str, Path]:
    """The data YAMLs of the same images by task."""
    folder, splits = tmp_path_factory.mktemp("tasks"), {"train": 40, "val": 21}
    others = {task: draw_shapes(folder, splits, carries=TASKS[task].carries) for task in ("segment", "pose")}
    return {"detect": shapes} | others


def once(name: str, factory: pytest.TempPathFactory, make: Callable[[Path], None]) -> Path:
    """A folder that one of pytest-xdist's workers fills and all use."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            try:
                make(folder)
            except BaseException:
                shutil.rmtree(folder)  # else the other workers would take it for whole
                raise
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose best.pt has learnt something: the built-in shapes, one process."""

    def train(folder: Path) -> None:
        options = f"{quick()} --epochs 5 --val-interval 5 --trackers none --mixed-precision auto --no-plots"
        succeed(1, DETECT, *options.split(), cwd=folder)

    return once("trained", tmp_path_factory, train) / "runs" / "detect" / "exp"


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> dict[int, tuple[Path, str]]:
    """The same short training on 1, 2 and 4 processes: (run folder, console)."""

    def train(folder: Path) -> None:
        options = "--imgsz 64 --epochs 2 --batch 8 --nbs 8 --warmup-epochs 0 --workers 1 --trackers none"
        for ranks in (1, 2, 4):
            home = folder / str(ranks)
            home.mkdir()
            log = ["--log-interval", 2, "--log-file", home / "here" / "log.txt", "--index-dir", home / "index"]
            console = succeed(ranks, DETECT, "--data", shapes, "--model", TINY, *options.split(), *log, cwd=home)
            (home / "console.txt").write_text(console)

    folder = once("runs", tmp_path_factory, train)
    return {n: (folder / f"{n}/runs/detect/exp", (folder / f"{n}/console.txt").read_text()) for n in (1, 2, 4)}


# Files in the order in which they start, the long ones first, so that pytest-xdist's workers end together.
LONG = (
    "test_evaluate",
    "test_logs",
    "test_cuda",
    "test_detect",
    "test_exits",
    "test_machines",
    "test_wandb",
    "test_validate",
    "test_mistakes",
    "test_parity",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first."""
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))
