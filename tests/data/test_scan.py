"""What the labels say, and what is left out."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from accelerate import Accelerator
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import img2label_paths

from tests.data.conftest import load
from tests.labels import to_train_on
from train.config.options import TrainConfig
from train.data.files import find_data
from train.data.formats import read_label
from train.data.index import image_ids
from train.data.listing import DataFiles, label_file


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


def data_of(folder: Path, names: str = "[a]") -> DataFiles:
    (folder.parent / f"{folder.name}.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {names}\n")
    return find_data(str(folder.parent / f"{folder.name}.yaml"))


def test_broken_files_are_left_out_with_their_reasons_and_a_read_only_folder_works(tmp_path: Path, accelerator):
    images, labels = tmp_path / "set" / "images", tmp_path / "set" / "labels"
    images.mkdir(parents=True)
    labels.mkdir()
    for name in ("a", "b", "c"):
        cv2.imwrite(str(images / f"{name}.png"), np.full((40, 60, 3), 127, np.uint8))
    (images / "d.jpg").write_bytes(b"not an image")
    (labels / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (labels / "b.txt").write_text("7 0.5 0.5 0.5 0.5\n")
    before = sorted((tmp_path / "set").rglob("*"))
    for folder in (images, labels, tmp_path / "set"):
        folder.chmod(0o555)
    try:
        found = to_train_on(data_of(tmp_path / "set"), TrainConfig(), accelerator)
    finally:
        for folder in (images, labels, tmp_path / "set"):
            folder.chmod(0o755)
    assert [Path(entry.im_file).stem for entry in found] == ["a", "c"]
    assert [len(entry.cls) for entry in found] == [1, 0]
    assert found[0].shape == (40, 60)
    assert "b.txt: line 1 has class 7; there are the classes 0 to 0" in found.faults[0]
    assert f"{images}/d.jpg: not an image of a known format" in found.faults[1]
    assert sorted((tmp_path / "set").rglob("*")) == before  # no cache written
    more = to_train_on(data_of(tmp_path / "set", "[a, b, c, d, e, f, g, h]"), TrainConfig(), accelerator)
    assert [Path(entry.im_file).stem for entry in more] == ["a", "b", "c"]  # of the same index
    assert len(more.faults) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_image_without_read_permission_is_left_out(tmp_path: Path, accelerator: Accelerator):
    (tmp_path / "set" / "images").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "set" / "images" / "a.png"), np.zeros((40, 60, 3), np.uint8))
    (tmp_path / "set" / "images" / "a.png").chmod(0)
    found = to_train_on(data_of(tmp_path / "set"), TrainConfig(), accelerator)
    assert not found
    assert "a.png: not a readable image" in found.faults[0]


def test_image_ids():
    assert image_ids(["x/000139.jpg", "x/000285.jpg"]) == [139, 285]
    assert image_ids(["x/1.jpg", "y/01.jpg"]) == [0, 1]  # not distinct
    assert image_ids(["x/1.jpg", "x/two.jpg"]) == [0, 1]
    assert image_ids(["x/9007199254740993.jpg"]) == [0]  # more than a float64 holds


def test_chosen_classes_and_one_class(shapes: Path, accelerator: Accelerator):
    data = find_data(str(shapes))
    everything = to_train_on(data, TrainConfig(), accelerator)
    chosen = to_train_on(data, TrainConfig(classes=(0, 2)), accelerator)
    one = to_train_on(find_data(str(shapes), single_cls=True), TrainConfig(single_cls=True), accelerator)
    total = np.concatenate([entry.cls for entry in everything])
    assert np.concatenate([entry.cls for entry in chosen]).tolist() == total[total != 1].tolist()
    assert sum(len(entry.boxes) for entry in chosen) == (total != 1).sum()
    assert np.concatenate([entry.cls for entry in one]).tolist() == [0] * len(total)
    for labels in (everything, chosen, one):  # many at a time or one by one
        place, cls, boxes = labels.boxes(np.arange(len(labels)))
        assert place.tolist() == [i for i, entry in enumerate(labels) for _ in entry.cls]
        assert cls.tolist() == [c for entry in labels for c in entry.cls]
        assert boxes.tolist() == [box for entry in labels for box in entry.boxes.tolist()]
        by_class, empty = labels.counts
        assert by_class.tolist() == np.bincount(cls, minlength=len(labels.counts[0])).tolist()
        assert empty == sum(not len(entry.cls) for entry in labels)


def test_polygons_and_keypoints_are_kept(tmp_path: Path, accelerator: Accelerator):
    for kind, text in (
        ("polygons", "0 0.1 0.1 0.4 0.1 0.4 0.3\n1 0.5 0.5 0.75 0.5 0.75 0.75 0.5 0.75\n"),
        ("keypoints", "0 0.5 0.5 0.25 0.25 0.5 0.5 2 0.25 0.75 0\n"),
    ):
        folder = tmp_path / kind
        for part in ("images", "labels"):
            (folder / part).mkdir(parents=True)
        for name in ("a", "b"):
            cv2.imwrite(str(folder / "images" / f"{name}.png"), np.full((40, 60, 3), 127, np.uint8))
        (folder / "labels" / "b.txt").write_text(text)
        data = data_of(folder, "[a, b]\nkpt_shape: [2, 3]" if kind == "keypoints" else "[a, b]")
        empty, entry = to_train_on(data, TrainConfig(), accelerator)
        classes, boxes, points = read_label(text, 2, data.keypoints)
        assert (len(empty.cls), empty.segments, empty.keypoints) == (0, [], ())
        assert (entry.cls.tolist(), entry.boxes.tolist()) == (classes.tolist(), boxes.tolist())
        kept = entry.keypoints if kind == "keypoints" else entry.segments
        assert [p.tolist() for p in kept] == [p.tolist() for p in points]
        assert bool(entry.segments) == (kind == "polygons")
        only = to_train_on(data, TrainConfig(classes=(1,)), accelerator)[1]
        assert len(only.cls) == len(only.segments) + len(only.keypoints) == (kind == "polygons")


@pytest.mark.parametrize(
    ("row", "shape", "reason"),
    [
        ("0.5 0.5 3", (1, 3), "line 1 has a keypoint of visibility 3; it must be 0, 1 or 2"),
        ("0.5 0.5 0.5", (1, 3), "line 1 has a keypoint of visibility 0.5"),
        ("1.5 0.5 1", (1, 3), "line 1 has a coordinate outside 0 to 1"),
        ("0.5 -0.2 2", (1, 3), "line 1 has a coordinate outside 0 to 1"),
        ("1.5 0.5", (1, 2), "line 1 has a coordinate outside 0 to 1"),
        ("7 -3 0", (1, 3), ""),  # not visible: anywhere
        ("-1 -1", (1, 2), ""),  # of two dimensions: not there
    ],
)
def test_keypoints_are_within_the_image_where_they_are_visible(row: str, shape: tuple[int, int], reason: str):
    text = f"0 0.5 0.5 0.2 0.2 {row}"
    if reason:
        with pytest.raises(ValueError, match=reason):
            read_label(text, 1, shape)
    else:
        assert len(read_label(text, 1, shape)[2]) == 1


def test_images_with_boxes_alone_are_none_of_polygons(tmp_path: Path, accelerator: Accelerator):
    for part in ("images", "labels"):
        (tmp_path / "mixed" / part).mkdir(parents=True)
    rows = {"a": "0 0.5 0.5 0.2 0.2\n", "b": "0 0.1 0.1 0.4 0.1 0.4 0.3\n", "c": ""}
    for name, text in rows.items():
        cv2.imwrite(str(tmp_path / "mixed" / "images" / f"{name}.png"), np.full((40, 60, 3), 127, np.uint8))
        (tmp_path / "mixed" / "labels" / f"{name}.txt").write_text(text)
    data = data_of(tmp_path / "mixed", "[a]")
    assert len(to_train_on(data, TrainConfig(), accelerator)) == 3
    labels = to_train_on(data, TrainConfig(), accelerator, "polygons")
    assert [Path(entry.im_file).stem for entry in labels] == ["b", "c"]
    (fault,) = labels.faults
    assert fault == f"{tmp_path}/mixed/labels/a.txt: boxes, without polygons; train/detect.py trains on boxes"


def test_a_key_point_more_or_less_is_named():
    with pytest.raises(ValueError, match=r"line 1 has 8 columns; a box with its keypoints \(kpt_shape\) has 11"):
        read_label("0 0.5 0.5 0.2 0.2 0.5 0.5 1", 1, (2, 3))


def test_label_files_are_where_ultralytics_looks_for_them():
    files = [
        "/a/images/b.jpg",
        "/images/images/x.y/z.png",
        "a/images/c.jpeg",
        "/a/b.c/d.jpg",
        "images/a.jpg",
        "/images/a.b",
    ]
    assert [label_file(file) for file in files] == img2label_paths(files)
