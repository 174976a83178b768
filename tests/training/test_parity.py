"""The same training on one process and on two: images, pixels, losses, weights."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, succeed

WORKER = ROOT / "tests" / "workers" / "parity.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> dict[tuple[str, int], list[dict]]:
    """What each rank saw and ended with, by mode of the worker and number of processes; one launch for each number."""
    folder, found = tmp_path_factory.mktemp("parity"), {}
    for ranks, modes in ((1, ("global", "local")), (2, ("global", "local", "ddp"))):
        succeed(ranks, WORKER, shapes, folder / str(ranks), *modes, cwd=folder)
        for mode in modes:
            files = [folder / str(ranks) / mode / f"rank{rank}" for rank in range(ranks)]
            found[mode, ranks] = [
                {**json.loads(file.with_suffix(".json").read_text()), **torch.load(file.with_suffix(".pt"))}
                for file in files
            ]
    return found


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest of the tensors' relative distances."""
    assert a.keys() == b.keys()
    floats = [key for key, value in a.items() if value.is_floating_point()]
    return max(((a[key] - b[key]).norm() / b[key].norm().clamp(min=1e-12)).item() for key in floats)


def test_two_processes_train_what_one_trains(trained: dict[tuple[str, int], list[dict]]):
    (one,), (first, second) = trained["global", 1], trained["global", 2]
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


def test_the_local_normaliser_is_plain_ddp_over_ultralytics_loss(trained: dict[tuple[str, int], list[dict]]):
    ours, ddp, alone = trained["local", 2][0], trained["ddp", 2][0], trained["local", 1][0]
    assert furthest(ours["model"], ddp["model"]) <= 1e-6
    assert furthest(ours["model"], alone["model"]) > 1e-4


FAMILIES = ("yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n")


def test_a_rank_without_an_object_holds_up_nobody(tmp_path: Path):
    worker = ROOT / "tests" / "workers" / "background.py"
    console = succeed(2, worker, *(f"{name}.yaml" for name in FAMILIES), cwd=tmp_path)
    said = re.findall(r"(\S+)\.yaml: the same gradients, (\d+) of (\d+) parameters", console)
    assert [name for name, _, _ in said] == list(FAMILIES)
    assert all(having == wanted for _, having, wanted in said)
