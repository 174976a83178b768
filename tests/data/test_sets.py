import os
import random
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import YOLODataset

from train.config.errors import InputError
from train.config.options import Augmentation, TrainConfig
from train.data.files import find_data
from train.data.formats import Labels, read_label
from train.data.loaders import Positions
from train.data.scan import image_ids, scan
from train.data.sets import GROUP, TrainSet, ValSet, augmentation
from train.reporting.plots import draw_batch


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def load(yaml: Path, split: str, accelerator: Accelerator) -> tuple[list[Labels], dict[int, str]]:
    data = find_data(str(yaml))
    labels, faults = scan(data.images(split), data.names, TrainConfig(), accelerator)
    assert not faults
    return labels, data.names


# Where the files are
def test_paths_are_relative_to_the_yaml_or_to_the_working_directory(shapes: Path, tmp_path: Path, monkeypatch):
    assert len(find_data(str(shapes)).images("train")) == 40
    monkeypatch.chdir(shapes.parent.parent)
    (tmp_path / "data.yaml").write_text("path: shapes\ntrain: images/train\nval: images/val\nnames: [a, b, c]\n")
    data = find_data(str(tmp_path / "data.yaml"))
    assert len(data.images("val")) == 21
    assert data.names == {0: "a", 1: "b", 2: "c"}


def test_text_lists_and_lists_of_sources(shapes: Path, tmp_path: Path):
    root = shapes.parent
    some = sorted(root.glob("images/train/*.jpg"))[:3]
    (tmp_path / "some.txt").write_text("\n".join(map(str, some)) + "\n")
    (tmp_path / "data.yaml").write_text(
        f"path: {root}\ntrain: [{tmp_path / 'some.txt'}, images/val]\nval: {tmp_path / 'some.txt'}\nnames: [a, b, c]\n"
    )
    data = find_data(str(tmp_path / "data.yaml"))
    assert data.images("val") == [str(file) for file in some]
    assert len(data.images("train")) == 24
    (tmp_path / "some.txt").write_text("\n".join(map(str, [*some, some[0]])))
    assert len(data.images("val")) == 3  # validated once, trained on as often as it is listed
    assert len(data.images("train", repeats=True)) == 25


def test_a_data_set_that_is_not_there_names_the_folders(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}/coco8.*nothing is downloaded"):
        find_data("coco8.yaml")  # Ultralytics' own, with a download script
    with pytest.raises(InputError, match="no such file"):
        find_data("nowhere.yaml")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [a]\nnc: 2\n")
    with pytest.raises(InputError, match="nc: 2 but names 1"):
        find_data("data.yaml")


def test_nothing_in_a_yaml_is_executed(shapes: Path, tmp_path: Path):
    (tmp_path / "data.yaml").write_text(
        f"path: {shapes.parent}\ntrain: images/train\nval: images/val\nnames: [a, b, c]\n"
        f"download: |\n  from pathlib import Path\n  Path('{tmp_path}/ran').touch()\n"
    )
    find_data(str(tmp_path / "data.yaml"))
    (tmp_path / "evil.yaml").write_text("names: !!python/object/apply:os.system ['touch ran']\n")
    with pytest.raises(InputError, match="is not YAML"):
        find_data(str(tmp_path / "evil.yaml"))
    assert not (tmp_path / "ran").exists()


def test_forms_that_ultralytics_takes(shapes: Path, tmp_path: Path):
    for kind in ("images", "labels"):  # as Roboflow exports: ../ although the folder is beside the YAML; linked folders
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / kind).symlink_to(shapes.parent / kind / "train")
    (tmp_path / "data.yaml").write_text("train: ../train/images\nvalidation: ../train/images\nnc: 3\n")
    data = find_data(str(tmp_path / "data.yaml"))
    assert data.names == {0: "class_0", 1: "class_1", 2: "class_2"}
    assert len(data.images("train")) == len(data.images("val")) == 40
    assert len(data.images("train", 0.25)) == 10
    assert len(data.images("train", 7)) == 7
    assert find_data(str(tmp_path / "data.yaml"), single_cls=True).names == {0: "item"}


