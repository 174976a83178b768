"""The same training on one process and on two: images, pixels, losses, weights."""

import itertools
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
    left = folder / "1" / "leave"
    for ranks, modes in ((1, ("global", "local", "leave")), (2, ("global", "local", "ddp", "leave", f"enter={left}"))):
        succeed(ranks, WORKER, shapes, folder / str(ranks), *modes, cwd=folder)
        for mode in (mode.partition("=")[0] for mode in modes):
            files = [folder / str(ranks) / mode / f"rank{rank}" for rank in range(ranks)]
            found[mode, ranks] = [
                {
                    "folder": str(file.parent),
                    **json.loads(file.with_suffix(".json").read_text()),
                    **torch.load(file.with_suffix(".pt")),
                }
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


OF_TASKS = {"segment": ("yolo26n-seg.yaml", "yolov8n-seg.yaml"), "pose": ("yolo26n-pose.yaml", "yolov8n-pose.yaml")}


def ended(folder: Path, yaml: Path, ranks: int, *modes: str) -> dict[str, dict]:
    """What the first of so many ranks ended with, by mode."""
    succeed(ranks, WORKER, yaml, folder, *modes, cwd=folder)
    files = {mode: folder / mode / "rank0" for mode in modes}
    return {
        mode: torch.load(file.with_suffix(".pt")) | json.loads(file.with_suffix(".json").read_text())
        for mode, file in files.items()
    }


def check_same(several: dict, one: dict) -> None:
    """Two epochs with mosaic and accumulation ended with the same weights, and every term of the loss was the same."""
    assert one["updates"] == several["updates"] == 6
    assert furthest(several["model"], one["model"]) <= 1e-5
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert furthest(one["model"], one["start"]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("task", OF_TASKS)
def test_masks_and_keypoints_are_trained_as_by_one_process(task: str, drawn: dict[str, Path], tmp_path: Path):
    mode = f"global@{OF_TASKS[task][0]}"
    one, two = (ended(tmp_path, drawn[task], ranks, mode)[mode] for ranks in (1, 2))
    check_same(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("task", OF_TASKS)
def test_and_so_by_three_and_locally_normalised_as_by_plain_ddp(task: str, drawn: dict[str, Path], tmp_path: Path):
    modes = [f"global@{model}" for model in OF_TASKS[task]]
    local, ddp = (f"{mode}@{OF_TASKS[task][0]}" for mode in ("local", "ddp"))
    one = ended(tmp_path, drawn[task], 1, *modes)
    two = ended(tmp_path, drawn[task], 2, *modes, local, ddp)
    three = ended(tmp_path, drawn[task], 3, *modes)
    for mode in modes:
        check_same(two[mode], one[mode])
        check_same(three[mode], one[mode])
    assert furthest(two[local]["model"], two[ddp]["model"]) <= 1e-6
    assert furthest(two[local]["model"], one[modes[0]]["model"]) > 1e-4


def check_elastic(stayed: list[dict], went: list[dict]) -> None:
    """What a run trained after a state that it saved within an epoch, and what another number of ranks made of that."""
    whole, rest = (
        [[*itertools.chain(*shares)] for shares in zip(*(rank["seen"] for rank in ranks), strict=True)]  # by batch
        for ranks in (stayed, went)
    )
    assert rest == whole[4:]  # the fifth batch of the first epoch, then all: none twice, none left out, pixel by pixel
    assert len(rest) == 1 + 5 + 2  # batches in one, three and one steps
    assert went[0]["updates"] == stayed[0]["updates"] == 2 + 5
    assert furthest(went[0]["model"], stayed[0]["model"]) <= 1e-5
    assert furthest(went[0]["ema"], stayed[0]["ema"]) <= 1e-5
    assert went[0]["losses"] == pytest.approx(stayed[0]["losses"], rel=1e-5)


def test_a_state_within_an_epoch_goes_on_on_another_number_of_processes(trained: dict[tuple[str, int], list[dict]]):
    check_elastic(trained["leave", 1], trained["enter", 2])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_state_of_two_processes_goes_on_on_one_and_on_four(trained, tmp_path: Path, shapes: Path, ranks: int):
    left = Path(trained["leave", 2][0]["folder"])
    succeed(ranks, WORKER, shapes, tmp_path, f"enter={left}", cwd=tmp_path)
    files = [tmp_path / "enter" / f"rank{rank}" for rank in range(ranks)]
    went = [json.loads(f.with_suffix(".json").read_text()) | torch.load(f.with_suffix(".pt")) for f in files]
    check_elastic(trained["leave", 2], went)


FAMILIES = ("yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n")


def test_a_rank_without_an_object_holds_up_nobody(tmp_path: Path):
    worker = ROOT / "tests" / "workers" / "background.py"
    console = succeed(2, worker, *(f"{name}.yaml" for name in FAMILIES), cwd=tmp_path)
    said = re.findall(r"(\S+)\.yaml: the same gradients, (\d+) of (\d+) parameters", console)
    assert [name for name, _, _ in said] == list(FAMILIES)
    assert all(having == wanted for _, having, wanted in said)
