"""The losses of masks and keypoints are the same function of the global batch for 1, 2 and 3 processes."""

import inspect
import re
import zlib
from typing import Any

import pytest
import torch
from ultralytics.utils.loss import PoseLoss26, RLELoss, v8SegmentationLoss

from tests.conftest import ROOT, succeed
from tests.training.test_parity import furthest

WORKER = ROOT / "tests" / "workers" / "losses.py"
CASES = re.findall(r'^    "(.*?)": \("yolo', WORKER.read_text(), re.MULTILINE)
RANKS = (1, 2, 3)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """What each rank has, by case and number of ranks."""
    folder, found = tmp_path_factory.mktemp("losses"), {}
    for ranks in RANKS:
        (folder / str(ranks)).mkdir()
        succeed(ranks, WORKER, folder / str(ranks), cwd=folder)
        for case in CASES:
            found[case, ranks] = [torch.load(folder / str(ranks) / f"{case}.{rank}.pt") for rank in range(ranks)]
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", RANKS[1:])
def test_terms_and_weights_are_those_of_one_process(learnt: dict, case: str, ranks: int):
    (one,), several = learnt[case, 1], learnt[case, ranks]
    assert furthest(several[0]["weights"], one["weights"]) <= 1e-5
    for ours, alone in zip(several[0]["steps"], one["steps"], strict=True):
        assert dict(zip(one["names"], ours.tolist(), strict=True)) == pytest.approx(
            dict(zip(one["names"], alone.tolist(), strict=True)), rel=1e-5, abs=1e-7
        )
    expected = {"seg_loss"} if case.startswith("segment") else {"pose_loss"}
    expected |= {"sem_loss"} if case.startswith("segment, end") else set()
    assert all(one["steps"][0][one["names"].index(name)] > 0 for name in expected)


def test_the_likelihood_is_clamped_by_its_sum_over_all_ranks(learnt: dict):
    for case, positive in (
        ("pose, likelihood negative on the first rank", True),
        ("pose, likelihood negative in sum", False),
    ):
        first, second = (rank["own"] for rank in learnt[case, 2])
        assert min(first) < 0 < max(second)  # clamped by itself each would be another number
        term = learnt[case, 2][0]["steps"][0][learnt[case, 2][0]["names"].index("rle_loss")].item()
        assert (term > 0) == positive


def test_a_keypoint_whose_error_overflows_is_counted_by_no_rank(learnt: dict):
    (one,), (first, second) = (learnt["pose, an error that overflows", ranks] for ranks in (1, 2))
    assert all(0 < valid < visible for visible, valid in first["keypoints"])  # Ultralytics' filter took some
    assert all(0 < valid == visible for visible, valid in second["keypoints"])
    assert [a[1] + b[1] for a, b in zip(first["keypoints"], second["keypoints"], strict=True)] == [
        valid for _, valid in one["keypoints"]
    ]
    assert all(step[first["names"].index("rle_loss")] > 0 for step in first["steps"])
    assert all(value.isfinite().all() for value in first["weights"].values())


@pytest.mark.parametrize(
    ("method", "known"),
    [
        (v8SegmentationLoss.loss, 3129747776),
        (PoseLoss26.calculate_keypoints_loss, 1039377141),
        (PoseLoss26.calculate_rle_loss, 236326540),
        (PoseLoss26.loss, 1599231353),
        (RLELoss.forward, 775822841),
    ],
)
def test_ultralytics_computes_these_as_when_they_were_read(method: Any, known: int):
    """train/model/loss.py repeats the semantic term of the first and takes apart what the others do."""
    assert zlib.crc32(inspect.getsource(method).encode()) == known
