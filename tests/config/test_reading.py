import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from train.config.errors import InputError
from train.config.objects import Objects
from train.config.options import TrainConfig, ValConfig
from train.config.reading import parse
from train.model.build import build_model
from train.model.weights import as_checkpoint
from train.validate import validated_with


def test_the_defaults_are_valid_and_ultralytics():
    from ultralytics.cfg import get_cfg

    config, theirs = TrainConfig(), get_cfg()
    config.check()
    ours = set(vars(theirs)) & set(vars(config)) - {"model", "data", "project", "name"}
    assert {"lr0", "mosaic", "close_mosaic", "box", "warmup_bias_lr", "iou", "max_det", "imgsz"} <= ours
    different = {name for name in ours if getattr(config, name) != getattr(theirs, name)}
    # Ultralytics leaves conf unset and validates at 0.001; its rect is for training alone; its resume is a bool; its
    # cache is False, and here unset
    assert different == {"conf", "rect", "resume", "cache"}


def test_all_faults_are_told_at_once():
    with pytest.raises(InputError) as error:
        TrainConfig(epochs=0, mosaic=2.0, lr0=float("nan"), imgsz=8).check()
    message = str(error.value)
    assert "--epochs is 0; it must be 1 or more." in message
    assert "--mosaic is 2.0; it must be between 0 and 1." in message
    assert "--lr0 is nan" in message
    assert "--imgsz is 8" in message


def test_a_file_of_options_stands_below_the_command_line(tmp_path: Path):
    (tmp_path / "args.yaml").write_text("epochs: 5\nlr0: 0.1\nconf: null\noptimize: true\nworkers: 8\ndnn: false\n")
    config, warnings = parse(TrainConfig, "", ["--cfg", str(tmp_path / "args.yaml"), "--lr0", "0.2"])
    assert (config.epochs, config.lr0, config.conf) == (5, 0.2, 0.001)
    assert len(warnings) == 1
    assert "sets optimize, which this project does not have" in warnings[0]  # dnn is at its default: asks for nothing


def test_ultralytics_own_file_and_our_config_json_are_accepted(tmp_path: Path):
    from ultralytics.cfg import DEFAULT_CFG_PATH

    assert parse(TrainConfig, "", ["--cfg", str(DEFAULT_CFG_PATH)]) == (TrainConfig(), [])
    config = TrainConfig(epochs=3, freeze=(0, "22.cv2"), classes=(1, 2), trackers=("none",), time=0.5)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config) | {"versions": {"torch": "2"}}))
    assert parse(TrainConfig, "", ["--cfg", str(tmp_path / "config.json")]) == (config, [])


def test_flags_of_more_than_one_form():
    def parsed(*arguments: str) -> TrainConfig:
        return parse(TrainConfig, "", list(arguments))[0]

    assert parsed("--freeze", "10").freeze == 10
    assert parsed("--freeze", "0", "22.cv2").freeze == (0, "22.cv2")
    assert parsed("--end2end").end2end is True
    assert parsed("--no-end2end").end2end is False
    assert parsed("--close_mosaic", "3", "--no-rect").close_mosaic == 3


def test_help_groups_the_options_and_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, "what it does", ["--help"])
    said = capsys.readouterr().out
    for group in ("training", "recipe", "augmentation", "output", "data", "validation", "computing", "file"):
        assert f"{group} options" in said
    assert "(default: 0.937)" in said
    assert "Probability of a mosaic of four images" in said


