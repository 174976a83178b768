"""What a cleaned copy keeps, and how it keeps it: everything that is trained on, and all that is said beside it."""

import json
from pathlib import Path
from xml.etree import ElementTree

import cv2
import pytest

from tests.data.test_check_data import BOXES, HIGH, WIDE, check, coco_of, photo
from tests.data.test_voc import as_xml
from train import check_data
from train.config.errors import InputError
from train.data.files import find_data
from train.data.mended import mended_text
from train.data.mended_annotations import _mend_size, _mend_xml, _mended_objects, _Resized


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time."""
    monkeypatch.setattr(check_data, "draw", lambda *_: None)


def mended_coco(tmp_path: Path, capsys: pytest.CaptureFixture[str], **changes: object) -> tuple[dict, dict]:
    """What is in the cleaned copy's file, and the report on the copy; `changes` are of the first annotations."""
    folder = coco_of(tmp_path / "data")
    file = folder / "train" / "_annotations.coco.json"
    content = json.loads(file.read_text())
    for kind, entries in changes.items():
        for i, entry in enumerate(entries):
            content[kind][i] |= entry
    file.write_text(json.dumps(content))
    check(folder, tmp_path, capsys, fix=str(tmp_path / "mended"))
    copy = json.loads((tmp_path / "mended" / "train" / file.name).read_text())
    return copy, check(tmp_path / "mended", tmp_path, capsys)[1]


def test_ids_are_alike_that_the_reader_takes_for_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy, report = mended_coco(tmp_path, capsys, images=[{"id": "0"}], categories=[{"id": "1"}])
    assert report["splits"]["train"]["boxes"] == len(copy["annotations"]) == 12


def test_an_object_that_is_not_trained_on_takes_no_others_place():
    root = ElementTree.fromstring(as_xml([BOXES[0], *BOXES], WIDE, HIGH))
    ElementTree.SubElement(root.findall("object")[0], "difficult").text = "1"
    before = ElementTree.tostring(root)
    assert not _mend_xml(root, HIGH, WIDE)
    assert ElementTree.tostring(root) == before


def test_a_polygon_beside_the_image_is_dropped_and_a_box_around_it_ends_there():
    polygon = "0 0.1 0.1 0.2 0.1 0.2 0.3\n"
    beside = "0 1.1 0.1 1.2 0.1 1.3 0.5\n0 -0.5 1.2 0.1 1.5 0.3 1.1\n0 0.1 0.1 0.1 0.2 0.1 0.3\n"
    assert mended_text(polygon + beside, 1) == polygon
    assert mended_text("0 0.9 0.1 1.1 0.1 1.1 0.3\n", 1) == "0 0.9 0.1 1 0.1 1 0.3\n"
    assert mended_text("0 0.95 0.5 0.4 0.2\n", 1) == "0 0.875 0.5 0.25 0.2\n"  # a label, and over the edge
    points = "0.2 0.2 2 0.9 0.9 1\n"
    assert mended_text(f"0 0.5 0.6 1.2 1 {points}", 1, (2, 3)) == f"0 0.5 0.55 1 0.9 {points}"


def test_polygons_and_area_end_where_the_box_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    polygons = [[200, 100, 390, 100, 390, 200, 200, 200], [330, 10, 380, 10, 380, 60]]
    points = [250, 150, 2]
    outside = {"bbox": [200, 100, 190, 100], "area": 19000}
    changes = [outside | {"segmentation": polygons, "keypoints": points}, outside]
    copy, report = mended_coco(tmp_path, capsys, annotations=changes)
    lacking = {"segmentation that is none", "keypoints that are none"}  # as the other objects have none
    assert {one["kind"] for one in report["findings"]} == lacking
    one, other = copy["annotations"][:2]
    assert one["segmentation"] == [[200, 100, 320, 100, 320, 200, 200, 200]]
    assert one["bbox"] == other["bbox"] == [200, 100, 120, 100]
    assert (one["area"], other["area"], one["keypoints"]) == (12000, 12000, points)


