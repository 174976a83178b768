"""The same training on one process and on two: images, pixels, losses, weights."""

import itertools
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.conftest import ROOT, succeed

WORKER = ROOT / "tests" / "workers" / "parity.py"


def ended(folder: Path, yaml: Path, ranks: int, *modes: str) -> dict[str, list[dict]]:
    """What each of so many ranks saw and ended with, by mode of the worker."""
    folder.mkdir(parents=True, exist_ok=True)
    succeed(ranks, WORKER, yaml, folder, *modes, cwd=folder)
    found = {}
    for mode in (mode.partition("=")[0] for mode in modes):
        files = [folder / mode / f"rank{rank}" for rank in range(ranks)]
        found[mode] = [
            {
                "folder": str(file.parent),
                **json.loads(file.with_suffix(".json").read_text()),
                **torch.load(file.with_suffix(".pt")),
            }
            for file in files
        ]
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> dict[tuple[str, int], list[dict]]:
    """What each rank saw and ended with, by mode of the worker and number of processes; one launch for each number."""
    folder, found = tmp_path_factory.mktemp("parity"), {}
    left = folder / "1" / "leave"
    for ranks, modes in ((1, ("global", "local", "leave")), (2, ("global", "local", "ddp", "leave", f"enter={left}"))):
        for mode, of_ranks in ended(folder / str(ranks), shapes, ranks, *modes).items():
            found[mode, ranks] = of_ranks
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


# Masks and keypoints --------------------------------------------------------------------------------------------------
OF_TASKS = {
    "segment": ("global@yolo26n-seg.yaml", "apart@yolo26n-seg.yaml", "global@yolov8n-seg.yaml"),
    "pose": (
        "global@yolo26n-pose.yaml", "flat@yolo26n-pose.yaml", "sure@yolo26n-pose.yaml", "global@yolov8n-pose.yaml",
    ),
}  # fmt: skip
IMAGES, BATCHES = 30, 5  # of an epoch
# Positions in the second epoch, which is without mosaic. Of the batches that a step ends with, where DDP wants every
# parameter from every rank, the second is background on its first rank, the fifth has no visible keypoint on its last.
# Of the two between, one has a dark image on its first rank, the other nothing but dark ones on its last.
BACKGROUND, INVISIBLE, DARK = (6, 7, 8, 13, 14, 19, 20), (27, 28, 29), (12, 21, 22, 23)


def with_special_cases(drawn: Path, home: Path) -> Path:
    """A copy of a data set in which images are such, and, where it has keypoints, flat.yaml of the same with two
    dimensions each; the data YAML.
    """
    shutil.copytree(drawn.parent, home)
    order = np.random.default_rng([0, 1]).permutation(IMAGES)  # see TrainSet.order
    background, invisible, dark = ({f"{order[p]:06d}" for p in at} for at in (BACKGROUND, INVISIBLE, DARK))
    for name in dark:
        file = str(home / "images" / "train" / f"{name}.jpg")
        cv2.imwrite(file, (cv2.imread(file) * 0.05).astype(np.uint8))
    shutil.copytree(home / "images", home / "flat" / "images")
    shutil.copytree(home / "labels", home / "flat" / "labels")
    yaml, classes = drawn.read_text(), set()
    for file in sorted((home / "labels" / "train").iterdir())[:IMAGES]:
        rows = [] if file.stem in background else [row.split() for row in file.read_text().splitlines()]
        classes |= {row[0] for row in rows}
        if "kpt_shape" in yaml:
            unseen = file.stem in invisible
            flat = [[*row[:5], *("-1" if unseen else v for i, v in enumerate(row[5:]) if i % 3 < 2)] for row in rows]
            write_rows(home / "flat" / "labels" / "train" / file.name, flat)
            rows = [[*row[:5], *("0" if unseen and i % 3 == 2 else v for i, v in enumerate(row[5:]))] for row in rows]
        write_rows(file, rows)
    assert classes == {"0", "1", "2"}
    (home / "flat.yaml").write_text(yaml.replace("[4, 3]", "[4, 2]").replace("images/", "flat/images/"))
    return home / drawn.name


def write_rows(file: Path, rows: list[list[str]]) -> None:
    """Write a label file."""
    file.write_text("".join(f"{' '.join(row)}\n" for row in rows))


