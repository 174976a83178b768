"""What the labels say, and what is left out."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from accelerate import Accelerator
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import YOLODataset

from tests.data.conftest import load
from train.config.options import TrainConfig
from train.data.files import find_data
from train.data.formats import read_label
from train.data.scan import image_ids, scan


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