def test_validation_goes_by_the_checkpoint_where_the_command_line_says_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    best = str(tmp_path / "best.pt")
    trained = TrainConfig(
        data="/data/coco.yaml", imgsz=96, val_batch=7, conf=0.01, rect=False, max_dets=(1, 2, 3), channels_last=True,
        mixed_precision="bf16", classes=(0, 2), annotations="truth.json", val_limit=5, workers=3, plots=False,
    )  # fmt: skip
    model, _ = build_model(trained, "yolov8n.yaml", Objects(names={0: "a", 1: "b", 2: "c"}))
    torch.save(as_checkpoint(model, asdict(trained), 0, {}), best)
    config, _ = parse(ValConfig, "", ["--weights", best], validated_with)
    kept = ("data", "imgsz", "val_batch", "conf", "rect", "max_dets", "mixed_precision", "channels_last", "classes")
    assert all(getattr(config, name) == getattr(trained, name) for name in (*kept, "annotations"))
    assert (config.val_limit, config.workers, config.plots) == (None, 8, True)  # the run's and the machine's
    config, _ = parse(ValConfig, "", ["--weights", best, "--data", "x.yaml", "--imgsz", "64", "--rect"], validated_with)
    assert (config.data, config.imgsz, config.rect, config.conf, config.annotations) == ("x.yaml", 64, True, 0.01, "")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert parse(ValConfig, "", ["--weights", best], validated_with)[0].mixed_precision is None  # the launcher's


def test_what_to_evaluate_is_one_thing():
    for wrong in (ValConfig(), ValConfig(weights="a.pt", predictions="b.json"), ValConfig(predictions="b.json")):
        with pytest.raises(InputError, match=r"either --weights|needs --data"):
            wrong.check()
    with pytest.raises(InputError, match=r"--max-dets is \[1, 1, 3\]"):
        ValConfig(weights="a.pt", max_dets=(1, 1, 3)).check()


def test_rect_of_ultralytics_files_asks_for_nothing(tmp_path: Path):
    (tmp_path / "args.yaml").write_text("rect: false\n")  # training only, there; it always validates rectangular
    assert parse(TrainConfig, "", ["--cfg", str(tmp_path / "args.yaml")])[0].rect is None
    (tmp_path / "config.json").write_text('{"rect": false, "versions": {}}')
    assert parse(TrainConfig, "", ["--cfg", str(tmp_path / "config.json")])[0].rect is False


def test_a_resumed_run_is_measured_as_before(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(asdict(TrainConfig(epochs=3)) | {"versions": {}}))
    run = ["--resume", str(tmp_path)]
    assert parse(TrainConfig, "", [*run, "--epochs", "5"])[0].epochs == 5
    for changed in (["--val-limit", "5"], ["--max-dets", "1", "10", "300"], ["--split", "test"]):
        with pytest.raises(InputError, match=f"leave out {changed[0]}"):
            parse(TrainConfig, "", [*run, *changed])
    with pytest.raises(InputError, match="leave out --annotations"):
        parse(TrainConfig, "", [*run, "--annotations", "truth.json"])
    measured_by = asdict(TrainConfig(annotations="/old/truth.json")) | {"versions": {}}
    (tmp_path / "config.json").write_text(json.dumps(measured_by))
    moved = parse(TrainConfig, "", [*run, "--data", "new.yaml", "--annotations", "new.json"])[0]
    assert (moved.data, moved.annotations) == ("new.yaml", "new.json")


def test_a_checkpoint_in_fp16_is_validated_where_there_is_none(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    trained = TrainConfig(mixed_precision="fp16", imgsz=96)
    model, _ = build_model(trained, "yolov8n.yaml", Objects(names={0: "a"}))
    torch.save(as_checkpoint(model, asdict(trained), 0, {}), tmp_path / "best.pt")
    config, _ = parse(ValConfig, "", ["--weights", "~/best.pt"], validated_with)
    assert (config.mixed_precision, config.imgsz) == ("auto", 96)
    said = f"{tmp_path}/best.pt was validated in fp16, which the CPU does not compute; --mixed-precision auto takes"
    assert capsys.readouterr().err.startswith(said)
    config, _ = parse(ValConfig, "", ["--weights", "~/best.pt", "--mixed-precision", "fp16"], validated_with)
    assert config.mixed_precision == "fp16"  # asked for; start_processes refuses it
    assert capsys.readouterr().err == ""