@pytest.fixture(scope="module", params=OF_TASKS)
def of_task(request, drawn: dict[str, Path], tmp_path_factory) -> tuple[tuple[str, ...], dict]:
    """The modes in which a task was trained, and what each rank ended with, by mode and number of processes."""
    modes, folder = OF_TASKS[request.param], tmp_path_factory.mktemp(f"parity-{request.param}")
    yaml, found = with_special_cases(drawn[request.param], folder / "data"), {}
    local = [modes[0].replace("global", kind) for kind in ("local", "ddp")]
    for ranks, these in ((1, modes), (2, (*modes, *local)), (3, modes)):
        for mode, of_ranks in ended(folder / str(ranks), yaml, ranks, *these).items():
            found[mode, ranks] = of_ranks
    return modes, found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_masks_and_keypoints_are_trained_as_by_one_process(of_task: tuple[tuple[str, ...], dict], ranks: int):
    modes, found = of_task
    for mode in modes:
        (one,), several = found[mode, 1], found[mode, ranks]
        assert one["updates"] == several[0]["updates"] == len(one["steps"]) == 6
        for ours, alone in zip(several[0]["steps"], one["steps"], strict=True):  # each term of the loss
            assert ours == pytest.approx(alone, rel=1e-5, abs=1e-7)
        assert furthest(several[0]["model"], one["model"]) <= 1e-5
        assert furthest(several[0]["ema"], one["ema"]) <= 1e-5
        assert furthest(one["model"], one["start"]) > 1e-3


def sums_of(ranks: list[dict]) -> np.ndarray:
    """What ranks have summed up for the loss, each of its own images: (ranks, batches, criteria, sums)."""
    sums = np.array([rank["sums"] for rank in ranks])
    return sums.reshape(len(ranks), 2 * BATCHES, -1, sums.shape[-1])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_among_them_are_the_cases_in_which_ranks_differ(of_task: tuple[tuple[str, ...], dict], ranks: int):
    modes, found = of_task
    for mode in modes:
        sums, (alone,) = sums_of(found[mode, ranks]), sums_of(found[mode, 1])
        foreground = sums[..., 1]
        assert (foreground.sum(0) == alone[..., 1]).all()
        assert (foreground[0, BATCHES + 1] == 0).all()  # all background
        assert (foreground[-1, BATCHES + 1] > 0).all()
        if "26n-pose" in mode:
            keypoints, likelihood = sums[..., 2], sums[..., 3]
            assert (foreground[-1, BATCHES + 4] > 0).all()
            assert (keypoints[-1, BATCHES + 4] == 0).all()  # all invisible
            assert (keypoints[0, BATCHES + 4] > 0).all()
        if "sure" in mode:
            assert (likelihood[0, BATCHES + 2] < 0).all()
            assert (likelihood[:, BATCHES + 2].sum(0) > 0).all()
            assert (likelihood[0, BATCHES + 3] > 0).all()
            assert (likelihood[:, BATCHES + 3].sum(0) < 0).all()
        if "apart" in mode:
            overlapping = found[mode.replace("apart", "global"), ranks]
            assert furthest(found[mode, ranks][0]["model"], overlapping[0]["model"]) > 1e-4


@pytest.mark.slow
def test_locally_normalised_they_are_trained_as_by_plain_ddp(of_task: tuple[tuple[str, ...], dict]):
    modes, found = of_task
    local, ddp = (found[modes[0].replace("global", kind), 2][0]["model"] for kind in ("local", "ddp"))
    assert furthest(local, ddp) <= 1e-6
    assert furthest(local, found[modes[0], 2][0]["model"]) > 1e-4


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
    check_elastic(trained["leave", 2], ended(tmp_path, shapes, ranks, f"enter={left}")["enter"])


FAMILIES = ("yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n")
SMALL = tuple(str(ROOT / "tests" / "fixtures" / f"tiny26-{kind}") for kind in ("seg", "pose"))
OTHERS = tuple(f"{family}-{kind}" for family in ("yolov8n", "yolo11n", "yolo26n") for kind in ("seg", "pose"))


@pytest.mark.parametrize(
    "names",
    [pytest.param((*FAMILIES, *SMALL), id="boxes"), pytest.param(OTHERS, marks=pytest.mark.slow, id="others")],
)
def test_a_rank_without_an_object_holds_up_nobody(names: tuple[str, ...], tmp_path: Path):
    worker = ROOT / "tests" / "workers" / "background.py"
    console = succeed(2, worker, *(f"{name}.yaml" for name in names), cwd=tmp_path)
    said = re.findall(r"(\S+)\.yaml: the same gradients, (\d+) of (\d+) parameters", console)
    assert [name for name, _, _ in said] == list(names)
    assert all(having == wanted for _, having, wanted in said)
