"""COCO's files, read and checked."""

import json
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator

from tests.evaluation.test_coco import scene
from tests.evaluation.test_masks_and_keypoints import scene as scene_beside
from tests.labels import labels_of
from train.config.errors import InputError
from train.config.objects import Objects
from train.config.options import EvalConfig, ValConfig
from train.data.formats import ImageLabels
from train.evaluation.coco import coco_metrics
from train.evaluation.cocofiles import check_predictions, read_annotated, read_predictions, read_truth
from train.evaluation.detections import KINDS
from train.evaluation.truth import Truth
from train.reporting.report import Report
from train.validate import measure_file


def test_a_results_file_is_read_and_checked(tmp_path: Path):
    truth, rows = scene(5, 2)
    content = [
        {"image_id": int(r[0]), "bbox": list(r[1:5]), "score": r[5], "category_id": int(r[6])} for r in rows.rows
    ]
    file = tmp_path / "p.json"
    file.write_text(json.dumps(content[::-1]))
    read = read_predictions(str(file))
    check_predictions(str(file), read, truth)
    assert coco_metrics(truth, read)[0]["AR100"] == coco_metrics(truth, rows)[0]["AR100"]
    assert (np.diff(read.rows[:, 0]) >= 0).all()
    for wrong, message in (
        ([content[0] | {"image_id": 7777}], "names image ids that the data set does not have, 1 of them: 7777"),
        ([content[0] | {"category_id": 5}], "names category ids that the data set does not have, 1 of them: 5"),
        ([{"bbox": [1, 2, 3, 4]}], "an entry has no 'image_id'"),
        ([content[0] | {"bbox": [1, 2]}], "is not a COCO results file"),
        ([content[0] | {"score": float("nan")}], "not a finite number"),
        ({"images": 3}, "is not a COCO results file"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=message):
            check_predictions(str(file), read_predictions(str(file)), truth)
    file.write_text("[]")
    assert read_predictions(str(file)).rows.shape == (0, 7)
    assert read_predictions(str(file)).iou_types == ("bbox",)
    file.write_text(json.dumps([content[0] | {"keypoints": []}]))
    truth.sigmas = (0.1,) * 5
    with pytest.raises(InputError, match="has 0 keypoints an object, the truth 5"):
        check_predictions(str(file), read_predictions(str(file)), truth)


@pytest.mark.parametrize(
    ("kind", "before", "known"),
    [
        ("bbox", "", True),
        ("segm", "mask/", True),
        ("segm", "mask/", False),
        ("keypoints", "pose/", True),
        ("keypoints", "pose/", False),
    ],
)
def test_a_results_file_without_an_entry_is_of_what_its_name_says(
    kind: str, before: str, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """As a run names what it leaves where nothing was found; also where the annotation file has no object."""
    monkeypatch.chdir(tmp_path)
    for name in ("plots.draw_curves", "plots.ConfusionMatrix.plot"):  # they take long
        monkeypatch.setattr(f"train.reporting.{name}", lambda *_, **__: None)
    truth = scene(5, 2)[0] if kind == "bbox" else scene_beside(kind, 0)[0]
    content = truth.dataset() | ({} if known else {"annotations": []})
    Path("truth.json").write_text(json.dumps(content))
    name = KINDS[kind][2]
    Path(name).write_text("[]")
    config = ValConfig(predictions=name, annotations="truth.json", save_dir="out", hang_timeout=0)
    config.check()
    accelerator = Accelerator(cpu=True)
    measure_file(config, accelerator, Report(accelerator, config), None)
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert {key for key in metrics if key.endswith("AP")} == {f"{before}AP"}
    assert metrics[f"{before}AP"] == (0 if known else -1)
    assert Path("out", name).read_text() == "[]"
    said = capsys.readouterr().out
    assert f"0 detections of {name}" in said
    assert "warning:" not in said


def test_ground_truth_is_in_original_pixels():
    labels = [ImageLabels("7.jpg", 7, (100, 200), np.array([1.0]), np.array([[0.5, 0.5, 0.2, 0.4]]), [])]
    truth = Truth.of_labels(labels_of(labels), {0: "a", 1: "b"}).dataset()
    (annotation,) = truth["annotations"]
    assert annotation["bbox"] == pytest.approx([80, 30, 40, 40])
    assert annotation["area"] == pytest.approx(1600)
    assert (annotation["image_id"], annotation["category_id"], annotation["id"]) == (7, 1, 1)
    assert truth["images"] == [{"id": 7, "file_name": "7.jpg", "width": 200, "height": 100}]


def test_an_annotation_file_is_checked_and_matched_by_folder(tmp_path: Path):
    config = EvalConfig(annotations=str(tmp_path / "truth.json"))
    entries = [ImageLabels(f"/data/cam{i}/1.jpg", i, (100, 100), np.zeros(1), np.zeros((1, 4)), []) for i in (1, 2)]
    labels = labels_of(entries)
    content: dict = {
        "images": [{"id": 10 + i, "file_name": f"cam{i}/1.jpg", "width": 100, "height": 100} for i in (1, 2)],
        "annotations": [{"image_id": 12, "category_id": 5, "bbox": [1, 2, 30, 40]}],
        "categories": [{"id": 5, "name": "a"}],
    }

    def read(**changes: list) -> Truth:
        Path(config.annotations).write_text(json.dumps(content | changes))
        accelerator = Accelerator(cpu=True)
        annotated = read_annotated(config, accelerator)
        return read_truth(labels, Objects(names={0: "a"}), config, accelerator, annotated)

    truth = read()
    assert [entry.image_id for entry in labels] == [11, 12]
    assert [(a["image_id"], a["area"], a["iscrowd"]) for a in truth.annotations()] == [(12, 1200, 0)]
    same = [image | {"file_name": "1.jpg"} for image in content["images"]]
    broken = content["annotations"][0]
    for changes, message in (
        ({"images": same}, "two images of the split|lacks"),
        ({"images": content["images"][1:]}, "two images of the split are one"),
        ({"images": [content["images"][0]] * 2}, "an id twice among its images"),
        ({"annotations": [broken | {"bbox": [1, 2, 3, 4, 5]}]}, "not four numbers"),
        ({"annotations": [broken | {"bbox": [1, 2, 3, float("nan")]}]}, "not four numbers"),
        ({"annotations": [broken | {"category_id": 6}]}, "category 6, which the file does not list"),
        ({"categories": [{"id": 5, "name": "b"}]}, "has no category named a"),
        ({"images": 3}, "is not a COCO annotation file"),
    ):
        with pytest.raises(InputError, match=message):
            read(**changes)
