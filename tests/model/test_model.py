import re
from pathlib import Path

import pytest
import torch
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.nms import non_max_suppression

from tests.conftest import ROOT
from train.config.errors import InputError
from train.config.objects import Objects
from train.config.options import TrainConfig
from train.config.task_options import PoseConfig, SegmentConfig
from train.model import weights as weights_file
from train.model.build import (
    build_model,
    check_imgsz,
    compile_forward,
    frozen_norms,
    largest_stride,
    set_class_weights,
    set_end2end,
)
from train.model.inference import detect, inference_copy
from train.model.loss import end_of_epoch
from train.model.tasks import TASKS, build_criterion, with_sigmas
from train.model.weights import as_checkpoint, fetch_weights, load_detector

CPU = torch.device("cpu")
NAMES = {0: "circle", 1: "square", 2: "triangle"}


def build(model: str, names: dict[int, str] = NAMES) -> DetectionModel:
    torch.manual_seed(0)
    return build_model(TrainConfig(model=model), fetch_weights(model), Objects(names=names))[0]


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml", "yolov10n.yaml", "yolov5n.yaml", "yolo11n.yaml"])
@pytest.mark.parametrize("end2end", [False, True])
def test_detections_are_those_of_ultralytics_own_forward(name: str, end2end: bool):
    model = build(name).eval()
    for module in model.modules():  # statistics other than 0 and 1, so that fusing has something to do
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    head = model.model[-1]
    if end2end:
        if getattr(head, "one2one_cv2", None) is None:
            pytest.skip("has no one-to-one head")
        head.end2end = True
    head.bias_init()
    for branch in (head.cv2, getattr(head, "one2one_cv2", None) or []):
        for layers in branch:
            layers[-1].weight.data.normal_(0, 0.3)  # boxes that differ
    images = torch.rand(2, 3, 64, 96)
    copy = inference_copy(model, CPU, torch.contiguous_format)
    with torch.inference_mode():
        mine = detect(copy(images), copy, conf=0.001, iou=0.7, max_det=50)
        fused = inference_copy(model, CPU, torch.contiguous_format)
        fused.model[-1].training = False
        fused.model[-1].max_det = 50
        theirs = non_max_suppression(fused(images), 0.001, 0.7, multi_label=True, max_det=50, end2end=head.end2end)
    assert sum(map(len, theirs)) > 10
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert model.model[-1] is head  # the model itself is not fused
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())


def test_boxes_are_decoded_in_fp32_after_a_bf16_forward():
    model = build("yolov8n.yaml")
    copy = inference_copy(model, CPU, torch.contiguous_format)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        raw = copy(torch.rand(1, 3, 320, 320))
    assert raw["boxes"].dtype == torch.bfloat16
    raw["boxes"] = torch.randn_like(raw["boxes"])
    with torch.inference_mode():
        boxes = detect(raw, copy, conf=0.0, iou=0.99, max_det=300)[0][:, :4]
    assert boxes.dtype == torch.float32
    assert not torch.equal(boxes, boxes.bfloat16().float())


def test_head_rows_follow_the_class_names(tmp_path: Path):
    source = build("yolov8n.yaml")
    torch.save(as_checkpoint(source, {}, 0, {}), tmp_path / "source.pt")
    names = {0: "triangle", 1: "hexagon", 2: "circle"}
    model, origin = build_model(TrainConfig(model="source.pt"), str(tmp_path / "source.pt"), Objects(names=names))
    mine, theirs = model.model[-1].cv3[0][-1], source.model[-1].cv3[0][-1]
    assert torch.equal(mine.weight[0], theirs.weight[2])
    assert torch.equal(mine.weight[2], theirs.weight[0])
    total = len(model.state_dict())
    assert origin == f"{total} of {total} tensors from source.pt"
    other, origin = build_model(
        TrainConfig(model="source.pt"), str(tmp_path / "source.pt"), Objects(names={0: "hexagon"})
    )
    heads = 2 * len(other.model[-1].cv3)  # weight and bias of the class convolutions, of another size
    assert origin == f"{total - heads} of {total} tensors from source.pt"


CLASSES = r"(one2one_)?cv3\.\d\.2\.|proto\.semseg\.2\."  # last convolutions, whose rows are classes


