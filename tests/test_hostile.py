"""Every route by which a stranger's file could run code, write or reach the network, all forbidden and watched."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

from tests.conftest import DETECT, ROOT, TINY, VALIDATE
from train.config.errors import InputError
from train.config.objects import Objects
from train.config.options import TrainConfig
from train.model.build import build_model
from train.model.weights import as_checkpoint, load_detector
from train.reporting import wandb_start
from train.reporting.repository import git_state
from train.training.resume import read_run

NAMES = {0: "circle", 1: "square", 2: "triangle"}


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@dataclass
class Route:
    """A command, its exit code, a part of what it says."""

    script: Path
    arguments: list[str]
    code: int
    says: str


def make_run(folder: Path, config: dict[str, Any], last: Any, state: Any) -> None:
    (folder / "weights").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(TrainConfig()) | config | {"versions": {}}))
    torch.save(last, folder / "weights" / "last.pt")
    torch.save(state, folder / "weights" / "state_7.pt")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> tuple[Path, list[Route]]:
    """A folder of hostile files, and the routes into them."""
    home = tmp_path_factory.mktemp("stranger")
    marker, victim = home / "RAN", home / "victim"
    victim.mkdir()
    (victim / "metrics.json").write_text("precious")
    (home / "bashrc").write_text("precious\n")
    model, _ = build_model(TrainConfig(), str(TINY), Objects(names=NAMES))
    good = as_checkpoint(model, {"data": str(shapes), "imgsz": 64}, 0, {})
    torch.save(good, home / "good.pt")
    for name, old in (("evil.pt", False), ("old.pt", True)):
        torch.save({"model": Evil(marker)}, home / name, _use_new_zipfile_serialization=not old)

    quick = ["--data", str(shapes), "--imgsz", "64", "--epochs", "1", "--batch", "20", "--trackers", "none"]
    quick += ["--workers", "0", "--no-plots", "--val-limit", "3"]
    make_run(home / "gift", {"trust_checkpoint": True, "data": str(shapes)}, {"model": Evil(marker)}, {"epoch": 0})
    make_run(home / "trap", {"data": str(shapes), "imgsz": 64}, good, {"epoch": Evil(marker)})
    make_run(home / "append", {"log_file": str(home / "bashrc"), "data": str(shapes)}, good, {"epoch": Evil(marker)})
    (home / "trust.yaml").write_text(f"trust_checkpoint: true\nmodel: {home}/evil.pt\n")
    (home / "log.yaml").write_text(f"log_file: {home}/bashrc\nmodel: {TINY}\nresume: {home}/gift\n")
    (home / "apply.yaml").write_text(f"epochs: !!python/object/apply:os.system ['touch {marker}']\n")
    (home / "download.yaml").write_text(
        f"path: {shapes.parent}\ntrain: images/train\nval: images/val\nnames: [circle, square, triangle]\n"
        f"download: |\n  import os; os.system('touch {marker}')\n"
    )
    (home / "url.yaml").write_text(
        f"path: {home}/nothing\ntrain: https://example.com/a.zip\nval: https://example.com/a.zip\nnames: [a]\n"
        "download: https://example.com/a.zip\n"
    )
    text = TINY.read_text()
    vision = "backbone:\n  - [-1, 1, TorchVision, [512, resnet18, DEFAULT, True, 2]]\n"
    (home / "vision.yaml").write_text(text.replace("backbone:\n", vision, 1))
    code = f"__import__('os').system('touch {marker}')"
    (home / "activation.yaml").write_text(text + f'\nactivation: "{code}"\n')
    (home / "argument.yaml").write_text(
        text.replace("backbone:\n", f'backbone:\n  - [-1, 1, Conv, ["{code}", 3]]\n', 1)
    )
    for name, change in {
        "vision.pt": {"backbone": [[-1, 1, "TorchVision", [512, "resnet18", "DEFAULT"]]]},
        "activation.pt": {"activation": code},
    }.items():
        model, _ = build_model(TrainConfig(), str(TINY), Objects(names=NAMES))
        model.yaml |= change
        torch.save(as_checkpoint(model, {"data": str(shapes), "imgsz": 64}, 0, {}), home / name)
    own = {"save_dir": str(victim), "log_file": str(home / "bashrc"), "trust_checkpoint": True, "predictions": "x"}
    model, _ = build_model(TrainConfig(), str(TINY), Objects(names=NAMES))
    torch.save(as_checkpoint(model, {"data": str(shapes), "imgsz": 64} | own, 0, {}), home / "savedir.pt")

    routes = [
        Route(DETECT, ["--resume", "gift"], 2, "state_7.pt is damaged"),
        Route(DETECT, ["--resume", "trap"], 2, "state_7.pt is damaged"),
        Route(DETECT, ["--resume", "append"], 2, "state_7.pt is damaged"),
        Route(DETECT, ["--cfg", "trust.yaml", *quick], 2, "evil.pt is not a checkpoint that can be loaded"),
        Route(DETECT, ["--cfg", "log.yaml", *quick], 0, ""),
        Route(DETECT, ["--cfg", "apply.yaml", *quick], 2, "is not YAML"),
        Route(DETECT, [*quick, "--model", "evil.pt"], 2, "--trust-checkpoint loads that, and runs its code"),
        Route(DETECT, [*quick, "--model", "old.pt"], 2, "--trust-checkpoint loads that, and runs its code"),
        Route(DETECT, [*quick, "--model", "vision.yaml"], 2, "'TorchVision', which these scripts do not build"),
        Route(DETECT, [*quick, "--model", "vision.pt"], 2, "'TorchVision', which these scripts do not build|no list"),
        Route(DETECT, [*quick, "--model", "activation.yaml"], 2, "cannot be built"),
        Route(DETECT, [*quick, "--model", "activation.pt"], 2, "cannot be built"),
        Route(DETECT, [*quick, "--model", "argument.yaml"], 2, "cannot be built"),
        Route(DETECT, [*quick, "--model", str(TINY), "--data", "download.yaml"], 0, ""),
        Route(DETECT, [*quick, "--model", str(TINY), "--data", "url.yaml"], 2, "nothing is downloaded"),
        Route(DETECT, [*quick, "--model", "yolov8n-nothing.pt"], 2, "There is no checkpoint"),
        Route(DETECT, [*quick, "--model", "https://example.com/x.pt"], 2, "There is no checkpoint"),
        Route(VALIDATE, ["--weights", "evil.pt"], 2, "--trust-checkpoint"),
        Route(VALIDATE, ["--weights", "https://example.com/x.pt"], 2, "There is no checkpoint"),
        Route(VALIDATE, ["--weights", "savedir.pt", "--workers", "0", "--no-plots"], 0, ""),
        Route(VALIDATE, ["--predictions", "evil.pt", "--data", str(shapes)], 2, "is not a COCO results file"),
        Route(VALIDATE, ["--predictions", "x", "--annotations", "evil.pt"], 2, "is not a COCO"),
    ]
    return home, routes


def test_no_route_runs_writes_over_or_reaches_out(stranger):
    home, routes = stranger
    lines = "".join(json.dumps([str(route.script), *route.arguments]) + "\n" for route in routes)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "YOLO_", "ACCELERATE_"))}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "workers" / "mistakes.py"), "forbid"],
        input=lines, capture_output=True, text=True, cwd=home, timeout=300,
        env=clean | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(routes), done.stderr[-2000:]
    for route, result in zip(routes, results, strict=True):
        assert result["code"] == route.code, (route.arguments, result["err"][-500:], result["out"][-300:])
        assert re.search(route.says, result["err"]), (route.arguments, result["err"][-500:])
        assert not result["tried"], (route.arguments, result["tried"])
        assert "Traceback" not in result["err"], route.arguments
    assert not (home / "RAN").exists()
    assert (home / "victim" / "metrics.json").read_text() == "precious"
    assert os.listdir(home / "victim") == ["metrics.json"]
    assert (home / "bashrc").read_text() == "precious\n"
    new = {path.name for path in home.iterdir() if path.name not in ("victim", "bashrc")}
    assert not {name for name in new if name.startswith((".", "config", "predictions", "logs"))}


def test_the_same_routes_are_open_where_the_user_says_so(stranger, tmp_path: Path):
    """Else the test above would prove nothing: the evil files do run where they are trusted."""
    home, _ = stranger
    code = f"from train.model.weights import load_detector; load_detector({str(home / 'evil.pt')!r}, trust=True)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert (home / "RAN").exists()
    (home / "RAN").unlink()


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_git_runs_nothing_that_a_repository_names(tmp_path: Path, monkeypatch):
    marker = tmp_path / "RAN"
    evil = tmp_path / "evil.sh"
    evil.write_text(f"#!/bin/sh\ntouch {marker}\nexit 1\n")
    evil.chmod(0o755)
    here = tmp_path / "here"
    here.mkdir()
    git(here, "init", "-q")
    (here / "a.txt").write_text("a\n")
    (here / ".gitattributes").write_text("*.txt filter=one\n")
    git(here, "add", ".")
    git(here, "commit", "-qm", "a")
    monkeypatch.chdir(here)
    tree = subprocess.run(["git", "rev-parse", "HEAD^{tree}"], capture_output=True, text=True).stdout.strip()
    commit = git_state()
    assert len(commit) == 40
    (here / "a.txt").write_text("b\n")
    for key in ("core.fsmonitor", "filter.one.clean", "core.pager", "core.sshCommand"):
        git(here, "config", key, str(evil))
    with open(here / ".git" / "config", "ab") as config:  # names that no list of overrides would name as they are
        config.write(b'[filter "x\xff"]\n\tclean = %s\n[filter "a=b"]\n\tclean = %s\n' % (2 * (bytes(evil),)))
    for key, value in {
        "extensions.partialClone": "origin", "remote.origin.promisor": "true", "protocol.ext.allow": "always",
        "remote.origin.url": f"ext::{evil} %S", "core.repositoryFormatVersion": "1",
        "core.hooksPath": str(tmp_path / "h"),
    }.items():  # fmt: skip
        git(here, "config", key, value)
    (tmp_path / "h").mkdir()
    for hook in ("post-index-change", "fsmonitor-watchman"):
        (tmp_path / "h" / hook).write_text(evil.read_text())
        (tmp_path / "h" / hook).chmod(0o755)
    marker.unlink(missing_ok=True)
    os.utime(here / "a.txt", (1, 1))
    assert git_state() == commit
    assert not marker.exists()
    (here / ".git" / "objects" / tree[:2] / tree[2:]).unlink()  # which git would fetch
    marker.unlink(missing_ok=True)
    assert git_state() == commit
    assert not marker.exists()
    subprocess.run(["git", "status"], capture_output=True, stdin=subprocess.DEVNULL, timeout=20)  # which runs them
    assert marker.exists()
    monkeypatch.chdir(tmp_path)
    assert git_state() == ""


class Constructed:
    """A pickle that calls a class of the list of allowed ones."""

    def __init__(self, kind: type, *arguments: Any):
        self.kind, self.arguments = kind, arguments

    def __reduce__(self) -> Any:
        return self.kind, self.arguments


def test_a_checkpoint_constructs_no_module(tmp_path: Path, monkeypatch):
    """Ultralytics' list admits its modules, and a pickle may call them: TorchVision's constructor downloads."""
    from torch import hub
    from ultralytics.nn.modules import TorchVision
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load

    asked: list[str] = []
    monkeypatch.setattr(hub, "load_state_dict_from_url", lambda url, *_, **__: asked.append(url))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda url, *_, **__: asked.append(url))
    description = yaml_model_load(str(TINY))
    description["backbone"][0] = [-1, 1, "TorchVision", [16, "resnet18", "DEFAULT"]]
    for i, made in enumerate((
        Constructed(TorchVision, "resnet18", "DEFAULT"), Constructed(DetectionModel, description, 3, 2, False)
    )):  # fmt: skip
        for old in (False, True):
            file = tmp_path / f"{i}{old}.pt"
            torch.save({"model": made}, file, _use_new_zipfile_serialization=not old)
            with pytest.raises(InputError, match="is not a checkpoint that can be loaded"):
                load_detector(str(file))
    assert not asked
    model, _ = build_model(TrainConfig(), str(TINY), Objects(names=NAMES))  # modules are constructed again
    folder = tmp_path / "it's"  # Ultralytics takes the apostrophe away, and looks on the network
    folder.mkdir()
    torch.save(as_checkpoint(model, {}, 0, {}), folder / "best.pt")
    assert load_detector(str(folder / "best.pt"))[0].names == NAMES
    assert not (tmp_path / "its").exists()


def test_a_run_folder_whose_files_lead_elsewhere_is_refused(runs, tmp_path: Path):
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("logs/rank0.log", "results.csv", "results.png", "weights/best.pt", "weights", "logs"):
        run, elsewhere = tmp_path / name.replace("/", "-"), victim / name.replace("/", "-")
        shutil.copytree(runs[1][0], run)
        shutil.move(run / name, elsewhere)
        (run / name).symlink_to(elsewhere)
        with pytest.raises(InputError, match=f"{name} is a link to "):
            read_run(TrainConfig(resume=str(run), project=str(run.parent), name=run.name, epochs=3))


def test_wandb_asks_no_stranger_which_server_to_send_the_key_to(tmp_path: Path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nbase_url = https://evil.example\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "mine"))
    assert wandb_start.own_server() == wandb.Settings.model_fields["base_url"].default
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "settings").write_text("[default]\nbase_url = https://wandb.firm.example\n")
    assert wandb_start.own_server() == "https://wandb.firm.example"
