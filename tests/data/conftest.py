"""What the tests of the data share."""

from pathlib import Path

import pytest
from accelerate import Accelerator

from train.config.options import TrainConfig
from train.data.files import find_data
from train.data.formats import Labels
from train.data.scan import scan


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def load(yaml: Path, split: str, accelerator: Accelerator) -> tuple[list[Labels], dict[int, str]]:
    data = find_data(str(yaml))
    labels, faults = scan(data.images(split), data.names, TrainConfig(), accelerator)
    assert not faults
    return labels, data.names