# What the labels say
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0 0.5 0.5 0.2", "line 1 has 4 columns"),
        ("0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2 0.1", "line 2 has 6 columns"),
        ("3 0.5 0.5 0.2 0.2", "line 1 has class 3; there are the classes 0 to 2"),
        ("-1 0.5 0.5 0.2 0.2", "line 1 has class -1"),
        ("0.5 0.5 0.5 0.2 0.2", "line 1 has class 0.5"),
        ("\n0 0.5 1.5 0.2 0.2", "line 2 has a coordinate outside 0 to 1"),
        ("0 nan 0.5 0.2 0.2", "not finite"),
        ("cat 0.5 0.5 0.2 0.2", "line 1 is not numbers"),
        ("0 0.5 0.5 0.2 0.2\n0 0.1 0.1 0.2 0.1 0.2 0.2", "mixes boxes and polygons"),
    ],
)
def test_bad_labels_say_the_line(text: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        read_label(text, 3)


def test_labels_are_read_as_ultralytics_reads_them(shapes: Path, accelerator: Accelerator):
    labels, names = load(shapes, "train", accelerator)
    theirs = YOLODataset(str(shapes.parent / "images" / "train"), data={"names": names}, augment=False, hyp=get_cfg())
    (shapes.parent / "labels" / "train.cache").unlink()  # theirs, not ours
    assert [entry.im_file for entry in labels] == theirs.im_files
    for entry, label in zip(labels, theirs.labels, strict=True):
        assert entry.shape == label["shape"]
        # they sort rows where they drop duplicates; these files have none
        np.testing.assert_array_equal(entry.cls.astype(np.float32), label["cls"].ravel())
        np.testing.assert_array_equal(entry.boxes.astype(np.float32), label["bboxes"])


def test_duplicates_count_once_and_empty_files_are_background():
    classes, boxes, _ = read_label("1 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2\n", 2)
    assert classes.tolist() == [1, 0]
    assert boxes.shape == (2, 4)
    classes, boxes, polygons = read_label("", 2)
    assert (classes.shape, boxes.shape, polygons) == ((0,), (0, 4), [])


def test_broken_files_are_left_out_with_their_reasons_and_a_read_only_folder_works(tmp_path: Path, accelerator):
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    for name in ("a", "b", "c"):
        cv2.imwrite(str(images / f"{name}.png"), np.full((40, 60, 3), 127, np.uint8))
    (images / "d.jpg").write_bytes(b"not an image")
    (labels / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (labels / "b.txt").write_text("7 0.5 0.5 0.5 0.5\n")
    before = sorted(tmp_path.rglob("*"))
    for folder in (images, labels, tmp_path):
        folder.chmod(0o555)
    try:
        found, faults = scan(sorted(map(str, images.iterdir())), {0: "a"}, TrainConfig(), accelerator)
    finally:
        for folder in (images, labels, tmp_path):
            folder.chmod(0o755)
    assert [Path(entry.im_file).stem for entry in found] == ["a", "c"]
    assert [len(entry.cls) for entry in found] == [1, 0]
    assert found[0].shape == (40, 60)
    assert "b.txt: line 1 has class 7" in faults[0]
    assert "d.jpg: not an image of a known format" in faults[1]
    assert sorted(tmp_path.rglob("*")) == before  # no cache written


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_image_without_read_permission_is_left_out(tmp_path: Path, accelerator: Accelerator):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 60, 3), np.uint8))
    (tmp_path / "a.png").chmod(0)
    found, faults = scan([str(tmp_path / "a.png")], {0: "a"}, TrainConfig(), accelerator)
    assert not found
    assert "a.png: not a readable image" in faults[0]


def test_image_ids():
    assert image_ids(["x/000139.jpg", "x/000285.jpg"]) == [139, 285]
    assert image_ids(["x/1.jpg", "y/01.jpg"]) == [0, 1]  # not distinct
    assert image_ids(["x/1.jpg", "x/two.jpg"]) == [0, 1]
    assert image_ids(["x/9007199254740993.jpg"]) == [0]  # more than a float64 holds