@pytest.mark.parametrize(
    ("name", "objects", "other"),
    [
        ("tiny-seg", Objects(names=NAMES), ""),
        ("tiny26-seg", Objects(names=NAMES), ""),
        ("tiny-seg", Objects(names={0: "star", 1: "hexagon"}), CLASSES),
        ("tiny26-seg", Objects(names={0: "star", 1: "hexagon"}), CLASSES),
        ("tiny-pose", Objects(names=NAMES, keypoints=(4, 3)), ""),
        ("tiny26-pose", Objects(names=NAMES, keypoints=(4, 3)), ""),
        ("tiny-pose", Objects(names=NAMES, keypoints=(5, 2)), r"(one2one_)?cv4"),
        ("tiny26-pose", Objects(names=NAMES, keypoints=(6, 3)), r"(one2one_)?cv4"),
        ("tiny26-pose", Objects(names={0: "star"}, keypoints=(6, 3)), rf"{CLASSES}|(one2one_)?cv4"),
    ],
)
def test_of_masks_and_keypoints_what_fits_is_taken(name: str, objects: Objects, other: str, tmp_path: Path):
    kind = SegmentConfig if "seg" in name else PoseConfig
    task, file = TASKS[kind.task], str(ROOT / "tests" / "fixtures" / f"{name}.yaml")

    def built(model: str, source: str, about: Objects) -> tuple[DetectionModel, str]:
        return build_model(with_sigmas(kind(model=model), task, about), source, about)

    torch.manual_seed(0)
    source, _ = built(file, file, Objects(names=NAMES, keypoints=(4, 3) if "pose" in name else ()))
    torch.save(as_checkpoint(source, {}, 0, {}), tmp_path / "source.pt")
    torch.manual_seed(1)
    model, origin = built("source.pt", str(tmp_path / "source.pt"), objects)
    given, mine = source.state_dict(), model.state_dict()
    assert given.keys() == mine.keys()
    fresh = [key for key in mine if mine[key].shape != given[key].shape]
    assert all(torch.equal(mine[key], given[key]) for key in mine.keys() - {*fresh})
    assert bool(fresh) == bool(other)
    assert all(re.search(rf"\.({other})", key) for key in fresh)
    assert origin == f"{len(mine) - len(fresh)} of {len(mine)} tensors from source.pt"
    head = model.model[-1]
    assert (head.nc, len(model.names)) == (len(objects.names), len(objects.names))
    assert not objects.keypoints or [*head.kpt_shape] == [*objects.keypoints]


def test_rows_of_masks_follow_the_class_names(tmp_path: Path):
    names, file = {0: "triangle", 1: "hexagon", 2: "circle", 3: "star"}, str(ROOT / "tests/fixtures/tiny26-seg.yaml")
    source, _ = build_model(SegmentConfig(model=file), file, Objects(names=NAMES))
    torch.save(as_checkpoint(source, {}, 0, {}), tmp_path / "source.pt")
    model, _ = build_model(SegmentConfig(), str(tmp_path / "source.pt"), Objects(names=names))
    for mine, theirs in (
        (model.model[-1].cv3[1][-1], source.model[-1].cv3[1][-1]),
        (model.model[-1].one2one_cv3[0][-1], source.model[-1].one2one_cv3[0][-1]),
        (model.model[-1].proto.semseg[-1], source.model[-1].proto.semseg[-1]),
    ):
        assert torch.equal(mine.weight[[0, 2]], theirs.weight[[2, 0]])


