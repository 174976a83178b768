"""The same training on one process and on two: images, pixels, losses, weights."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, succeed

WORKER = ROOT / "tests" / "workers" / "parity.py"


def trained(folder: Path, ranks: int, shapes: Path, *mode: str) -> list[dict]:
    out = folder / f"{ranks}{''.join(mode)}"
    succeed(ranks, WORKER, shapes, out, *mode, cwd=folder)
    return [
        {**json.loads((out / f"rank{rank}.json").read_text()), **torch.load(out / f"rank{rank}.pt")}
        for rank in range(ranks)
    ]


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest of the tensors' relative distances."""
    assert a.keys() == b.keys()
    floats = [key for key, value in a.items() if value.is_floating_point()]
    return max(((a[key] - b[key]).norm() / b[key].norm().clamp(min=1e-12)).item() for key in floats)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> dict:
    return trained(tmp_path_factory.mktemp("one"), 1, shapes)[0]


def test_two_processes_train_what_one_trains(one: dict, shapes: Path, tmp_path: Path):
    first, second = trained(tmp_path, 2, shapes)
    # ten batches; each rank saw its half of each, and together they are the batch of one process, pixel by pixel
    assert len(one["seen"]) == 10
    assert one["seen"][:5] != one["seen"][5:]  # another epoch, another order
    assert [a + b for a, b in zip(first["seen"], second["seen"], strict=True)] == one["seen"]
    assert one["updates"] == first["updates"] == 6
    assert furthest(first["model"], second["model"]) == 0
    assert furthest(first["model"], one["model"]) <= 1e-5
    assert furthest(first["ema"], one["ema"]) <= 1e-5
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-5)
    # and so far as the weights moved at all, they moved alike
    moved = [{key: run["model"][key] - run["start"][key] for key in one["start"]} for run in (first, one)]
    assert moved[1]["model.0.conv.weight"].norm() > 1e-4
    assert furthest(*moved) <= 1e-3


def test_the_local_normaliser_is_plain_ddp_over_ultralytics_loss(shapes: Path, tmp_path: Path):
    ours = trained(tmp_path, 2, shapes, "--local")[0]
    ddp = trained(tmp_path, 2, shapes, "--ddp")[0]
    alone = trained(tmp_path, 1, shapes, "--local")[0]
    assert furthest(ours["model"], ddp["model"]) <= 1e-6
    assert furthest(ours["model"], alone["model"]) > 1e-4
