"""What the tests of the data share."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator

from tests.labels import to_validate_on
from train.config.objects import Carries
from train.config.options import TrainConfig
from train.data.files import find_data
from train.data.labels import Labels
from train.data.listing import DataFiles


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def load(yaml: Path, split: str, accelerator: Accelerator) -> tuple[Labels, dict[int, str]]:
    labels, data = load_of("boxes", yaml, split, accelerator)
    return labels, data.names


def load_of(carries: Carries, yaml: Path, split: str, accelerator: Accelerator) -> tuple[Labels, DataFiles]:
    data = find_data(str(yaml), carries=carries)
    labels = to_validate_on(data, TrainConfig(split=split), accelerator, carries)
    assert not labels.faults
    return labels, data


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    (tmp_path / "small").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path / "small")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root mounts a disk")
    yield tmp_path / "small"
    subprocess.run(["umount", "-l", str(tmp_path / "small")], check=True)