# Order and augmentation
@pytest.fixture(scope="module")
def train_set(shapes: Path, accelerator: Accelerator) -> TrainSet:
    labels, names = load(shapes, "train", accelerator)
    config = TrainConfig(imgsz=64, batch=16, epochs=3, close_mosaic=1, mixup=0.3, cutmix=0.3, seed=5)
    return TrainSet(labels, names, 3, config)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("img", "cls", "bboxes")) and a["im_file"] == b["im_file"]


def test_a_sample_follows_from_seed_epoch_and_position_alone(train_set: TrainSet, shapes: Path, accelerator):
    together = train_set.__getitems__([(0, p) for p in range(16)])
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    labels, names = load(shapes, "train", accelerator)
    other = TrainSet(labels, names, 3, train_set.config)
    backwards = {p: other.__getitems__([(1, 3), (0, p)])[1] for p in reversed(range(16))}  # other neighbours, order
    assert all(same(together[p], backwards[p]) for p in range(16))
    assert not same(together[0], train_set[(1, 0)])


def test_every_image_once_an_epoch_and_another_order_in_each(train_set: TrainSet):
    first, second = train_set.order(0).tolist(), train_set.order(1).tolist()
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second


def test_a_set_smaller_than_the_batch_is_repeated(shapes: Path, accelerator: Accelerator):
    labels, names = load(shapes, "train", accelerator)
    small = TrainSet(labels[:3], names, 3, TrainConfig(imgsz=64, batch=8))
    order = small.order(0)
    assert len(order) == 8
    assert set(order.tolist()) == {0, 1, 2}


def test_mosaic_partners_come_from_the_aligned_group(train_set: TrainSet):
    order = train_set.order(0)
    assert GROUP == 16
    assert train_set.group(0, 17).tolist() == order[16:32].tolist()
    assert train_set.group(0, 39).tolist() == order[24:40].tolist()  # the last group is full too
    loaded: set[int] = set()
    for position in range(16, 32):
        train_set.__getitems__([(0, position)])
        loaded |= set(train_set._decoded)
    assert loaded <= set(order[16:32].tolist())
    assert len(loaded) > 8


def test_every_augmentation_option_reaches_ultralytics():
    changed = {"copy_paste_mode": "mixup", "degrees": 7.0, "bgr": 0.5, "cutmix": 0.25}
    hyp = augmentation(TrainConfig(**changed))
    for field in fields(Augmentation):
        assert getattr(hyp, field.name) == changed.get(field.name, field.default)


def test_a_batch_of_whole_groups_decodes_each_image_once(train_set: TrainSet):
    train_set.__getitems__([(0, p) for p in range(16)])
    assert len(train_set._decoded) == 16


def test_the_last_epochs_have_no_mosaic(train_set: TrainSet):
    train_set.__getitems__([(1, 0)])
    assert len(train_set._decoded) > 1
    train_set.__getitems__([(2, 0)])  # close_mosaic=1 of 3 epochs
    assert len(train_set._decoded) == 1


def test_the_ranks_shares_make_up_the_batch():
    whole = list(Positions(batches=3, batch=8, ranks=1))
    halves = list(Positions(batches=3, batch=8, ranks=2))
    assert not hasattr(Positions(1, 1, 1), "batch_size")  # Accelerate would drop batches
    assert [a + b for a, b in zip(halves[0::2], halves[1::2], strict=True)] == whole


def test_chosen_classes_and_one_class(shapes: Path, accelerator: Accelerator):
    data = find_data(str(shapes))
    files = data.images("train")
    everything, _ = scan(files, data.names, TrainConfig(), accelerator)
    chosen, _ = scan(files, data.names, TrainConfig(classes=(0, 2)), accelerator)
    one, _ = scan(files, {0: "item"}, TrainConfig(single_cls=True), accelerator)
    total = np.concatenate([entry.cls for entry in everything])
    assert np.concatenate([entry.cls for entry in chosen]).tolist() == total[total != 1].tolist()
    assert sum(len(entry.boxes) for entry in chosen) == (total != 1).sum()
    assert np.concatenate([entry.cls for entry in one]).tolist() == [0] * len(total)