def test_checkpoints_come_back_in_fp32_bit_for_bit(tmp_path: Path):
    model = build("yolov8n.yaml").to(memory_format=torch.channels_last)
    torch.save(as_checkpoint(model, {"imgsz": 96, "data": "x.yaml"}, 4, {"AP": 0.5}), tmp_path / "best.pt")
    loaded, checkpoint = load_detector(str(tmp_path / "best.pt"))
    assert checkpoint["epoch"] == 4
    assert checkpoint["train_args"]["imgsz"] == 96
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
        assert loaded.state_dict()[key].is_contiguous()


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_checkpoint_cannot_run_code(tmp_path: Path):
    torch.save({"model": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="not a checkpoint that can be loaded"):
        load_detector(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(InputError, match="not a checkpoint that can be loaded"):
        load_detector(str(tmp_path / "text.pt"))


class Foreign:
    """A class that neither Ultralytics nor torch has."""


def test_a_checkpoint_with_foreign_classes_needs_trust(tmp_path: Path):
    checkpoint = as_checkpoint(build("yolov8n.yaml"), {}, 0, {})
    torch.save(checkpoint | {"extra": Foreign()}, tmp_path / "foreign.pt")
    with pytest.raises(InputError, match="--trust-checkpoint"):
        load_detector(str(tmp_path / "foreign.pt"))
    loaded, rest = load_detector(str(tmp_path / "foreign.pt"), trust=True)
    assert isinstance(rest["extra"], Foreign)
    assert torch.equal(loaded.model[0].conv.weight, checkpoint["model"].model[0].conv.weight)
    with pytest.raises(InputError, match="--trust-checkpoint"):  # trust holds for one file
        load_detector(str(tmp_path / "foreign.pt"))


def test_models_that_are_not_there(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no checkpoint .*mine\.pt"):
        fetch_weights("mine.pt")
    with pytest.raises(InputError, match=r"no model yolov99n\.yaml"):
        fetch_weights("yolov99n.yaml")
    with pytest.raises(InputError, match="must be an Ultralytics model"):
        fetch_weights("resnet50")


def test_official_weights_are_fetched_by_ultralytics_and_their_absence_is_one_error(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def no_network(name: str) -> str:
        asked.append(name)
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(weights_file, "attempt_download_asset", no_network)
    with pytest.raises(InputError) as error:
        fetch_weights("yolov8n.pt")
    assert asked == ["yolov8n.pt"]
    message = str(error.value)
    assert f"is not in {tmp_path} and could not be downloaded (no network)" in message
    assert "https://github.com/ultralytics/assets/releases" in message
    assert "yolov8n.yaml" in message


def test_other_tasks_are_refused():
    for name, message in (
        ("yolov8n-seg.yaml", r"Segment head, of a segment model; train/segment\.py"),
        ("yolo26n-pose.yaml", r"Pose26 head, of a pose model; train/pose\.py"),
        ("rtdetr-l.yaml", "for YOLO detect, segment and pose models"),
        ("yolov8n-obb.yaml", "for YOLO detect, segment and pose models"),
    ):
        with pytest.raises(InputError, match=message):
            build(name)


def test_image_size_and_stride():
    check_imgsz(640, 32)
    with pytest.raises(InputError, match=r"multiple of the stride 32\. The nearest is 96"):
        check_imgsz(100, 32)
    with pytest.raises(InputError, match="The nearest is 64"):
        check_imgsz(50, 64)


def test_what_cannot_be_compiled_says_why(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "g++")
    with pytest.raises(InputError, match=r"--compile needs a C\+\+ compiler, .*: apt install g\+\+"):
        compile_forward(build("yolov8n.yaml"), CPU, tmp_path)
    for size in ({"rect": True}, {"multi_scale": 0.5}):  # torch compiles a convolution's backward for each size
        assert "--compile goes with batches of one size" in TrainConfig(compile=True, **size).faults()[0]


def test_loss_of_one_process_is_ultralytics_own():
    model = build("yolov8n.yaml").train()
    batch = {
        "img": torch.rand(2, 3, 64, 64),
        "cls": torch.tensor([[0.0], [2.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.3, 0.3]]),
        "batch_idx": torch.tensor([0.0, 1.0]),
    }
    theirs = model(dict(batch))[0]
    model.criterion = build_criterion(model, lambda value: value, ranks=1)
    ours, items = model(dict(batch))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert list(items) == ["box_loss", "cls_loss", "dfl_loss"]
    assert get_cfg().box == model.args.box


@pytest.mark.parametrize(
    "name",
    ["yolov5n.yaml", "yolov8n.yaml", "yolov9t.yaml", "yolov10n.yaml", "yolo11n.yaml", "yolo12n.yaml", "yolo26n.yaml"],
)
def test_every_family_trains_checkpoints_and_detects(name: str, tmp_path: Path):
    model = build(name).train()
    model.criterion = build_criterion(model, lambda value: value, ranks=1)
    batch = {
        "img": torch.rand(2, 3, 64, 64),
        "cls": torch.tensor([[0.0], [2.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.3, 0.3]]),
        "batch_idx": torch.tensor([0.0, 1.0]),
    }
    background = {"img": batch["img"], "cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4)}
    background["batch_idx"] = torch.zeros(0)
    for case in (background, batch):  # a rank's share of a batch may hold no object at all
        model.zero_grad(set_to_none=True)
        losses, items = model.loss(case, model(case["img"]))
        losses.sum().backward()
        without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without  # DDP runs with find_unused_parameters=False; an upgrade of Ultralytics might change that
        assert len(items) == 3
    end_of_epoch(model)
    torch.save(as_checkpoint(model, {"imgsz": 64}, 0, {}), tmp_path / "best.pt")
    again, origin = build_model(TrainConfig(model="best.pt"), str(tmp_path / "best.pt"), Objects(names=NAMES))
    total = len(again.state_dict())
    assert origin == f"{total} of {total} tensors from best.pt"
    loaded, _ = load_detector(str(tmp_path / "best.pt"))
    for end2end in (False, True) if getattr(loaded.model[-1], "one2one_cv2", None) is not None else (False,):
        set_end2end(loaded, end2end, name)
        copy = inference_copy(loaded, CPU, torch.contiguous_format)
        with torch.inference_mode():
            found = detect(copy(batch["img"]), copy, conf=0.0, iou=0.7, max_det=20)
        assert [len(part) for part in found] == [20, 20]


def test_the_two_losses_of_an_end_to_end_model_move_on_each_epoch():
    model = build("yolo26n.yaml")
    model.criterion = build_criterion(model, lambda value: value, ranks=1)
    before = (model.criterion.o2m, model.criterion.o2o)
    end_of_epoch(model)
    assert model.criterion.o2m < before[0]
    assert model.criterion.o2o > before[1]


def test_other_strides_and_channels(tmp_path: Path):
    model, _ = build_model(TrainConfig(), "yolov8n-p6.yaml", Objects(names=NAMES, channels=1))
    assert largest_stride(model) == 64
    assert model.model[0].conv.in_channels == 1


def test_a_segmentation_checkpoint_is_refused(tmp_path: Path):
    from ultralytics.nn.tasks import SegmentationModel

    model = SegmentationModel("yolov8n-seg.yaml", nc=3, verbose=False)
    model.args = {}
    torch.save(as_checkpoint(model, {}, 0, {}), tmp_path / "seg.pt")
    with pytest.raises(InputError, match="ends in a Segment head, of a segment model"):
        load_detector(str(tmp_path / "seg.pt"), task=TASKS["detect"])
    assert type(load_detector(str(tmp_path / "seg.pt"))[0]) is SegmentationModel


def test_frozen_layers_keep_weights_and_statistics():
    model, _ = build_model(TrainConfig(freeze=2), "yolov8n.yaml", Objects(names=NAMES))
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {str(i) for i in range(2, 23)} - {"10", "11", "13", "14", "17", "20"}  # those have no weights
    assert len(frozen_norms(model)) == 2
    model, _ = build_model(TrainConfig(freeze=(0, "22.cv2")), "yolov8n.yaml", Objects(names=NAMES))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad and ".dfl" not in name}
    assert {"model.0.conv.weight", "model.0.bn.weight"} <= frozen
    assert any(name.startswith("model.22.cv2.") for name in frozen)
    assert not any(name.startswith("model.22.cv3.") for name in frozen)


def test_class_weights_are_ultralytics(monkeypatch):
    from types import SimpleNamespace

    import numpy as np
    from ultralytics.models.yolo.detect import DetectionTrainer

    counts = np.array([10.0, 0.0, 40.0], dtype=np.float32)
    model = build("yolov8n.yaml")
    set_class_weights(model, counts, 0.5)
    trainer = SimpleNamespace(args=SimpleNamespace(cls_pw=0.5), model=build("yolov8n.yaml"), device=CPU)
    trainer.get_class_counts = lambda: counts
    trainer.compute_class_weights = lambda c: DetectionTrainer.compute_class_weights(trainer, c)
    DetectionTrainer.set_class_weights(trainer)
    torch.testing.assert_close(model.class_weights, trainer.model.class_weights.float())
