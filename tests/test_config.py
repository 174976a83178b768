import json
from dataclasses import asdict
from pathlib import Path

import pytest

from train.config import InputError, TrainConfig, ValConfig, parse


def test_the_defaults_are_valid_and_ultralytics():
    from ultralytics.cfg import get_cfg

    config, theirs = TrainConfig(), get_cfg()
    config.check()
    ours = set(vars(theirs)) & set(vars(config)) - {"model", "data", "project", "name"}
    assert {"lr0", "mosaic", "close_mosaic", "box", "warmup_bias_lr", "iou", "max_det", "imgsz"} <= ours
    different = {name for name in ours if getattr(config, name) != getattr(theirs, name)}
    # Ultralytics leaves two unset (it validates at 0.001, the device decides the memory order); its resume is a bool
    assert different == {"conf", "channels_last", "resume"}


def test_all_faults_are_told_at_once():
    with pytest.raises(InputError) as error:
        TrainConfig(epochs=0, mosaic=2.0, lr0=float("nan"), imgsz=8).check()
    message = str(error.value)
    assert "--epochs is 0; it must be 1 or more." in message
    assert "--mosaic is 2.0; it must be between 0 and 1." in message
    assert "--lr0 is nan" in message
    assert "--imgsz is 8" in message


def test_a_file_of_options_stands_below_the_command_line(tmp_path: Path):
    (tmp_path / "args.yaml").write_text("epochs: 5\nlr0: 0.1\nconf: null\ncompile: true\nworkers: 8\ndnn: false\n")
    config, warnings = parse(TrainConfig, "", ["--cfg", str(tmp_path / "args.yaml"), "--lr0", "0.2"])
    assert (config.epochs, config.lr0, config.conf) == (5, 0.2, 0.001)
    assert len(warnings) == 1
    assert "sets compile, which this project does not have" in warnings[0]  # dnn is at its default: asks for nothing


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


def test_validation_takes_data_and_size_from_the_checkpoint():
    config = ValConfig(weights="best.pt").with_defaults({"data": "coco.yaml", "imgsz": 320})
    assert (config.data, config.imgsz) == ("coco.yaml", 320)
    config = ValConfig(weights="best.pt", data="other.yaml", imgsz=64).with_defaults(
        {"data": "coco.yaml", "imgsz": 320}
    )
    assert (config.data, config.imgsz) == ("other.yaml", 64)
    with pytest.raises(InputError, match="--data"):
        ValConfig(weights="best.pt").with_defaults({})
