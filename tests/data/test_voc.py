"""Data sets whose labels are Pascal VOC's XML files."""

import json
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from accelerate import Accelerator

from tests.data.test_coco_json import write
from tests.labels import to_train_on, to_validate_on
from train.config.errors import InputError
from train.config.options import EvalConfig, TrainConfig
from train.data import scan
from train.data.files import find_data
from train.data.scan import check_ahead, read_data
from train.data.sets import TrainSet
from train.evaluation.cocofiles import read_truth


def as_xml(boxes: list[tuple[str, list[float]]], width: int, height: int, more: str = "") -> str:
    """An image's XML file."""
    rows = [
        f"<object><name>{name}</name>{more}<bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax>"
        f"<ymax>{y + h}</ymax></bndbox></object>"
        for name, (x, y, w, h) in boxes
    ]
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{''.join(rows)}</annotation>"


def voc_of(coco: Path, folder: Path) -> Path:
    """The data set of COCO's JSON files beside this YAML as VOC has it."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for split in ("train", "val"):
        content = json.loads((coco.parent / f"{split}.json").read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        listed = []
        for image in content["images"]:
            stem = f"{split[0]}{Path(image['file_name']).stem}"
            listed.append(f"{stem}\n")
            marks = [a for a in content["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
            boxes = [(names[a["category_id"]], a["bbox"]) for a in marks]
            (folder / "Annotations" / f"{stem}.xml").write_text(as_xml(boxes, image["width"], image["height"]))
            source = coco.parent / "images" / split / image["file_name"]
            (folder / "JPEGImages" / f"{stem}.png").write_bytes(source.read_bytes())
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(listed))
    return folder


def test_the_same_numbers_are_the_same_labels_samples_and_truth(tmp_path: Path, accelerator: Accelerator):
    text, coco = write(tmp_path, "boxes")
    found = []
    config = TrainConfig(imgsz=64, batch=4)
    for place in (text, voc_of(coco, tmp_path / "voc")):
        data = find_data(str(place))
        labels, val = to_train_on(data, config, accelerator), to_validate_on(data, config, accelerator)
        found.append((labels, data, read_truth(val, data, config, accelerator)))
    (ours, data, truth), (theirs, of_voc, other) = found
    assert of_voc.names == {0: "box", 1: "disc", 2: "wedge"}  # by the alphabet
    order = np.array([next(i for i, name in of_voc.names.items() if name == data.names[k]) for k in range(3)])
    for array in ("sizes", "shapes", "first", "boxes", "usable"):
        assert np.array_equal(ours.source.arrays[array], theirs.source.arrays[array]), array
    assert np.array_equal(order[ours.source.arrays["cls"]], theirs.source.arrays["cls"])
    a, b = (TrainSet(labels, about, config, 32) for labels, about in ((ours, data), (theirs, of_voc)))
    assert all(np.array_equal(a[(0, i, True)]["img"], b[(0, i, True)]["img"]) for i in range(len(a)))
    assert np.array_equal(truth.marks().boxes, other.marks().boxes)
    assert np.array_equal(truth.marks().area, other.marks().area)


def folder_of(tmp_path: Path, text: str) -> Path:
    """A data set of two images, of which the first has this XML file."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / part).mkdir(parents=True, exist_ok=True)
    for stem in ("a", "b"):
        cv2.imwrite(str(tmp_path / "JPEGImages" / f"{stem}.jpg"), np.zeros((32, 64, 3), np.uint8))
        (tmp_path / "Annotations" / f"{stem}.xml").write_text(as_xml([("cat", [8, 4, 16, 8])], 64, 32))
    (tmp_path / "Annotations" / "a.xml").write_text(text)
    for split in ("trainval", "test"):
        (tmp_path / "ImageSets" / "Main" / f"{split}.txt").write_text("b 1\na -1\n")
    return tmp_path


