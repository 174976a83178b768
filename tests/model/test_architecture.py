"""Model YAMLs and checkpoints: known layers are built, nothing runs, what is refused says what is meant."""

import os
import zipfile
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import ROOT

from tests.conftest import TINY
from train.config.errors import InputError
from train.config.objects import Objects
from train.config.options import TrainConfig
from train.model.architecture import LAYERS, build_detector, check_architecture, read_architecture
from train.model.build import build_model
from train.model.tasks import TASKS
from train.model.weights import as_checkpoint, fetch_weights, load_detector

DETECTORS = sorted(
    file
    for file in (ROOT / "cfg" / "models").rglob("*.yaml")
    if yaml.safe_load(file.read_text()).get("head", [[0, 0, "", []]])[-1][2] in ("Detect", "v10Detect")
)


def test_every_detector_of_ultralytics_is_made_of_known_layers():
    assert len(DETECTORS) > 20
    foreign = {file.name: "" for file in DETECTORS}
    for file in DETECTORS:
        content = yaml.safe_load(file.read_text())
        foreign[file.name] = ", ".join(sorted({row[2] for row in content["backbone"] + content["head"]} - LAYERS))
    assert {name for name, layers in foreign.items() if layers} <= {"yolo11-cls-resnet18.yaml"}, foreign


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": [[-1, 1, "TorchVision", [512, "resnet18", "DEFAULT"]]]}, "'TorchVision', which these scripts do"),
        ({"backbone": [[-1, 1, "Cnv", [16, 3, 2]]]}, r"layer 0 is 'Cnv', which .* Known are A2C2f, "),
        ({"backbone": [[-1, 1, "nn.Bilinear", [16]]]}, "'nn.Bilinear', which these scripts do not build"),
        ({"backbone": [[-1, 1, "Conv"]]}, r"layer 0 is a list of 3; it must be \[from, number, module"),
        ({"backbone": [[-1, 1, ["Conv"], [16]]]}, "layer 0 is a list of 4; it must be"),
        ({"head": []}, "no list of layers named `head`"),
        ({"backbone": None}, "no list of layers named `backbone`"),
        ({"names": ["a"], "train": "x"}, "is the YAML of a data set; that is --data"),
    ],
)
def test_a_description_that_is_none_says_why(change: dict, message: str):
    content = yaml_model_load(str(TINY)) | change
    with pytest.raises(InputError, match=message):
        check_architecture(content, "--model x.yaml")


def test_files_that_are_no_models(tmp_path: Path):
    cases = {
        "empty.yaml": ("", "no list of layers"),
        "broken.yaml": ("backbone: [", "is not a YAML that can be read"),
        "list.yaml": ("- a\n", "it is no mapping with a backbone and a head"),
        "activation.yaml": (
            TINY.read_text() + "\nactivation: __import__('os').system('touch ran')\n",
            "cannot be built",
        ),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            build_model(TrainConfig(model=str(tmp_path / name)), str(tmp_path / name), Objects(names={0: "a"}))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InputError, match="is not a file"):
        read_architecture(str(tmp_path / "folder.yaml"))
    with pytest.raises(InputError, match=r"There is no model .*gone\.yaml"):
        read_architecture(str(tmp_path / "gone.yaml"))


def test_layers_that_do_not_fit_each_other_are_an_input_error():
    content = deepcopy(yaml_model_load(str(TINY)))
    content["head"][-1][0] = [1, 2, 99]
    with pytest.raises(InputError, match="--model x cannot be built: "):
        build_detector(content, TASKS["detect"], Objects(names={0: "a", 1: "b"}), "--model x")


@pytest.mark.parametrize(
    ("named", "flag", "message"),
    [
        ("best.onnx", "--weights", r"--weights is 'best.onnx', an exported model; name the .pt"),
        ("m.engine", "--model", r"--model is 'm.engine', an exported model"),
        ("yolov8n", "--model", r"Did you mean yolov8n.yaml or yolov8n.pt\?"),
        ("x.txt", "--weights", r"--weights is 'x.txt'; it must be a .pt checkpoint or a run's folder"),
        ("run", "--model", r"--model run is a folder; name a file, such as run/weights/best.pt"),
        ("empty", "--weights", r"--weights empty is a folder; name a file$"),
        ("gone.pt", "--weights", "There is no checkpoint gone.pt"),
    ],
)
def test_the_flag_that_was_typed_is_named(tmp_path: Path, monkeypatch, named: str, flag: str, message: str):
    monkeypatch.chdir(tmp_path)
    Path("run/weights").mkdir(parents=True)
    Path("run/weights/best.pt").write_bytes(b"")
    Path("empty").mkdir()
    if (named, flag) == ("empty", "--weights"):
        message = message.removesuffix("$")
    with pytest.raises(InputError, match=message):
        fetch_weights(named, flag)
    assert fetch_weights("run", "--weights") == "run/weights/best.pt"


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_trust_is_offered_only_where_it_would_help(tmp_path: Path):
    torch.save({"model": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    torch.save({"model": Evil(tmp_path / "ran")}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("evil.pt", "old.pt"):
        with pytest.raises(InputError, match=r"it holds '(posix|os)\.system', of neither.*--trust-checkpoint") as error:
            load_detector(str(tmp_path / name))
        assert "yolo" not in str(error.value).lower()  # nothing of Ultralytics' own hints
    good, _ = build_model(TrainConfig(), str(TINY), Objects(names={0: "a"}))
    torch.save(as_checkpoint(good, {}, 0, {}), tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    for name, content in {
        "text.pt": b"hello",
        "cut.pt": data[: len(data) // 2],
        "empty.pt": b"",
        "noise.pt": data[::-1],
    }.items():
        (tmp_path / name).write_bytes(content)
    for name in ("text.pt", "cut.pt", "empty.pt", "noise.pt", "zip.pt"):
        with pytest.raises(InputError, match=f"{name} is not a checkpoint that can be loaded") as error:
            load_detector(str(tmp_path / name))
        assert "--trust" not in str(error.value)
        assert str(error.value).endswith(".")
        assert (tmp_path / name).exists()
    assert not (tmp_path / "ran").exists()


def test_a_checkpoints_own_description_is_held_to_the_same_layers(tmp_path: Path):
    model, _ = build_model(TrainConfig(), str(TINY), Objects(names={0: "a"}))
    model.yaml["backbone"][0] = [-1, 1, "TorchVision", [16, "resnet18", "DEFAULT"]]
    torch.save(as_checkpoint(model, {}, 0, {}), tmp_path / "tv.pt")
    with pytest.raises(InputError, match="layer 0 is 'TorchVision'"):
        build_model(TrainConfig(model="tv.pt"), str(tmp_path / "tv.pt"), Objects(names={0: "a"}))
