"""Going on with a run: each case does the right thing or says what to type; nothing is done or written for nothing."""

import copy
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import DETECT, ROOT, succeed
from train.config.errors import InputError
from train.config.options import TrainConfig
from train.training.state import TrainState, read_state


def hashes(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*")) if file.is_file()}  # fmt: skip


def test_each_way_to_go_on(runs, shapes: Path, tmp_path: Path):
    finished = tmp_path / "finished"
    shutil.copytree(runs[1][0], finished)
    names = {"damaged": None, "stateless": None, "broken": None, "moved": None, "headless": None, "busy": None}
    for name in names:
        shutil.copytree(finished, tmp_path / name)
    state = finished / "weights" / "state.pt"
    (tmp_path / "damaged" / "weights" / "state.pt").write_bytes(state.read_bytes()[:1000])
    (tmp_path / "stateless" / "weights" / "state.pt").unlink()
    busy = {"state": "running", "host": platform.node(), "pid": os.getpid(), "started": time.time()}
    (tmp_path / "busy" / "status.json").write_text(json.dumps(busy | {"updated": time.time()}))
    (tmp_path / "broken" / "config.json").write_text('{"epochs": 3')
    (tmp_path / "headless" / "weights" / "last.pt").write_bytes(b"noise")
    root = f"path: {shapes.parent}\ntrain: images/train\nval: images/val\n"
    (tmp_path / "there.yaml").write_text(root + "names: [circle, square, triangle]\n")
    (tmp_path / "renamed.yaml").write_text(root + "names: [circle, cube, triangle]\n")
    (tmp_path / "more.yaml").write_text(root + "names: [circle, square, triangle, hexagon]\n")
    cases = [
        (["--resume", "finished"], 0, "nothing is left to train: finished has its 2 epochs; more with --epochs"),
        (["--resume", "finished/weights/last.pt"], 0, "nothing is left to train"),
        (["--resume", "finished", "--epochs", "1"], 2, "--epochs is 1, but 2 epochs of finished are done"),
        (["--resume", "damaged"], 2, "damaged/weights/state.pt is damaged (RuntimeError). Start a new run from the "
         "weights: --model damaged/weights/last.pt"),
        (["--resume", "stateless"], 2, "there is no stateless/weights/state.pt; no epoch was finished there"),
        (["--resume", "broken"], 2, "--resume broken/config.json is not JSON"),
        (["--resume", "headless", "--epochs", "3"], 2, "headless/weights/last.pt is not a checkpoint"),
        (["--resume", "moved", "--epochs", "3", "--data", "renamed.yaml"], 2,
         "knows class 1 as 'square', renamed.yaml names it 'cube'. Start a new run from its weights: --model "),
        (["--resume", "moved", "--epochs", "3", "--data", "more.yaml"], 2,
         "was trained on 3 classes, more.yaml names 4"),
        (["--resume", "busy", "--epochs", "3"], 2, f"the run is still running, as process {os.getpid()}. Let it end"),
        (["--resume", "gone"], 2, "--resume gone/config.json cannot be read: No such file or directory"),
    ]  # fmt: skip
    before = hashes(tmp_path)
    cases.append((["--resume", "moved", "--epochs", "3", "--data", "there.yaml"], 0, "epoch 3/3  val"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "workers" / "mistakes.py")],
        input="".join(json.dumps([str(DETECT), *arguments]) + "\n" for arguments, _, _ in cases),
        capture_output=True, text=True, cwd=tmp_path, timeout=200,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(cases), done.stderr[-2000:]
    for (arguments, code, message), result in zip(cases, results, strict=True):
        said = " ".join((result["out"] + result["err"]).split())
        assert (result["code"], message in said) == (code, message in said), (arguments, said[-600:])
        assert " ".join(message.split()) in said, (arguments, said[-600:])
        if code == 2 or "nothing" in message:
            assert "reading the labels" not in said, arguments  # which take minutes where there are many
    after = hashes(tmp_path)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed
    assert all(name.startswith("moved/") for name in changed), changed
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    assert (config["data"], config["epochs"]) == ("there.yaml", 3)


def test_a_run_in_a_read_only_folder_says_how_to_copy_it(runs, monkeypatch):
    run = runs[1][0]
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(run) not in str(path) and allowed(path, mode))
    with pytest.raises(InputError, match=r"cannot be written to. Copy it and go on in the copy: mkdir -p .*cp -r "):
        read_state(TrainConfig(resume=str(run), epochs=3))


@pytest.mark.parametrize("saved_in", [torch.contiguous_format, torch.channels_last])
def test_moments_follow_the_memory_order_and_the_device_of_the_weights(saved_in: torch.memory_format):
    """A fused step pairs moments and weights by their place in memory, and `fused` belongs to the device."""
    torch.manual_seed(0)
    weight, gradients = torch.randn(8, 4, 3, 3), torch.randn(2, 8, 4, 3, 3)

    def start(order: torch.memory_format, fused: bool) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(weight.clone(memory_format=order))
        return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=fused)

    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, i: int) -> None:
        parameter.grad = torch.empty_like(parameter).copy_(gradients[i])
        optimizer.step()

    whole, optimizer = start(torch.channels_last, True)
    for i in range(2):
        step(whole, optimizer, i)
    first, optimizer = start(saved_in, False)
    step(first, optimizer, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed, optimizer = start(torch.channels_last, True)
    resumed.data.copy_(first.data)
    model = torch.nn.Module()
    TrainState(model, model, model, optimizer, None)._load_optimizer(saved)  # type: ignore[arg-type]
    assert optimizer.param_groups[0]["fused"] is True
    assert optimizer.state[resumed]["exp_avg"].stride() == resumed.stride()
    step(resumed, optimizer, 1)
    assert (resumed - whole).abs().max() < 1e-6


def test_a_run_with_the_local_loss_norm_goes_on(shapes: Path, tmp_path: Path):
    """Finding 5 of a review: the criterion had been made with the first loss, which a resumed run has not seen yet."""
    run = ["--data", shapes, "--model", "yolov10n.yaml", "--imgsz", 32, "--batch", 20, "--nbs", 20, "--workers", 0]
    run += ["--trackers", "none", "--no-plots", "--local-loss-norm", "--val-limit", 2]
    succeed(1, DETECT, *run, "--epochs", 1, cwd=tmp_path)
    console = succeed(1, DETECT, "--resume", "runs/detect/exp", "--epochs", 2, cwd=tmp_path)
    assert "epoch 2/2  train" in console