def test_rect_batches_have_one_shape_and_little_padding(shapes: Path, accelerator: Accelerator):
    labels, names = load(shapes, "train", accelerator)
    dataset = TrainSet(labels, names, 3, TrainConfig(imgsz=160, batch=8, rect=True, epochs=3, close_mosaic=0))
    shapes_seen = set()
    for epoch in range(2):
        order = dataset.order(epoch)
        assert len(set(order.tolist())) == len(order) == 40
        for batch in range(5):
            samples = dataset.__getitems__([(epoch, batch * 8 + p) for p in range(8)])
            assert len({sample["img"].shape for sample in samples}) == 1
            shapes_seen.add(tuple(samples[0]["img"].shape[1:]))
            assert len(dataset._decoded) == 8  # no mosaic
    assert len(shapes_seen) > 1
    assert max(max(shape) for shape in shapes_seen) == 160
    assert dataset.order(0).tolist() != dataset.order(1).tolist()


def test_images_of_a_user_are_not_touched(shapes: Path, tmp_path: Path, accelerator: Accelerator):
    source = next(shapes.parent.glob("images/train/*.jpg"))
    (tmp_path / "a.jpg").write_bytes(source.read_bytes())
    (tmp_path / "a.npy").write_bytes(b"not for Ultralytics to load, rewrite or remove")
    labels, _ = scan([str(tmp_path / "a.jpg")], {0: "a"}, TrainConfig(), accelerator)
    TrainSet(labels, {0: "a"}, 3, TrainConfig(imgsz=64, batch=1))[(0, 0)]
    assert (tmp_path / "a.npy").read_bytes().startswith(b"not for Ultralytics")


def test_albumentations_are_seeded_by_the_sample(train_set: TrainSet, monkeypatch):
    seeds = []

    class Spy:
        """Stands where Ultralytics applies Albumentations, which it seeds from torch's initial seed."""

        def __call__(self, labels: dict) -> dict:
            seeds.append(torch.initial_seed())
            return labels

    monkeypatch.setattr(train_set.transforms, "transforms", [Spy(), *train_set.transforms.transforms])
    train_set.__getitems__([(0, 1), (0, 2)])
    train_set.__getitems__([(0, 2)])
    assert seeds[0] != seeds[1] == seeds[2]


# Validation
def test_validation_shapes_are_ultralytics_at_batch_1(shapes: Path, accelerator: Accelerator):
    labels, names = load(shapes, "val", accelerator)
    dataset = ValSet(labels, names, 3, imgsz=128, stride=32)
    theirs = YOLODataset(
        str(shapes.parent / "images" / "val"), data={"names": names}, augment=False, hyp=get_cfg(), imgsz=128,
        rect=True, batch_size=1, stride=32, pad=0.5,
    )  # fmt: skip
    (shapes.parent / "labels" / "val.cache").unlink()
    expected = {theirs.im_files[i]: theirs[i]["img"] for i in range(len(theirs))}
    for batch in (1, 4, 100):
        batches = dataset.batches(batch)
        assert sorted(i for part in batches for i in part) == list(range(21))
        assert max(map(len, batches)) <= batch
        for part in batches:
            images = [dataset[i] for i in part]
            assert len({image["img"].shape for image in images}) == 1
            assert all(torch.equal(image["img"], expected[image["im_file"]]) for image in images)
    costs = [len(part) * dataset[part[0]]["img"].numel() for part in dataset.batches(4)]
    assert costs == sorted(costs, reverse=True)


def test_the_users_settings_stay_as_they_are():
    assert not Path(os.environ["YOLO_CONFIG_DIR"]).is_relative_to(Path.home())


def test_drawing_a_batch_leaves_it_as_it_is(tmp_path: Path):
    torch.manual_seed(0)
    batch = {"img": torch.rand(2, 3, 64, 64), "cls": torch.zeros(3, 1), "bboxes": torch.rand(3, 4) / 2 + 0.2}
    batch |= {"batch_idx": torch.tensor([0.0, 0, 1])}
    before = {name: tensor.clone() for name, tensor in batch.items()}
    draw_batch(batch | {"im_file": ["a.jpg", "b.jpg"]}, {0: "circle"}, tmp_path / "batch.jpg")
    assert cv2.imread(str(tmp_path / "batch.jpg")) is not None
    assert all(torch.equal(batch[name], before[name]) for name in before)
