import pytest

from train.config import InputError, TrainConfig, ValConfig


def test_the_defaults_are_valid_and_ultralytics():
    from ultralytics.cfg import get_cfg

    config, theirs = TrainConfig(), get_cfg()
    config.check()
    ours = set(vars(theirs)) & set(vars(config)) - {"model", "data", "project", "name"}
    assert {"lr0", "mosaic", "close_mosaic", "box", "warmup_bias_lr", "iou", "max_det", "imgsz"} <= ours
    different = {name for name in ours if getattr(config, name) != getattr(theirs, name)}
    # Ultralytics leaves both unset: it validates at 0.001, and picks the memory order by the device
    assert different == {"conf", "channels_last"}


def test_all_faults_are_told_at_once():
    with pytest.raises(InputError) as error:
        TrainConfig(epochs=0, mosaic=2.0, lr0=float("nan"), imgsz=8).check()
    message = str(error.value)
    assert "--epochs is 0; it must be 1 or more." in message
    assert "--mosaic is 2.0; it must be between 0 and 1." in message
    assert "--lr0 is nan" in message
    assert "--imgsz is 8" in message


def test_validation_takes_data_and_size_from_the_checkpoint():
    config = ValConfig(weights="best.pt").with_defaults({"data": "coco.yaml", "imgsz": 320})
    assert (config.data, config.imgsz) == ("coco.yaml", 320)
    config = ValConfig(weights="best.pt", data="other.yaml", imgsz=64).with_defaults(
        {"data": "coco.yaml", "imgsz": 320}
    )
    assert (config.data, config.imgsz) == ("other.yaml", 64)
    with pytest.raises(InputError, match="--data"):
        ValConfig(weights="best.pt").with_defaults({})
