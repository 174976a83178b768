"""Data sets whose labels are COCO's JSON: the same numbers as label files give the same, and what is wrong is said."""

import json
import os
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from accelerate import Accelerator
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.conftest import DETECT, TINY, succeed
from tests.labels import to_train_on, to_validate_on
from train.config.errors import InputError
from train.config.objects import Carries
from train.config.options import EvalConfig, TrainConfig
from train.data.files import find_data
from train.data.labels import Labels
from train.data.sets import TrainSet
from train.data.tables import mirrored
from train.evaluation.cocofiles import read_annotated, read_truth, with_annotations

NAMES = ["disc", "box", "wedge"]
CATEGORIES = (3, 20, 90)
OUTLINE = np.array([(0.5, 0), (1, 0.25), (0.75, 1), (0.25, 0.75), (0, 0.5)])  # of a box


def write(folder: Path, kind: Carries) -> tuple[Path, Path]:
    """The same images and objects as label files and as COCO's JSON: their data YAMLs. All sides are powers of two, so
    that pixels and shares of a side are the same numbers.
    """
    rng = np.random.default_rng(0)
    for form in ("text", "json"):
        for split in ("train", "val"):
            (folder / form / "images" / split).mkdir(parents=True)
            (folder / form / "labels" / split).mkdir(parents=True)
    for split, number in (("train", 12), ("val", 13)):
        content: dict[str, list] = {"images": [], "annotations": []}
        content["categories"] = [{"id": id_, "name": name} for id_, name in zip(CATEGORIES, NAMES, strict=True)]
        for i in range(number):
            width, height = ((128, 64), (128, 128), (64, 128))[i % 3]
            image = cv2.imencode(".png", rng.integers(0, 255, (height, width, 3), dtype=np.uint8))[1].tobytes()
            for form in ("text", "json"):
                (folder / form / "images" / split / f"{i:03}.png").write_bytes(image)
            content["images"].insert(0, {"id": i, "file_name": f"{i:03}.png", "width": width, "height": height})
            rows = []
            for _ in range(int(rng.integers(0, 4))):
                size = rng.integers(2, (width // 8, height // 8)) * 4
                low, cls = rng.integers(0, (width, height) - size), int(rng.integers(0, 3))
                sides, outline = np.array((width, height)), low + OUTLINE * size
                one = {"id": len(content["annotations"]) + 1, "image_id": i, "category_id": CATEGORIES[cls]}
                one |= {"bbox": [*map(int, low), *map(int, size)], "area": int(size.prod()), "iscrowd": 0}
                row = [*(low + size / 2) / sides, *size / sides]
                if kind == "polygons":
                    one["segmentation"], row = [outline.ravel().tolist()], [*(outline / sides).ravel()]
                if kind == "keypoints":
                    seen = np.array([2, 1, 2, 2, 0.0])[:, None]
                    one["keypoints"] = np.hstack((outline, seen)).ravel().tolist()
                    row += np.hstack((outline / sides, seen)).ravel().tolist()
                content["annotations"].append(one)
                rows.append(f"{cls} {' '.join(repr(float(value)) for value in row)}\n")
            (folder / "text" / "labels" / split / f"{i:03}.txt").write_text("".join(rows))
        crowd = {"id": 900, "image_id": 0, "category_id": 3, "bbox": [0, 0, 64, 32], "area": 9, "iscrowd": 1}
        crowd |= {"segmentation": coco_mask.frPyObjects([[0, 0, 63, 0, 63, 31]], 64, 128)[0], "keypoints": [0] * 15}
        crowd["segmentation"]["counts"] = crowd["segmentation"]["counts"].decode()
        content["annotations"].append(crowd)
        (folder / "json" / f"{split}.json").write_text(json.dumps(content))
    keypoints = "kpt_shape: [5, 3]\n" if kind == "keypoints" else ""
    text, coco = (folder / form / "data.yaml" for form in ("text", "json"))
    text.write_text(f"path: {text.parent}\ntrain: images/train\nval: images/val\nnames: {NAMES}\n{keypoints}")
    splits = (f"{split}: {{images: images/{split}, annotations: {split}.json}}\n" for split in ("train", "val"))
    coco.write_text(f"path: {coco.parent}\n{''.join(splits)}")
    return text, coco


@pytest.mark.parametrize("kind", ["boxes", "polygons", "keypoints"])
def test_the_same_numbers_are_the_same_labels_and_samples(kind: Carries, tmp_path: Path, accelerator: Accelerator):
    found: list[tuple[Labels, Any]] = []
    config = TrainConfig(imgsz=64, batch=4)
    for yaml in write(tmp_path, kind):
        data = find_data(str(yaml), carries=kind)
        assert data.names == dict(enumerate(NAMES))
        found.append((to_train_on(data, config, accelerator, kind), data))
    (text, _), (coco, of_json) = found
    assert not text.faults
    assert not coco.faults
    for array in ("sizes", "shapes", "first", "cls", "boxes", "usable", "numbers", "points", "point_ends", "paths"):
        assert np.array_equal(text.source.arrays[array], coco.source.arrays[array]), array
    assert len(coco.source.arrays["points"]) > 100 or kind == "boxes"
    if kind == "keypoints":
        assert of_json.keypoints == (5, 3)
    ours, theirs = (TrainSet(labels, data, config, 32) for labels, data in found)
    for position in range(len(ours)):
        a, b = ours[(0, position, True)], theirs[(0, position, True)]
        assert all(np.array_equal(a[name], b[name]) for name in ("img", "cls", "bboxes"))


def test_a_box_over_the_edge_is_the_same_in_both_forms(tmp_path: Path, accelerator: Accelerator):
    """Its middle and its sides are looked at, as in Ultralytics."""
    text, coco = (tmp_path / name for name in ("text", "coco"))
    for folder in (text, coco):
        folder.mkdir()
    find(text, one())
    (text / "labels").mkdir()
    (text / "labels" / "b.txt").write_text("0 0.9375 0.5 0.5 0.25\n")
    (text / "data.yaml").write_text(f"path: {text}\ntrain: images\nval: images\nnames: [dog, cat]\n")
    given = one(annotations={"bbox": [44, 12, 32, 8], "category_id": 2})
    found = [(data := find_data(str(text / "data.yaml")), to_train_on(data, TrainConfig(), accelerator))]
    found.append((data := find(coco, given), to_train_on(data, TrainConfig(), accelerator)))
    assert [labels.faults for _, labels in found] == [[], []]
    config = TrainConfig(imgsz=64, batch=2)
    ours, theirs = (TrainSet(labels, data, config, 32) for data, labels in found)
    assert len(ours[(0, 1, True)]["bboxes"])
    for position in range(2):
        a, b = ours[(0, position, True)], theirs[(0, position, True)]
        assert all(np.array_equal(a[name], b[name]) for name in ("img", "cls", "bboxes"))
    lost = one(annotations={"segmentation": [[44, 12, 70, 12, 70, 20]], "bbox": [44, 12, 26, 8]})
    labels = to_train_on(find(coco, lost, carries="polygons"), TrainConfig(), accelerator, "polygons")
    assert "the point 70, 12 leaves its image of 64x32 px" in labels.faults[0]  # as in a label file of polygons


def assert_ap_is_pycocotools(run: Path, annotations: Path) -> None:
    """The numbers of a run are those that pycocotools has of its predictions, on this file, bit for bit."""
    truth = COCO(str(annotations))
    result = COCOeval(truth, truth.loadRes(str(run / "predictions.json")), "bbox")
    result.evaluate()
    result.accumulate()
    result.summarize()
    metrics = json.loads((run / "metrics.json").read_text())
    assert result.stats[0] > 0
    assert [metrics["AP"], metrics["AP50"], metrics["AR100"]] == [result.stats[i] for i in (0, 1, 8)]


def test_the_ap_is_pycocotools_on_the_file_itself(tmp_path: Path):
    _, coco = write(tmp_path, "boxes")
    options = ["--model", TINY, "--imgsz", 64, "--batch", 8, "--nbs", 8, "--epochs", 2, "--conf", 0.0001, "--lr0", 0.05]
    options += ["--workers", 0, "--trackers", "none", "--no-plots", "--index-dir", tmp_path / "index"]
    said = succeed(2, DETECT, *options, "--data", coco, "--name", "json", cwd=tmp_path)
    assert said.count(f"reading {tmp_path}/json/train.json") == 1
    run = tmp_path / "runs" / "detect" / "json"
    assert_ap_is_pycocotools(run, coco.parent / "val.json")
    again = succeed(1, DETECT, "--resume", run, "--epochs", 3, cwd=tmp_path)
    assert "reading" not in again


def find(folder: Path, content: Any, more: str = "", carries: Carries = "boxes") -> Any:
    (folder / "a.json").write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "images").mkdir(exist_ok=True)
    for name in ("a", "b"):
        cv2.imwrite(str(folder / "images" / f"{name}.png"), np.zeros((32, 64, 3), np.uint8))
    entry = "{images: images, annotations: a.json}"
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: {entry}\nval: {entry}\n{more}")
    return find_data(str(folder / "data.yaml"), carries=carries)


def one(**changes: Any) -> dict[str, Any]:
    """A file of two images and one object, changed."""
    images = [{"id": 5, "file_name": "b.png", "width": 64, "height": 32}]
    images += [{"id": 4, "file_name": "a.png", "width": 64, "height": 32}]
    mark = {"id": 1, "image_id": 5, "category_id": 7, "bbox": [8, 4, 16, 8], "area": 128, "iscrowd": 0}
    content = {
        "images": images,
        "annotations": [mark],
        "categories": [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    return content | {key: [content[key][0] | value, *content[key][1:]] for key, value in changes.items()}


def with_second(changes: dict[str, Any]) -> dict[str, Any]:
    """A file with a second object, changed."""
    content = one()
    return content | {"annotations": [*content["annotations"], content["annotations"][0] | {"id": 2} | changes]}


def test_classes_are_the_categories_in_the_order_of_their_ids_or_those_of_the_yaml(
    tmp_path: Path, accelerator: Accelerator
):
    data = find(tmp_path, one())
    assert data.names == {0: "dog", 1: "cat"}
    labels = to_train_on(data, TrainConfig(), accelerator)
    assert [Path(entry.im_file).name for entry in labels] == ["a.png", "b.png"]
    assert labels[1].cls.tolist() == [1]
    assert labels[1].boxes.tolist() == [[0.25, 0.25, 0.25, 0.25]]
    data = find(tmp_path, one(), "names: [bird, cat, dog]\n")
    assert to_train_on(data, TrainConfig(), accelerator)[1].cls.tolist() == [1]
    with pytest.raises(InputError, match=r"a\.json has the category 'dog', which is none of the classes of "):
        find(tmp_path, one(), "names: [bird, cat]\n")


def test_a_changed_file_is_read_again(tmp_path: Path, accelerator: Accelerator):
    labels = to_train_on(find(tmp_path, one()), TrainConfig(), accelerator)
    again = to_train_on(find(tmp_path, one(annotations={"bbox": [0, 0, 32, 32]})), TrainConfig(), accelerator)
    places = {Path(one.source.from_file).name.partition("-")[0] for one in (labels, again)}
    assert len(places) == 1  # the new index takes the old one's place
    assert labels[1].boxes.tolist() != again[1].boxes.tolist() == [[0.25, 0.5, 0.5, 1]]


def test_what_an_image_cannot_be_used_for_is_said(tmp_path: Path, accelerator: Accelerator):
    for changes, message in (
        (
            {"annotations": {"bbox": [60, 4, 16, 8]}},
            r"b\.png: the bbox \[60.0, 4.0, 16.0, 8.0\] .* leaves its image",
        ),
        ({"images": {"width": 32, "height": 64}}, r"b\.png: it says 32x64 px of an image that has 64x32"),
        ({"images": {"file_name": "c.png"}}, r"c\.png: not a readable image \(No such file"),
    ):
        labels = to_train_on(find(tmp_path, one(**changes)), TrainConfig(), accelerator)
        assert len(labels) == 1
        (fault,) = labels.faults
        assert re.search(message, fault), fault
    labels = to_train_on(find(tmp_path, one(annotations={"bbox": [1, 1, 0, 5]})), TrainConfig(), accelerator)
    assert not labels.faults
    assert not labels.counts[0].any()  # a box without a side is none, as in Ultralytics' converter


def test_a_broken_file_is_one_message(tmp_path: Path):
    for content, message in (
        ("[", r"a\.json is not a COCO annotation file that can be read: it is no JSON"),
        ({"images": []}, r"it has no 'annotations'"),
        (one(annotations={"image_id": 9}), r"annotation 1 is of image 9 and category 7, which the file does not list"),
        (one(annotations={"bbox": [1, 2, 3]}), r"entry 1 of `annotations` has the bbox \[1, 2, 3\], not four numbers"),
        (one(annotations={"area": [1]}), r"entry 1 of `annotations` has the area \[1\], not a number"),
        (one(annotations={"image_id": [5]}), r"entry 1 of `annotations` has '\[5\]' as `image_id`, not a whole number"),
        (one(images={"width": 2.5, "height": "x"}), r"entry 1 of `images` has 'x' as `height`, not a whole number"),
        (one(images={"id": "img-0"}), r"entry 1 of `images` has 'img-0' as `id`, not a whole number"),
        (with_second({"bbox": [1, 2, 3]}), r"entry 2 of `annotations` has the bbox \[1, 2, 3\], not four numbers"),
        (with_second({"image_id": None}), r"entry 2 of `annotations` has 'None' as `image_id`, not a whole number"),
        (with_second({"category_id": 3}), r"annotation 2 is of image 5 and category 3, which the file does not list"),
        (one(images={"id": 4}), r"has an id twice among its images"),
        (one(images={"file_name": "a.png"}), r"lists the image a\.png twice"),
        (one(images={"file_name": "a\0b.png"}), r"names an image 'a\\x00b\.png', which no file can be called"),
        (one(images={"file_name": "\ud800.png"}), r"names an image '\\ud800\.png', which no file can be called"),
        (one(images={"id": 10**30}), r"entry 1 of `images`: `id` is 10{30}, and must be below 9007199254740992"),
        (one(images={"width": 2**31}), r"entry 1 of `images`: `width` is 2147483648, and must be below 2147483648"),
        (one(annotations={"image_id": 2**53}), r"entry 1 of `annotations`: `image_id` is 9007199254740992, and must"),
        (one(annotations={"iscrowd": -(10**20)}), r"entry 1 of `annotations`: `iscrowd` is -10{20}, and must be"),
        (one(annotations={"bbox": [10**400, 1, 2, 3]}), r"entry 1 of `annotations`: int too large to convert to float"),
        (one(categories={"id": 1e300}), r"entry 1 of `categories`: `id` is 10000000000000000\d+, and must be below"),
        (one(categories={"name": "dog"}), r"the categories 7 and 2 are both 'dog'"),
    ):
        with pytest.raises(InputError, match=message):
            find(tmp_path, content)
    for carries, mark, message in (
        ("polygons", {"segmentation": [[1, 1, 9, 1, 9, 10**400]]}, "segmentation of annotation 1 is neither polygons"),
        (
            "keypoints",
            {"keypoints": [float("nan"), 4, 2]},
            "annotation 1 has nan in its keypoints, not a number of",
        ),
    ):
        with pytest.raises(InputError, match=message):
            find(tmp_path, one(annotations=mark), carries=carries)
    for more, message in (
        (
            "val: {images: images}\n",
            r"`val` has annotations: None; it must be \{images: FOLDER, annot",
        ),
        ("val: {images: images, annotations: a.json, x: 1}\n", r"`val` has 'x'; it has images and annotations"),
    ):
        (tmp_path / "data.yaml").write_text(f"path: {tmp_path}\ntrain: images\n{more}")
        with pytest.raises(InputError, match=message):
            find_data(str(tmp_path / "data.yaml"))
    (tmp_path / "data.yaml").write_text(f"path: {tmp_path}\nval: {{images: images, annotations: gone.json}}\n")
    with pytest.raises(InputError, match=r"names no classes, and its annotation files \(gone\.json\) are not there"):
        find_data(str(tmp_path / "data.yaml"))
    (tmp_path / "data.yaml").write_text(
        f"path: {tmp_path}\nval: {{images: images, annotations: gone.json}}\nnames: [a]\n"
    )
    with pytest.raises(InputError, match=r"annotations: .*gone\.json`, but there is no such file"):
        find_data(str(tmp_path / "data.yaml")).images("val")


def test_objects_of_several_polygons_and_masks(tmp_path: Path, accelerator: Accelerator):
    two = [[8, 4, 16, 4, 16, 8], [18, 8, 24, 8, 24, 12]]
    data = find(tmp_path, one(annotations={"segmentation": two}), carries="polygons")
    (outline,) = to_train_on(data, TrainConfig(), accelerator, "polygons")[1].segments
    corners = {tuple(point) for point in (outline * (64, 32)).tolist()}
    assert corners == {tuple(point) for part in two for point in zip(part[::2], part[1::2], strict=True)}
    mask = np.zeros((32, 64), np.uint8)
    mask[4:12, 8:24] = 1
    runs = coco_mask.encode(np.asfortranarray(mask))
    runs["counts"] = runs["counts"].decode()
    data = find(tmp_path, one(annotations={"segmentation": runs}), carries="polygons")
    (outline,) = to_train_on(data, TrainConfig(), accelerator, "polygons")[1].segments
    assert (outline * (64, 32)).min(0).tolist() == [8, 4]
    assert (outline * (64, 32)).max(0).tolist() == [23, 11]  # its outermost pixels
    with pytest.raises(InputError, match="entry 1 of `annotations` has no 'segmentation'"):
        find(tmp_path, one(), carries="polygons")


def test_keypoints_and_what_a_mirror_makes_of_them(tmp_path: Path, accelerator: Accelerator):
    names = ["nose", "left_eye", "right_eye"]
    points = [8, 4, 2, 10, 5, 1, 12, 6, 0]
    content = one(annotations={"keypoints": points}, categories={"keypoints": names})
    data = find(tmp_path, content, carries="keypoints")
    assert (data.keypoints, data.flip_idx, data.keypoint_names) == ((3, 3), (0, 2, 1), tuple(names))
    (found,) = to_train_on(data, TrainConfig(), accelerator, "keypoints")[1].keypoints
    assert (found * (64, 32, 1)).ravel().tolist() == points
    config = with_annotations(EvalConfig(), data)
    labels = to_validate_on(data, config, accelerator, "keypoints")
    annotated = read_annotated(config, accelerator, "keypoints")
    object.__setattr__(config, "sigmas", (0.1,) * 3)
    truth = read_truth(labels, data, config, accelerator, annotated)
    assert truth.annotations()[0]["keypoints"] == points
    content = one(annotations={"keypoints": [0] * 9}, categories={"keypoints": names})
    none = find(tmp_path, content, carries="keypoints")
    assert not to_train_on(none, TrainConfig(), accelerator, "keypoints").counts[0].any()
    with pytest.raises(InputError, match=r"has keypoints of kpt_shape \[3, 3\], .* says \[4, 3\]"):
        find(tmp_path, content, "kpt_shape: [4, 3]\n", carries="keypoints")
    assert mirrored(["nose", "left_eye"]) == ()


def test_an_export_of_roboflows_as_it_is_unzipped(tmp_path: Path, accelerator: Accelerator):
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        for name in ("a", "b"):
            cv2.imwrite(str(tmp_path / split / f"{name}.png"), np.zeros((32, 64, 3), np.uint8))
        root = {"id": 0, "name": "animals", "supercategory": "none"}
        kinds = [
            {"id": 2, "name": "dog", "supercategory": "animals"},
            {"id": 7, "name": "cat", "supercategory": "animals"},
        ]
        content = one() | {"categories": [root, *kinds]}
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content))
    data = find_data(str(tmp_path))
    assert data.names == {0: "dog", 1: "cat"}
    assert to_train_on(data, TrainConfig(), accelerator)[1].cls.tolist() == [1]
    config = with_annotations(EvalConfig(), data)
    labels = to_validate_on(data, config, accelerator)
    truth = read_truth(labels, data, config, accelerator, read_annotated(config, accelerator))
    assert truth.names == {2: "dog", 7: "cat"}
    assert truth.annotations()[0]["bbox"] == [8, 4, 16, 8]
    os.rename(tmp_path / "train", tmp_path / "elsewhere")
    os.rename(tmp_path / "valid", tmp_path / "gone")
    with pytest.raises(InputError, match=r"a folder without a data YAML, .* without train/_annotations\.coco\.json"):
        find_data(str(tmp_path))
