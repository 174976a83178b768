"""Going on with a run: each case does the right thing or says what to type; nothing is done or written for nothing."""

import copy
import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import DETECT, ROOT, TINY, succeed
from train.config.errors import InputError
from train.config.options import TrainConfig
from train.training.resume import read_run
from train.training.saves import states
from train.training.state import TrainState


def hashes(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*")) if file.is_file()}  # fmt: skip


def test_each_way_to_go_on(runs, shapes: Path, tmp_path: Path):
    finished = tmp_path / "finished"
    shutil.copytree(runs[1][0], finished)
    names = ("half", "damaged", "stateless", "broken", "moved", "headless", "busy", "swapped", "later", "bestless")
    for name in names:
        shutil.copytree(finished, tmp_path / name)
        for file in ("status.json", ".lock"):
            (tmp_path / name / file).unlink()
    newest, older = states(finished / "weights")
    for name in ("half", "damaged"):
        (tmp_path / name / "weights" / newest.name).write_bytes(newest.read_bytes()[:1000])
    flipped = bytearray(older.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (tmp_path / "damaged" / "weights" / older.name).write_bytes(flipped)
    for state in states(tmp_path / "stateless" / "weights"):
        state.unlink()
    content = torch.load(newest, weights_only=True)
    torch.save(content | {"format": 99}, tmp_path / "later" / "weights" / newest.name)
    (tmp_path / "bestless" / "weights" / "best.pt").write_bytes(b"another")
    (tmp_path / "bestless" / "weights" / "best_before.pt").unlink(missing_ok=True)
    (tmp_path / "bestless" / "weights" / "last.pt").unlink()
    busy = {"state": "running", "host": platform.node(), "pid": os.getpid(), "started": time.time()}
    (tmp_path / "busy" / "status.json").write_text(json.dumps(busy | {"updated": time.time()}))
    (tmp_path / "broken" / "config.json").write_text('{"epochs": 3')
    config = json.loads((finished / "config.json").read_text())
    (tmp_path / "swapped" / "config.json").write_text(json.dumps(config | {"lr0": 0.5}))
    (tmp_path / "headless" / "weights" / "last.pt").write_bytes(b"noise")  # it is not needed
    root = f"path: {shapes.parent}\ntrain: images/train\nval: images/val\n"
    (tmp_path / "there.yaml").write_text(root + "names: [circle, square, triangle]\n")
    (tmp_path / "renamed.yaml").write_text(root + "names: [circle, cube, triangle]\n")
    (tmp_path / "more.yaml").write_text(root + "names: [circle, square, triangle, hexagon]\n")
    changed = shutil.copytree(shapes.parent, tmp_path / "changed")
    label = sorted((changed / "labels" / "train").iterdir())[3]
    label.write_text("0 0.5 0.5 0.25 0.25\n")
    fewer = shutil.copytree(shapes.parent, tmp_path / "fewer")
    sorted((fewer / "images" / "val").iterdir())[5].unlink()
    cases = [
        (["--resume", "finished"], 0, "nothing is left to train: finished has its 2 epochs; more with --epochs"),
        (["--resume", "finished/weights/last.pt"], 0, "nothing is left to train"),
        (["--resume", "finished", "--epochs", "1"], 2, "--epochs is 1, but 2 epochs of finished are done"),
        (["--resume", "finished", "--batch", "4"], 2, "leave out --batch (it is 4, the run's is 8)"),
        (["--resume", "damaged"], 2, f"damaged/weights/{newest.name} is damaged (RuntimeError), damaged/weights/"
         f"{older.name} is damaged (its checksum is wrong), and there is no other. Start a new run from the weights: "
         "--model damaged/weights/last.pt"),
        (["--resume", "stateless"], 2, "there is no stateless/weights/state_….pt; nothing was saved there yet"),
        (["--resume", "broken"], 2, "--resume broken/config.json is not JSON"),
        (["--resume", "swapped"], 2, "leave out --lr0 (it is 0.5, the run's is 0.01)"),
        (["--resume", "later"], 2, "was saved by a newer version of these scripts; update them"),
        (["--resume", "bestless"], 2, "the best.pt that belongs to it is not in bestless/weights any more"),
        (["--resume", "moved", "--epochs", "3", "--data", "renamed.yaml"], 2,
         "knows class 1 as 'square', renamed.yaml names it 'cube'. Start a new run from its weights: --model "),
        (["--resume", "moved", "--epochs", "3", "--data", "more.yaml"], 2,
         "was trained on 3 classes, more.yaml names 4"),
        (["--resume", "moved", "--epochs", "3", "--data", "changed/shapes.yaml"], 2,
         f"train has 1 images of another name, size or label than when the run began; first {changed}/images/train/"
         f"{label.stem}.jpg"),
        (["--resume", "moved", "--epochs", "3", "--data", "fewer/shapes.yaml"], 2,
         f"val has 20 images and had 21 when the run began; first {fewer}/images/val/"),
        (["--resume", "busy", "--epochs", "3"], 2, f"the run is still running, as process {os.getpid()}"),
        (["--resume", "gone"], 2, "--resume gone/config.json cannot be read: No such file or directory"),
    ]  # fmt: skip
    before = hashes(tmp_path)
    moved = ["--resume", "moved", "--epochs", "3", "--data", "there.yaml", "--log-level", "debug"]
    cases.append((moved, 0, "--epochs 2 -> 3"))
    cases.append((["--resume", "half"], 0, f"warning: half/weights/{newest.name} is damaged (RuntimeError); the state"))
    cases.append((["--resume", "headless", "--epochs", "3", "--project", "new", "--name", "more"], 0, "new/more"))
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
        if (code == 2 and "when the run began" not in message) or "nothing is left" in message:
            assert "reading the labels" not in said, arguments  # which take minutes where there are many
    after = hashes(tmp_path)
    changed_files = {name for name in after if after[name] != before.get(name) and not name.endswith("/.lock")}
    assert {name.partition("/")[0] for name in changed_files} == {"moved", "half", "new"}
    assert not (tmp_path / "headless" / ".lock").exists()  # a folder that may be read-only is left as it is
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    assert (config["data"], config["epochs"]) == ("there.yaml", 3)
    for place, epochs in (("moved", 3), ("half", 2), ("new/more", 3)):
        with open(tmp_path / place / "results.csv", newline="") as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == [str(epoch + 1) for epoch in range(epochs)]
        assert (tmp_path / place / "weights" / "best.pt").exists()


def test_a_run_in_a_read_only_folder_says_where_to_go_on(runs, monkeypatch):
    run = runs[1][0]
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(run) not in str(path) and allowed(path, mode))
    here = TrainConfig(resume=str(run), project=str(run.parent), name=run.name, epochs=3)
    with pytest.raises(InputError, match=r"cannot be written to. Go on in a new one: --resume .* --project"):
        read_run(here)
    stored = json.loads((run / "config.json").read_text())
    elsewhere = {name: stored[name] for name in vars(TrainConfig()) if name in stored} | {"resume": str(run)}
    for name, value in elsewhere.items():
        elsewhere[name] = tuple(value) if isinstance(value, list) else value
    saved, _ = read_run(TrainConfig(**(elsewhere | {"project": "elsewhere"})))
    assert saved["epoch"] == 1


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


@pytest.mark.slow
def test_a_run_with_the_local_loss_norm_goes_on(shapes: Path, tmp_path: Path):
    """Finding 5 of a review: the criterion had been made with the first loss, which a resumed run has not seen yet."""
    run = ["--data", shapes, "--model", "yolov10n.yaml", "--imgsz", 32, "--batch", 20, "--nbs", 20, "--workers", 0]
    run += ["--trackers", "none", "--no-plots", "--local-loss-norm", "--val-limit", 2]
    succeed(1, DETECT, *run, "--epochs", 1, cwd=tmp_path)
    console = succeed(1, DETECT, "--resume", "runs/detect/exp", "--epochs", 2, cwd=tmp_path)
    assert "epoch 2/2  train" in console


RUN = ["--model", TINY, "--imgsz", 64, "--batch", 8, "--nbs", 8, "--workers", 1, "--trackers", "none", "--no-plots"]


@pytest.mark.slow
def test_two_jobs_of_one_name_that_start_in_the_same_second(tmp_path: Path):
    """With other options, on a data set that both draw."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def both(*options: object) -> list[str]:
        command = [DETECT, *RUN, "--fraction", 32, "--val-limit", 8, "--resume", "auto", "--optimizer", "SGD", *options]
        jobs = [
            subprocess.Popen(
                [sys.executable, *map(str, command), "--lr0", rate], cwd=tmp_path, env=environment,
                stdout=subprocess.PIPE, text=True,
            )
            for rate in ("0.01", "0.02")
        ]  # fmt: skip
        said = [job.communicate(timeout=200)[0] for job in jobs]
        assert [job.returncode for job in jobs] == [0, 0], said
        return said

    both("--epochs", 2)
    runs = tmp_path / "runs" / "detect"
    rates = {name: json.loads((runs / name / "config.json").read_text())["lr0"] for name in os.listdir(runs)}
    assert (sorted(rates), sorted(rates.values())) == (["exp", "exp2"], [0.01, 0.02])
    for rate, said in zip((0.01, 0.02), both("--epochs", 3), strict=True):  # each goes on with its own
        (name,) = (name for name in rates if rates[name] == rate)
        assert f"run        {runs / name}\n" in said
        assert "resumed after epoch 2" in said
    for said in both("--epochs", 3):
        assert "nothing is left to train: runs/detect/exp" in said
    assert sorted(os.listdir(runs)) == ["exp", "exp2"]


@pytest.mark.slow
def test_paths_with_spaces_and_letters_on_another_disk(tmp_path: Path, shapes: Path):
    shm = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    disk = Path(tempfile.mkdtemp(prefix="l\u00e4ufe 1 ", dir=shm))
    try:
        data, here, there = tmp_path / "Daten f\u00fcr \u4e24\u4e2a", tmp_path / "mein Ordner", tmp_path / "anderswo"
        shutil.copytree(shapes.parent, data)
        for folder in (here, there):
            folder.mkdir()
        options = ["--data", data / "shapes.yaml", *RUN, "--project", disk / "Projekt \u00dc", "--name", "Lauf 1"]
        succeed(2, DETECT, *options, "--epochs", 1, cwd=here)
        run = os.path.relpath(disk / "Projekt \u00dc" / "Lauf 1", there)
        assert "epoch 2/2  val" in succeed(1, DETECT, "--resume", run, "--epochs", 2, cwd=there)
        assert "epoch 3/3  val" in succeed(1, DETECT, *options, "--resume", "auto", "--epochs", 3, cwd=here)
        assert os.listdir(disk / "Projekt \u00dc") == ["Lauf 1"]
        assert not any(there.iterdir())
    finally:
        shutil.rmtree(disk)
