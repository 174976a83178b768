"""The check of a data set: each planted fault is found where it is, none in a clean one, and a copy is without."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from polars import read_parquet_schema

from tests.conftest import ROOT, launch
from tests.data.test_huggingface import write_parquet
from tests.data.test_voc import as_xml
from train import check_data
from train.check_data import Options
from train.data import coco_findings, looks
from train.data.coco_findings import of_annotations
from train.data.findings import Finding
from train.data.label_findings import label_faults

HIGH, WIDE = 240, 320
SPLITS = ("train", "val")
LABEL = "0 0.3 0.3 0.2 0.2\n1 0.6 0.6 0.3 0.3\n"
BOXES = [("cat", [32, 48, 64, 48]), ("dog", [144, 108, 96, 72])]


def photo(seed: int) -> np.ndarray:
    """A picture with as much in it at each scale as a photograph has, unlike that of another seed."""
    rng = np.random.default_rng(seed)
    scales = [rng.random((6 * 2**k, 8 * 2**k, 3)) / (k + 1) for k in range(4)]
    whole = sum(cv2.resize(one, (WIDE, HIGH), interpolation=cv2.INTER_CUBIC) for one in scales)
    return cv2.normalize(whole, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def clean(folder: Path) -> Path:
    """A data YAML of six images to train on and four to validate on."""
    for split, seeds in (("train", range(6)), ("val", range(10, 14))):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for seed in seeds:
            cv2.imwrite(str(folder / "images" / split / f"{seed}.jpg"), photo(seed))
            (folder / "labels" / split / f"{seed}.txt").write_text(LABEL)
    file = folder / "data.yaml"
    file.write_text("path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n")
    return file


def check(data: object, tmp_path: Path, capsys: pytest.CaptureFixture[str], **options: object) -> tuple[int, dict]:
    """The exit code, and the JSON."""
    capsys.readouterr()
    number = len([*tmp_path.glob("out*")])
    code = check_data.main(Options(data=str(data), json=True, save_dir=str(tmp_path / f"out{number}"), **options))
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def drawn_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time; two tests look at them."""
    if "clean" not in request.node.name and "exit" not in request.node.name:
        monkeypatch.setattr(check_data, "draw", lambda *_: None)


def kinds(report: dict) -> set[tuple[str, str, str]]:
    """Kind, file and place of what was found."""
    return {(one["kind"], Path(one["file"]).name, one["where"]) for one in report["findings"]}