def test_labels_of_another_size_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy, report = mended_coco(tmp_path, capsys, images=[{"width": HIGH, "height": WIDE}, {"width": str(WIDE)}])
    assert [image["id"] for image in copy["images"]] == [1, 2, 3, 4, 5]
    assert report["findings"] == []
    root = ElementTree.fromstring(as_xml(BOXES, HIGH, WIDE))
    assert _mend_size(root, HIGH, WIDE)
    assert ElementTree.tostring(root) == ElementTree.tostring(ElementTree.fromstring(as_xml(BOXES, WIDE, HIGH)))
    assert not _mend_size(root, HIGH, WIDE)
    with pytest.raises(_Resized):
        _mend_size(root, HIGH // 2, WIDE // 2)


def test_annotations_without_an_id_of_their_own_are_given_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy, report = mended_coco(tmp_path, capsys, annotations=[{}, {"id": None}, {"id": 0}])
    assert [one["id"] for one in copy["annotations"]] == [0, 12, 13, *range(3, 12)]
    assert report["splits"]["train"]["boxes"] == 12


def test_objects_in_hugging_faces_form_keep_what_is_beside_them():
    listed = {
        "id": [7, 8, 9, 10, 11],
        "area": [4, 6000, 9, 9, 9],
        "bbox": [[1, 1, 2, 2], [300, 200, 80, 90], [5, 5, 0, 9], [5, 5, 9, 9], [5, 5, 9, None]],
        "category": [0, 1, 0, 7, 0],
        "note": None,
    }
    kept = {"id": [7, 8], "area": [4, 800], "bbox": [[1, 1, 2, 2], [300, 200, 20, 40]], "category": [0, 1]}
    each = [dict(zip(kept, values, strict=True)) for values in zip(*(listed[key] for key in kept), strict=True)]
    names = {0: "cat", 1: "dog"}
    assert _mended_objects(listed, (HIGH, WIDE), names) == kept | {"note": None}
    assert _mended_objects(each, (HIGH, WIDE), names) == [
        dict(zip(kept, values, strict=True)) for values in zip(*kept.values(), strict=True)
    ]


def voc_below(folder: Path) -> Path:
    """Two images in VOC's form, in folders and with a space in a name."""
    for split, stem in (("train", "a/img 2"), ("val", "b/img 1")):
        for part, ending in (("JPEGImages", "jpg"), ("Annotations", "xml")):
            (folder / part / stem).parent.mkdir(parents=True)
            if ending == "jpg":
                cv2.imwrite(str(folder / part / f"{stem}.jpg"), photo(ord(stem[0])))
        (folder / "Annotations" / f"{stem}.xml").write_text(as_xml(BOXES, WIDE, HIGH))
        (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{stem}{' -1' if split == 'train' else ''}\n")
    return folder


def test_images_in_folders_in_vocs_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = voc_below(tmp_path / "data")
    _, report = check(folder, tmp_path, capsys, fix=str(tmp_path / "out" / ".." / "mended"))
    assert report["findings"] == []
    places = {file.relative_to(folder) for file in folder.rglob("*")}
    assert {file.relative_to(tmp_path / "mended") for file in (tmp_path / "mended").rglob("*")} == places
    (folder / "Annotations" / "b" / "img 1.xml").write_text("<annotation>")
    with pytest.raises(InputError, match="No image of val would be in the copy"):
        check(folder, tmp_path, capsys, fix=str(tmp_path / "none"))
    assert not [*tmp_path.glob("*none*")]


def test_a_copy_in_darknets_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "data"
    for number, (split, key) in enumerate((("Train", "train"), ("Validation", "valid"))):
        image = folder / f"obj_{split}_data" / "a" / f"f {number}.jpg"
        image.parent.mkdir(parents=True)
        cv2.imwrite(str(image), photo(number))
        image.with_suffix(".txt").write_text("0 0.5 0.5 0.2 0.2\n1 1.05 0.5 0.2 0.2\n")
        (folder / f"{split}.txt").write_text(f"data/{image.relative_to(folder)}\n")
        with open(folder / "obj.data", "a") as file:
            file.write(f"{key} = data/{split}.txt\n")
    (folder / "obj.names").write_text("cat\ndog\n")
    check(folder, tmp_path, capsys, fix=str(tmp_path / "mended"))
    label = tmp_path / "mended" / "obj_Train_data" / "a" / "f 0.txt"
    assert label.read_text() == "0 0.5 0.5 0.2 0.2\n1 0.975 0.5 0.05 0.2\n"
    data = find_data(str(tmp_path / "mended"))
    assert (data.names, Path(data.name).name) == ({0: "cat", 1: "dog"}, "obj.data")
    code, report = check(tmp_path / "mended", tmp_path, capsys)
    assert (code, report["splits"]["val"]["boxes"]) == (0, 2)