def test_what_an_image_cannot_be_used_for_is_said(tmp_path: Path, accelerator: Accelerator):
    for text, message in (
        ("<annotation>", r"a\.xml: no XML: "),
        (as_xml([("cat", [8, 4, 16, 8])], 64, 32).replace("<xmin>8</xmin>", ""), "object 1 has no whole bndbox"),
        (as_xml([("", [8, 4, 16, 8])], 64, 32), "object 1 has no name"),
        (
            as_xml([("cat", [8, 4, 16, 8])], 64, 32).replace("<xmin>8<", "<xmin>x<"),
            "object 1: bndbox is 'x', not a num",
        ),
        (as_xml([("cat", [8, 4, 16, 8])], 10**12, 32), "width is '1000000000000', not a number of pixels"),
        (as_xml([("cat", [8, 4, 16, 8])], 64, 32).replace(">8<", ">1e400<"), "bndbox is '1e400', not a number of pix"),
        ("<?xml version='1.0' encoding='x-y'?><annotation/>", "no XML: unknown encoding: x-y"),
        (as_xml([("cat", [30, 4, -16, 8])], 64, 32), "object 1 ends before it begins: 30, 4 to 14, 12"),
        (as_xml([("cat", [60, 4, 16, 8])], 64, 32), r"the bbox \[60.0, 4.0, 16.0, 8.0\] .* leaves its image of 64x32"),
        (as_xml([("cat", [8, 4, 16, 8])], 32, 64), "it says 32x64 px of an image that has 64x32"),
    ):
        labels = to_train_on(find_data(str(folder_of(tmp_path, text))), TrainConfig(), accelerator)
        assert [Path(entry.im_file).name for entry in labels] == ["b.jpg"]
        (fault,) = labels.faults
        assert re.search(message, fault), fault
    (tmp_path / "Annotations" / "a.xml").unlink()
    labels = to_train_on(find_data(str(tmp_path)), TrainConfig(), accelerator)
    assert "a.xml: cannot be read (No such file" in labels.faults[0]


def test_a_list_that_cvat_calls_default_is_named(tmp_path: Path):
    lists = folder_of(tmp_path, "") / "ImageSets" / "Main"
    (lists / "test.txt").unlink()
    (lists / "trainval.txt").rename(lists / "default.txt")
    with pytest.raises(InputError, match=r"Main/default\.txt is there: call it train\.txt, and the list"):
        find_data(str(tmp_path))


def test_an_object_that_is_there_twice_counts_once(tmp_path: Path, accelerator: Accelerator):
    boxes = [("cat", [8, 4, 16, 8]), ("cat", [0, 4, 16, 8]), ("cat", [8, 4, 16, 8]), ("dog", [8, 4, 16, 8])]
    data = find_data(str(folder_of(tmp_path, as_xml([(name, [*box]) for name, box in boxes], 64, 32))))
    entry = to_train_on(data, TrainConfig(), accelerator)[0]
    assert [(data.names[int(c)], x) for c, x in zip(entry.cls, entry.boxes[:, 0].tolist(), strict=True)] == [
        ("cat", 0.25), ("cat", 0.125), ("dog", 0.25)
    ]  # fmt: skip


def test_a_start_looks_for_the_data_set_once(tmp_path: Path, accelerator: Accelerator, monkeypatch):
    folder_of(tmp_path, as_xml([("cat", [8, 4, 16, 8])], 64, 32))
    config = TrainConfig(data=str(tmp_path), index_dir=str(tmp_path / "kept"))
    assert check_ahead(config, "train") is None  # nothing has been read before
    data = read_data(config, "boxes", accelerator, print)
    ahead = check_ahead(config, "train")
    assert ahead is not None
    ahead.end()
    asked = []
    monkeypatch.setattr(scan, "find_data", lambda *what, say: (asked.append(what), data)[1])
    assert read_data(config, "boxes", accelerator, print, ahead) == data
    assert not asked
    read_data(replace(config, classes=(0,)), "boxes", accelerator, print, ahead)  # as a resumed run may ask
    assert len(asked) == 1


def test_difficult_objects_and_lists(tmp_path: Path, accelerator: Accelerator):
    text = as_xml([("cat", [8, 4, 16, 8])], 64, 32, "<difficult>1</difficult>")
    data = find_data(str(folder_of(tmp_path, text)))
    assert data.splits.keys() == {"train", "val", "test"}  # of trainval and test
    labels = to_train_on(data, TrainConfig(), accelerator)
    assert [len(entry.cls) for entry in labels] == [0, 1]
    assert not data.annotations("val")
    assert len(to_validate_on(data, EvalConfig(), accelerator)) == 2
    with pytest.raises(InputError, match=r"train/detect\.py trains on boxes"):
        find_data(str(tmp_path), carries="polygons")
    (tmp_path / "ImageSets" / "Main" / "trainval.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"trainval\.txt is not UTF-8 text"):
        find_data(str(tmp_path))
