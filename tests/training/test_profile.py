"""--profile: parts that add up to the time that passed, and a trace for each rank."""

import gzip
import json
import re
from pathlib import Path

import pytest
from accelerate import Accelerator
from torch import nn

from tests.conftest import DETECT, TINY, launch
from train.reporting.lines import profile_lines
from train.training.profile import PARTS, Profile

OPTIONS = "--imgsz 64 --batch 8 --nbs 16 --warmup-epochs 0 --workers 1 --trackers none --no-plots"
OF_A_STEP = ("data wait", "copy", "forward", "loss", "backward", "all-reduce", "optimizer", "EMA", "measuring")


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_parts_of_steps_and_ends_add_up(tmp_path: Path, shapes: Path, ranks: int):
    """An epoch has 3 steps: the first 3 are passed over, the fourth is the last that is looked at, in the third."""
    options = ["--data", shapes, "--model", TINY, *OPTIONS.split(), "--epochs", 4, "--profile", 4]
    done = launch(ranks, DETECT, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "profiler" not in done.stderr  # the profiler's own words
    console = done.stdout
    words = r"profile    (step|end of an epoch), mean of (\d): ([\d.]+) ms"
    assert [found[:2] for found in re.findall(words, console)] == [("step", "4"), ("end of an epoch", "2")]
    assert console.index("profile    step") < console.index("epoch 4/4")  # as soon as all is known
    row = r"profile      (\D+?) +([\d.]+) ms +([\d.]+)%"
    steps, ends = (
        {name: (float(ms), float(share)) for name, ms, share in re.findall(row, part)}
        for part in console.split("end of an epoch, mean")
    )
    assert all(steps[part][0] > 0 for part in OF_A_STEP if ranks > 1 or part != "all-reduce")
    stages = ("data", "inference", "postprocess", "gather", "metric", "other")
    assert all(ends[name][0] > 0 for name in ("checkpoint", "report", *(f"validation: {stage}" for stage in stages)))
    for parts in (steps, ends):
        assert parts["all parts"][1] == pytest.approx(100, abs=5)
        assert sum(ms for ms, _ in parts.values()) == pytest.approx(2 * parts["all parts"][0], abs=1)
    traces = sorted((tmp_path / "runs" / "detect" / "exp" / "profile").iterdir())
    assert [trace.name for trace in traces] == [f"rank{rank}.json.gz" for rank in range(ranks)]
    found: dict[str, float] = {}  # ms by part, by the profiler's own clock, of all ranks
    for trace in traces:
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        names = [event.get("name") for event in events]
        assert names.count("EMA") == 4
        assert names.count("forward") >= 7  # micro-batches
        assert any(name.startswith("aten::") for name in names)
        parts = [event for event in events if event.get("cat") == "user_annotation" and event["name"] in PARTS]
        for event in parts:
            found[event["name"]] = found.get(event["name"], 0) + event["dur"] / 1000
        # From the first step to the last, with the end of the epoch that lies between, there is nothing but parts.
        span = max(event["ts"] + event["dur"] for event in parts) - min(event["ts"] for event in parts)
        assert sum(event["dur"] for event in parts) == pytest.approx(span, rel=0.1)
    for part in ("forward", "loss", "optimizer", "EMA"):  # of steps alone
        assert 4 * steps[part][0] == pytest.approx(found[part] / ranks, rel=0.2, abs=20)  # a busy machine


def test_a_run_that_is_too_short_says_so():
    profile = Profile(Accelerator(cpu=True), nn.Linear(1, 1), 2)
    for _ in range(3):
        profile.stepped()
    profile.epoch_ends()
    assert profile.result({}, ends=False) is None
    found = profile.result({}, ends=True)
    assert found is not None
    assert profile_lines(*found) == ["profile    nothing to tell: the run ended within its first 4 steps"]
