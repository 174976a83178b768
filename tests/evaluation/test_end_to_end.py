"""Masks and keypoints by the head of version 26 without NMS, and by the one with: the same bits on 1 and 2 ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, succeed
from tests.evaluation.test_masks_and_keypoints import KINDS, SCRIPTS, WORKER, check_same
from train.evaluation.detections import prefix

CASES: list[tuple[str, dict[str, Any]]] = [("without NMS", {"end2end": True}), ("with NMS", {"end2end": False})]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segment", "pose"])
def test_the_number_of_processes_changes_no_bit(task: str, drawn: dict[str, Path], tmp_path: Path):
    model = ROOT / "tests" / "fixtures" / {"segment": "tiny26-seg.yaml", "pose": "tiny26-pose.yaml"}[task]
    options = "--imgsz 160 --epochs 20 --val-interval 20 --batch 4 --nbs 4 --optimizer AdamW --lr0 0.01 --mosaic 0"
    options += " --warmup-epochs 1 --workers 0 --trackers none --no-plots --hsv-h 0 --hsv-s 0 --hsv-v 0"
    succeed(1, SCRIPTS[task], "--data", drawn[task], "--model", model, *options.split(), cwd=tmp_path)
    cases = [[name, {"data": str(drawn[task]), "max_det": 60, "val_batch": 2} | more] for name, more in CASES]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    one, two = (tmp_path / str(ranks) for ranks in (1, 2))
    best = tmp_path / "runs" / task / "exp" / "weights" / "best.pt"
    for ranks, folder in ((1, one), (2, two)):
        folder.mkdir()
        succeed(ranks, WORKER, best, tmp_path / "cases.json", folder, cwd=tmp_path)
    heads = []
    for name, _ in CASES:
        check_same(task, one, two, name)
        said = json.loads((one / f"{name}.json").read_text())["metrics"]
        assert said["AP50"] > 0.01, "what is compared should have found something"
        assert said[f"{prefix(KINDS[task])}AP50"] > 0
        heads.append(np.load(one / f"{name}.npz")["detections"])
    assert not np.array_equal(*heads)