def plant(file: Path) -> set[tuple[str, str, str]]:
    """Put a fault of each kind into a clean data set; what is to be found."""
    images, labels = file.parent / "images", file.parent / "labels"
    whole = (images / "train" / "0.jpg").read_bytes()
    for number in range(20, 42):
        cv2.imwrite(str(images / "train" / f"{number}.jpg"), photo(number))
        (labels / "train" / f"{number}.txt").write_text(LABEL)
    found = set()

    def label(number: int, text: str | bytes, kind: str, where: str = "line 3") -> None:
        place = labels / "train" / f"{number}.txt"
        place.write_bytes(text if isinstance(text, bytes) else (LABEL + text).encode())
        found.add((kind, place.name, where))

    label(20, "7 0.5 0.5 0.1 0.1\n", "class out of range")
    label(21, "0 0.5 1.2 0.1 0.1\n", "coordinate outside the image")
    label(22, "0 0.5 0.5 -0.1 0.1\n", "negative size")
    label(23, "0 0.5 0.5 0 0.1\n", "box of no size")
    label(41, "0 0.95 0.5 0.4 0.2\n", "box over the edge")
    label(24, "0 0.3 0.3 0.2 0.2\n", "duplicate box")
    label(25, "0 0.1 0.1 0.3 0.1 0.3 0.3\n", "boxes and polygons mixed", "")
    label(26, "0 0.5 0.5 x 0.1\n", "labels that cannot be read")
    label(27, "\n0 0.5 0.5\n", "labels that cannot be read", "line 4")
    label(28, LABEL.encode("utf-16"), "not UTF-8", "")
    label(29, "0 0.3001 0.3001 0.2 0.2\n", "duplicate box", "")
    found -= {("duplicate box", "29.txt", "")}
    found |= {("duplicate box", "29.jpg", "")}  # which of two that are nearly equal, nobody knows
    label(30, "0 0.5 0.5 0.002 0.1\n", "tiny box", "")
    found -= {("tiny box", "30.txt", "")}
    found |= {("tiny box", "30.jpg", "")}
    (images / "train" / "31.jpg").write_bytes(whole[: len(whole) // 2])
    found.add(("image that cannot be read", "31.jpg", ""))
    (images / "train" / "32.jpg").write_bytes(b"no image at all")
    found.add(("image that cannot be read", "32.jpg", ""))
    cv2.imwrite(str(images / "train" / "33.png"), photo(33))
    shutil.move(images / "train" / "33.png", images / "train" / "33.jpg")
    found.add(("wrong extension", "33.jpg", ""))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(photo(34)).save(images / "train" / "34.jpg", exif=turned)
    found.add(("image turned by EXIF", "34.jpg", ""))
    (labels / "train" / "35.txt").unlink()
    found.add(("image without label", "35.jpg", ""))
    (labels / "train" / "ghost.txt").write_text(LABEL)
    found.add(("label without image", "ghost.txt", ""))
    (images / "train" / "photo.jfif").write_bytes(whole)
    found.add(("wrong extension", "photo.jfif", ""))
    (labels / "train" / "classes.txt").write_text("dog\ncat\n")
    found.add(("names that do not match", "classes.txt", ""))
    shutil.copy(images / "train" / "1.jpg", images / "train" / "36.jpg")
    found.add(("duplicate image", "36.jpg", ""))
    small = cv2.resize(photo(2), (WIDE // 2, HIGH // 2))
    cv2.imwrite(str(images / "train" / "37.jpg"), small, [cv2.IMWRITE_JPEG_QUALITY, 50])
    found.add(("duplicate image", "37.jpg", ""))
    for number, source in ((14, "3.jpg"), (15, "4.jpg")):
        (labels / "val" / f"{number}.txt").write_text(LABEL)
        shutil.copy(images / "train" / source, images / "val" / f"{number}.jpg")
        found.add(("image in two splits", f"{number}.jpg", ""))
    cv2.imwrite(str(images / "val" / "15.jpg"), cv2.resize(photo(4), (WIDE // 2, HIGH // 2)))
    for number, crop in ((38, photo(5)[:180, :240]), (39, photo(5)[60:, 80:])):  # two crops of a photo are none
        cv2.imwrite(str(images / "train" / f"{number}.jpg"), crop)
    (labels / "train" / "40.txt").write_text("2 0.5 0.5 0.2 0.2\n")
    (labels / "val" / "10.txt").write_text("3 0.5 0.5 0.2 0.2\n")
    text = file.read_text().replace("[cat, dog]", "[cat, dog, cow, hen, fox]")
    file.write_text(text)
    found |= {("class in one split only", "data.yaml", ""), ("class without training", "data.yaml", "")}
    found |= {("class without a box", "data.yaml", "")}
    return found


def tree(folder: Path) -> dict[str, str]:
    """All files below a folder, by a hash."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_clean_data_set_has_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, report = check(clean(tmp_path / "data"), tmp_path, capsys)
    assert (code, report["findings"]) == (0, [])
    train = report["splits"]["train"]
    assert (train["images"], train["boxes"], train["empty"]) == (6, 12, 0)
    assert train["width"] == [WIDE, WIDE, WIDE]
    assert train["medium"] == 12  # 64 by 48 and 96 by 72 px
    assert report["classes"]["dog"] == {"train": {"boxes": 6, "images": 6}, "val": {"boxes": 4, "images": 4}}
    names = {file.name for file in (tmp_path / "out0").iterdir()}
    pictures = {f"{what}_{split}.{end}" for what, end in (("labels", "png"), ("samples", "jpg")) for split in SPLITS}
    assert names == {"findings.txt", *pictures}


def test_the_built_in_shapes_have_no_fault(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, report = check(shapes, tmp_path, capsys)
    assert code == 0
    assert {one["level"] for one in report["findings"]} <= {"note"}


def test_every_planted_fault_is_found_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = clean(tmp_path / "data")
    planted = plant(file)
    before = tree(file.parent)
    code, report = check(file, tmp_path, capsys, fix=str(tmp_path / "mended"))
    assert code == 1
    assert kinds(report) == planted
    said = {(Path(one["file"]).name, one["where"]): one["what"] for one in report["findings"]}
    assert "the classes 0 to 4" in said["20.txt", "line 3"]
    assert said["24.txt", "line 3"] == "it is line 1 again, and counts once"
    assert "line 1 is a box, line 3 a polygon" in said["25.txt", ""]
    assert said["33.jpg", ""] == "it is a PNG file"
    assert "1.jpg again, byte for byte" in said["36.jpg", ""]
    assert "2.jpg again, by all that 48 x 48 px show" in said["37.jpg", ""]
    listed = (tmp_path / "out0" / "findings.txt").read_text()
    assert len(listed.splitlines()) == len(report["findings"])
    assert "labels/train/20.txt:3: has class 7" in listed
    assert tree(file.parent) == before  # nothing was written to it

    code, report = check(tmp_path / "mended", tmp_path, capsys)
    left = {(kind, name) for kind, name, _ in kinds(report)}
    assert code == 0
    assert left == {
        ("image turned by EXIF", "34.jpg"),
        ("image without label", "35.jpg"),
        ("tiny box", "30.jpg"),
        ("class in one split only", "data.yaml"),
        ("class without training", "data.yaml"),
        ("class without a box", "data.yaml"),
    }
    kept = tmp_path / "mended" / "labels" / "train"
    assert (kept / "20.txt").read_text() == LABEL
    assert (kept / "21.txt").read_text() == LABEL
    assert (kept / "28.txt").read_text() == LABEL
    assert len((kept / "25.txt").read_text().splitlines()) == 3
    assert (tmp_path / "mended" / "images" / "train" / "33.png").exists()
    assert not (tmp_path / "mended" / "images" / "train" / "37.jpg").exists()


def test_a_copy_lies_over_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = clean(tmp_path / "data")
    for place, words in ((tmp_path / "data", "there already"), (tmp_path / "data" / "copy", "in the data set")):
        with pytest.raises(check_data.InputError, match=words):
            check(file, tmp_path, capsys, fix=str(place))
    assert not [*tmp_path.glob("data/copy*")]


def test_a_validation_set_that_is_the_training_set_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = clean(tmp_path / "data")
    file.write_text(file.read_text().replace("images/val", "images/train"))
    (file.parent / "labels" / "train" / "5.txt").unlink()
    _, report = check(file, tmp_path, capsys)
    without, same = report["findings"]
    assert (without["kind"], without["split"]) == ("image without label", "train")
    assert (same["kind"], same["what"]) == ("image in two splits", "val: it has the same 6 images as train")


def test_images_are_looked_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    file = clean(tmp_path / "data")
    kept = str(tmp_path / "kept")
    _, first = check(file, tmp_path, capsys, index_dir=kept)
    seen: list[str] = []
    monkeypatch.setattr(looks, "_look", lambda file, look=looks._look: (seen.append(file), look(file))[1])
    files = [*Path(kept).glob("*.looks*")]
    for one in files:
        os.utime(one, (1, 1))
    _, second = check(file, tmp_path, capsys, index_dir=kept)
    assert seen == []
    assert first == second
    assert min(one.stat().st_mtime for one in files) > 1  # used today
    cv2.imwrite(str(file.parent / "images" / "train" / "5.jpg"), photo(0))  # another picture
    _, third = check(file, tmp_path, capsys, index_dir=kept)
    assert len(seen) == 6
    assert kinds(third) == {("duplicate image", "5.jpg", "")}


def test_copies_are_found_and_crops_are_none():
    photos = [photo(seed) for seed in range(24)]
    others = [cv2.resize(one, (WIDE // 2, HIGH // 2), interpolation=cv2.INTER_AREA) for one in photos]
    crops = [part for one in photos for part in (one[:200, :270], one[40:, 50:])]
    marks = []
    for picture, quality in [(p, 95) for p in photos] + [(p, 50) for p in others] + [(p, 95) for p in crops]:
        _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
        marks.append(looks._seen(data.tobytes())[1])
    of = looks._first_near(np.array(marks), lambda a, b: True)
    assert of[:24].tolist() == [-1] * 24
    assert of[24:48].tolist() == [*range(24)]
    assert of[48:].tolist() == [-1] * 48


def test_frames_of_one_camera_and_plain_images_are_no_copies(tmp_path: Path):
    frames = []
    for i in range(6):
        frames.append(photo(999))
        cv2.rectangle(frames[-1], (10 + 45 * i, 120), (26 + 45 * i, 136), (0, 0, 255), -1)
    half = cv2.resize(frames[3], (WIDE // 2, HIGH // 2), interpolation=cv2.INTER_AREA)
    plain = [np.full((HIGH, WIDE, 3), level, np.uint8) for level in (60, 120, 122, 250)]
    files = [str(tmp_path / f"{i}.jpg") for i in range(11)]
    for file, picture in zip(files, [*frames, half, *plain], strict=True):
        cv2.imwrite(file, picture, [cv2.IMWRITE_JPEG_QUALITY, 50])
    seen = [looks._look(file) for file in files]
    arrays = {name: np.array([one[i] for one in seen], np.uint8) for i, name in enumerate(("bytes", "marks"))}
    none = np.zeros(0, np.uint8)
    of, exact = looks.copies([looks.Looks(arrays | {"formats": none, "turned": none, "told": none})], files.__getitem__)
    assert [*of] == [-1] * 6 + [3] + [-1] * 4
    assert not exact.any()
    assert not arrays["marks"][7:].any()
    assert (looks._first_near(arrays["marks"][:6], lambda a, b: True)[1:] >= 0).any()  # by their hashes they are


def test_label_faults_are_told_line_by_line():
    text = "9 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1 0.1\n0 2 0.5 0.1 0.1\nhello\n"
    told = label_faults(text, 2, ())
    assert [(kind, where) for kind, where, _ in told] == [
        ("class out of range", "line 1"),
        ("coordinate outside the image", "line 3"),
        ("labels that cannot be read", "line 4"),
    ]


def coco_of(folder: Path) -> Path:
    """The clean data set in Roboflow's COCO form."""
    for split, seeds in (("train", range(6)), ("valid", range(10, 14))):
        (folder / split).mkdir(parents=True)
        images = [{"id": s, "file_name": f"{s}.jpg", "height": HIGH, "width": WIDE} for s in seeds]
        for seed in seeds:
            cv2.imwrite(str(folder / split / f"{seed}.jpg"), photo(seed))
        annotations = [
            {"id": 2 * s + k, "image_id": s, "category_id": k + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for s in seeds for k, (_, box) in enumerate(BOXES)
        ]  # fmt: skip
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        content = {"info": {"year": 2026}, "images": images, "annotations": annotations, "categories": categories}
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def test_a_data_set_in_cocos_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = coco_of(tmp_path / "data")
    assert check(folder, tmp_path, capsys)[1]["findings"] == []
    file = folder / "train" / "_annotations.coco.json"
    content = json.loads(file.read_text())
    content["annotations"] += [
        {"id": 100, "image_id": 0, "category_id": 1, "bbox": [5, 5, 0, 9], "area": 0, "iscrowd": 0},
        {"id": 101, "image_id": 1, "category_id": 1, "bbox": [300, 200, 80, 90], "area": 7200, "iscrowd": 0},
        {"id": 102, "image_id": 2, "category_id": 1, "bbox": [32, 48, 64, 48], "area": 3072, "iscrowd": 0},
    ]
    file.write_text(json.dumps(content))
    shutil.copy(folder / "train" / "3.jpg", folder / "train" / "extra.jpg")
    for place in (folder / "train" / "deep" / "er", folder / "train" / ".hidden"):
        place.mkdir(parents=True)
        cv2.imwrite(str(place / "unlisted.jpg"), photo(40))
    (folder / "train" / "deep" / "tool.py").write_text("")  # is nobody's image
    shutil.copy(folder / "train" / "4.jpg", folder / "valid" / "10.jpg")
    before = tree(folder)
    code, report = check(folder, tmp_path, capsys, fix=str(tmp_path / "mended"))
    assert code == 1
    name = file.name
    assert kinds(report) == {
        ("box of no size", name, "annotation 100"),
        ("coordinate outside the image", name, "annotation 101"),
        ("duplicate box", name, "annotation 4"),
        ("duplicate box", name, "annotation 102"),
        ("image without label", "extra.jpg", ""),
        ("image without label", "unlisted.jpg", ""),
        ("image in two splits", "10.jpg", ""),
    }
    assert tree(folder) == before
    code, report = check(tmp_path / "mended", tmp_path, capsys)
    assert (code, report["findings"]) == (0, [])
    kept = json.loads((tmp_path / "mended" / "train" / name).read_text())
    assert kept["info"] == {"year": 2026}
    assert {one["id"]: one["bbox"] for one in kept["annotations"]}[101] == [300, 200, 20, 40]
    assert len(kept["annotations"]) == 13


BOX = [30, 40, 60, 50]
ANNOTATION = {"id": 1, "image_id": 0, "category_id": 1, "bbox": BOX, "area": 3000, "iscrowd": 0}


def told(tmp_path: Path, *changes: dict | None, **parts: object) -> list[tuple[str, str]]:
    """Kind and place of what is said of a file of an image of 320 by 240 px and such annotations."""
    annotations = [ANNOTATION | {"id": number} | (one or {}) for number, one in enumerate(changes, 1)]
    annotations = [{key: value for key, value in one.items() if value != "none"} for one in annotations]
    image = {"id": 0, "file_name": "a.jpg", "width": WIDE, "height": HIGH}
    content = {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]} | parts
    (tmp_path / "a.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return [(one.kind, one.where) for one in of_annotations("train", str(tmp_path / "a.json"))]


def test_a_box_of_coco_may_leave_its_image_as_far_as_the_reader_lets_it(tmp_path: Path):
    edges = [-1e-9, 40, 60, 50], [100.0, 150, 220.3, 90], [300, 90, 30, 50], [300, 60, 80, 50]
    said = told(tmp_path, *({"bbox": box} for box in edges))
    assert said == [("box over the edge", "annotation 3"), ("coordinate outside the image", "annotation 4")]


def test_a_file_of_coco_needs_no_ids_and_none_that_are_numbers(tmp_path: Path):
    far = {"bbox": [200, 100, 60, 50]}
    assert told(tmp_path, {"id": "none"}, {"id": "none"} | far) == [("annotations without ids", "")]
    assert told(tmp_path, {}, {"id": 1} | far) == [("id that is there twice", "entry 2 of `annotations`")]
    images = [{"id": "0", "file_name": "a.jpg", "width": WIDE, "height": HIGH}]
    said = told(tmp_path, {"image_id": "0"}, {"image_id": "0", "bbox": [5, 5, 0, 9]}, images=images)
    assert said == [("box of no size", "annotation 2")]


def test_boxes_of_coco_that_are_none_are_told_each_and_crowds_lie_where_they_will(tmp_path: Path):
    said = told(tmp_path, {"bbox": [50, 50, -20, 10]}, {"bbox": [1, 2, 3]}, {"bbox": None}, {"iscrowd": 1}, None)
    unreadable = [("labels that cannot be read", f"annotation {number}") for number in (2, 3)]
    assert said == [("negative size", "annotation 1"), *unreadable]
    twice = [("duplicate box", f"annotation {number}") for number in (1, 2)]
    assert told(tmp_path, None, None) == twice
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_findings, "hotcoco", None)
        assert told(tmp_path, None, None, {"bbox": [30, 40, 60, 50.1]}) == twice
    assert told(tmp_path, None, categories=None) == []  # the reader says so
    assert told(tmp_path, None, images=[{"id": 0, "file_name": "a.jpg", "width": 10**400, "height": HIGH}]) == []


def test_masks_and_keypoints_that_are_none_are_told(tmp_path: Path):
    whole, far = {"segmentation": [[30, 40, 90, 40, 90, 90]]}, {"bbox": [200, 100, 60, 50]}
    runs = {"size": [HIGH, WIDE], "counts": [5, HIGH * WIDE - 5]}
    (masks,) = {kind for kind, _ in told(tmp_path, whole, {"segmentation": []} | far)}
    assert masks == "segmentation that is none"
    for wrong in ([[1, 2, 3]], {**runs, "counts": [5]}, "none"):
        assert told(tmp_path, whole, {"segmentation": wrong} | far) == [(masks, "annotation 2")]
    assert told(tmp_path, whole, {"segmentation": runs} | far) == []
    assert told(tmp_path, {"segmentation": []}, {"segmentation": []} | far) == []  # boxes alone, by Roboflow
    points = [40, 50, 2, 60, 70, 1]
    for wrong in (points[:5], points[:3], [*points[:5], "x"]):
        others = {"keypoints": points}, {"keypoints": points, "bbox": [1, 1, 5, 5]}
        said = told(tmp_path, others[0], {"keypoints": wrong} | far, others[1])
        assert said == [("keypoints that are none", "annotation 2")]


def test_no_name_leads_out_of_the_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = coco_of(tmp_path / "data")
    file = folder / "train" / "_annotations.coco.json"
    shutil.move(folder / "train" / "0.jpg", tmp_path / "0.jpg")
    file.write_text(file.read_text().replace('"0.jpg"', '"../../0.jpg"'))
    with pytest.raises(check_data.InputError, match="outside the folder of its split"):
        check(folder, tmp_path, capsys, fix=str(tmp_path / "mended"))
    assert {one.name for one in tmp_path.iterdir()} == {"data", "0.jpg", "out0"}


def test_all_that_is_wrong_with_a_file_that_cannot_be_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = coco_of(tmp_path / "data") / "train" / "_annotations.coco.json"
    content = json.loads(file.read_text())
    content["annotations"][3]["image_id"] = 77
    content["annotations"][5]["category_id"] = 9
    content["annotations"][8]["id"] = 1
    file.write_text(json.dumps(content))
    code, report = check(tmp_path / "data", tmp_path, capsys)
    assert code == 1
    assert {(one["kind"], one["where"]) for one in report["findings"]} == {
        ("data set that cannot be used", ""),
        *(("annotation that cannot be placed", f"annotation {id_}") for id_ in (3, 5)),
        ("id that is there twice", "entry 9 of `annotations`"),
    }


def test_a_data_set_in_vocs_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "data"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for split, seeds in (("train", range(6)), ("val", range(10, 14))):
        for seed in seeds:
            cv2.imwrite(str(folder / "JPEGImages" / f"{seed}.jpg"), photo(seed))
            (folder / "Annotations" / f"{seed}.xml").write_text(as_xml(BOXES, WIDE, HIGH))
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{seed}\n" for seed in seeds))
    assert check(folder, tmp_path, capsys)[1]["findings"] == []
    outside, twice = [*BOXES, ("cat", [300, 200, 80, 90])], [*BOXES, ("cat", [32, 48, 64, 47.9])]
    (folder / "Annotations" / "0.xml").write_text(as_xml(outside, WIDE, HIGH))
    (folder / "Annotations" / "1.xml").write_text(as_xml(twice, WIDE, HIGH))
    (folder / "Annotations" / "2.xml").write_text("<annotation>")
    (folder / "Annotations" / "3.xml").write_text(as_xml([*BOXES, BOXES[0]], WIDE, HIGH))
    edge = as_xml([("cat", [1, 1, 9, 9]), *BOXES, ("cat", [300, 9, 30, 30])], WIDE, HIGH)
    hard = edge.replace("<bndbox>", "<difficult>1</difficult><bndbox>", 1)  # it is not trained on, and counts
    (folder / "Annotations" / "5.xml").write_text(hard)
    (folder / "Annotations" / "4.xml").write_text(as_xml([*BOXES, ("cat", [9, 9, 0, 5])], WIDE, HIGH))
    (folder / "Annotations" / "lonely.xml").write_text(as_xml(BOXES, WIDE, HIGH))
    (folder / "Annotations" / "spare.xml").write_text(as_xml(BOXES, WIDE, HIGH))
    cv2.imwrite(str(folder / "JPEGImages" / "spare.jpg"), photo(41))
    code, report = check(folder, tmp_path, capsys, fix=str(tmp_path / "mended"))
    assert code == 1
    assert kinds(report) == {
        ("label without image", "lonely.xml", ""),
        ("image without label", "spare.jpg", ""),
        ("coordinate outside the image", "0.xml", "object 3"),
        ("duplicate box", "1.xml", "object 3"),
        ("duplicate box", "3.xml", "object 3"),
        ("box of no size", "4.xml", "object 3"),
        ("box over the edge", "5.xml", "object 4"),
        ("labels that cannot be read", "2.xml", ""),
    }
    code, report = check(tmp_path / "mended", tmp_path, capsys)
    assert (code, report["findings"]) == (0, [])
    assert report["splits"]["train"]["boxes"] == 12  # of five images


def test_a_data_set_in_hugging_faces_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    objects = [{"bbox": box, "category": k} for k, (_, box) in enumerate(BOXES)]
    of_split = {
        split: [
            ({"bytes": cv2.imencode(".jpg", photo(seed))[1].tobytes(), "path": f"{seed}.jpg"}, objects)
            for seed in seeds
        ]
        for split, seeds in (("train", range(6)), ("validation", range(10, 14)))
    }  # fmt: skip

    def written(folder: Path) -> Path:
        for split, rows in of_split.items():
            write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows, names=["cat", "dog"])
        return folder

    assert check(written(tmp_path / "data"), tmp_path, capsys)[1]["findings"] == []
    rows = of_split["train"]
    rows[0] = (rows[0][0], [*objects, {"bbox": [300.0, 200, 80, 90], "category": 0}])
    rows[1] = (rows[1][0], [*objects, {"bbox": [32.0, 48, 64, 47.9], "category": 0}])
    rows[2] = ({"bytes": rows[2][0]["bytes"][:3000], "path": "2.jpg"}, objects)
    rows[3] = ({"bytes": rows[4][0]["bytes"], "path": "3.jpg"}, objects)
    code, report = check(written(tmp_path / "worse"), tmp_path, capsys, fix=str(tmp_path / "mended"))
    assert code == 1
    assert kinds(report) == {
        (kind, "train-00000-of-00001.parquet", where)
        for kind, where in (
            ("coordinate outside the image", "row 1, object 3"),
            ("duplicate box", "row 2, object 3"),
            ("image that cannot be read", "row 3"),
            ("duplicate image", "row 5"),
        )
    }
    assert "it is 3.jpg again, byte for byte" in {one["what"] for one in report["findings"]}
    code, report = check(tmp_path / "mended", tmp_path, capsys)
    assert (code, report["findings"]) == (0, [])
    assert report["splits"]["train"] | {"images": 4, "boxes": 9} == report["splits"]["train"]
    was, copy = (next((tmp_path / name / "data").glob("train*")) for name in ("worse", "mended"))
    assert read_parquet_schema(copy) == read_parquet_schema(was)
    assert [*report["classes"]] == ["cat", "dog"]


def test_a_split_that_is_not_there_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = clean(tmp_path / "data")
    file.write_text(file.read_text().replace("images/val", "images/none"))
    code, report = check(file, tmp_path, capsys)
    assert code == 1
    assert [one["kind"] for one in report["findings"]] == ["split that cannot be used"]
    assert [*report["splits"]] == ["train"]


def test_one_of_a_level_is_one(tmp_path: Path):
    one = Finding("negative size", "train", "a.txt", "line 3", "has a negative width")
    assert check_data.summary([one], tmp_path)[0].startswith("1 error (")
    assert check_data.summary([one, one], tmp_path)[0].startswith("2 errors (")


def test_exit_codes(tmp_path: Path):
    file = clean(tmp_path / "data")
    script = ROOT / "train" / "check_data.py"
    done = launch(1, script, tmp_path / "nothing.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --data is") or "no such file" in done.stderr
    assert "Traceback" not in done.stderr
    file.write_text(file.read_text().replace("names", "nc: 3\nnames"))
    done = launch(1, script, file, "--json", "--fix", tmp_path / "mended", cwd=tmp_path)
    assert done.returncode == 1
    assert f"nothing is written to {tmp_path}/mended" in done.stderr
    (one,) = json.loads(done.stdout)["findings"]
    assert (one["level"], one["kind"]) == ("error", "data set that cannot be used")
    assert "nc: 3" in one["what"]
