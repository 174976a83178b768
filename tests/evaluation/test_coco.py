"""The metric against pycocotools, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from train.config.errors import InputError
from train.config.options import EvalConfig
from train.data.formats import Labels
from train.evaluation.coco import coco_metrics, diagnose, metric_names
from train.evaluation.evaluate import _check_ids, _mean_losses
from train.evaluation.truth import ground_truth, read_predictions
from train.reporting.plots import worst_first


def scene(images: int, classes: int, seed: int = 0) -> tuple[dict, np.ndarray]:
    """Truth and detections that hit, miss, repeat and tie."""
    rng = np.random.default_rng(seed)
    labels, rows = [], []
    for image in range(images):
        n = int(rng.integers(0, 8))
        boxes = np.concatenate([rng.uniform(0.2, 0.8, (n, 2)), rng.uniform(0.02, 0.4, (n, 2))], 1)
        classes_here = rng.integers(0, classes, n).astype(float)
        labels.append(Labels(f"{image}.jpg", 3 * image, (480, 640), classes_here, boxes, []))
        for c, (x, y, w, h) in zip(classes_here, boxes * (640, 480, 640, 480), strict=True):
            for _ in range(int(rng.integers(0, 3))):
                jitter = rng.normal(0, 0.08, 4) * (w, h, w, h)
                box = np.array([x - w / 2, y - h / 2, w, h]) + jitter
                rows.append([3 * image, *np.abs(box), round(rng.random(), 1), c])  # scores of one decimal: many ties
        for _ in range(int(rng.integers(0, 4))):
            rows.append([3 * image, *rng.uniform(1, 200, 4), round(rng.random(), 1), int(rng.integers(0, classes))])
    _, truth = ground_truth(labels, {i: f"c{i}" for i in range(classes)})
    return truth, np.array(rows, dtype=np.float64)


def same(ours: tuple, reference: tuple) -> None:
    """Two evaluators' numbers and curves, bit for bit."""
    assert ours[0] == reference[0]
    for name in ("pr", "p", "r", "f1"):
        assert np.array_equal(getattr(ours[1], name), getattr(reference[1], name))
    assert all(np.array_equal(ours[1].ap[name], reference[1].ap[name]) for name in ("AP50", "AP75", "AP"))


@pytest.mark.parametrize("seed", range(3))
def test_hotcoco_and_pycocotools_agree_bit_for_bit(seed: int):
    truth, rows = scene(60, 4, seed)
    rng = np.random.default_rng(seed)
    for annotation in truth["annotations"]:  # as a COCO file has them
        annotation["iscrowd"] = int(rng.random() < 0.1)
        annotation["area"] *= float(rng.uniform(0.4, 1))
    ours = coco_metrics(truth, rows, "hotcoco")
    assert 0.05 < ours[0]["AP"] < 0.9
    same(ours, coco_metrics(truth, rows, "pycocotools"))
    assert list(ours[0]) == list(metric_names((1, 10, 100)))


def test_the_twelve_numbers_are_the_evaluators_own():
    truth, rows = scene(60, 4)
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    result = COCOeval(coco, coco.loadRes(rows), "bbox")
    result.evaluate()
    result.accumulate()
    result.summarize()
    assert np.array_equal(result.stats, list(coco_metrics(truth, rows)[0].values())[:12])


def test_other_numbers_of_detections():
    truth, rows = scene(40, 2)
    ours = coco_metrics(truth, rows, "hotcoco", (2, 4, 300))
    same(ours, coco_metrics(truth, rows, "pycocotools", (2, 4, 300)))
    assert {"AR2", "AR4", "AR300"} <= set(ours[0])
    assert ours[0]["AP"] == pytest.approx(coco_metrics(truth, rows)[0]["AP"])  # nowhere are there 100 detections
    assert coco_metrics(truth, rows, "hotcoco", (1, 2, 3))[0]["AP"] < ours[0]["AP"]


def test_no_detections_no_truth_and_a_class_that_never_occurs():
    truth, rows = scene(10, 2)
    truth["categories"].append({"id": 2, "name": "never"})
    nothing = np.zeros((0, 7))
    empty = truth | {"annotations": []}
    for evaluator in ("hotcoco", "pycocotools"):
        missed, _ = coco_metrics(truth, nothing, evaluator)
        assert (missed["AP"], missed["P"], missed["R"], missed["F1"]) == (0, 0, 0, 0)
        unknown, _ = coco_metrics(empty, rows, evaluator)
        assert set(unknown.values()) == {-1.0}
        assert coco_metrics(empty, nothing, evaluator)[0]["AR100"] == -1
        _, curves = coco_metrics(truth, rows, evaluator)
        assert (curves.ap["AP"][2], curves.f1[2].max()) == (-1, -1)
    same(coco_metrics(truth, rows, "hotcoco"), coco_metrics(truth, rows, "pycocotools"))
    assert sum(diagnose(truth, nothing)["tide"].values()) >= 0
    assert diagnose(empty, rows)["confusion"].shape == (4, 4)


def test_the_mean_over_classes_is_the_ap():
    truth, rows = scene(60, 4)
    metrics, curves = coco_metrics(truth, rows)
    assert curves.ap["AP"].mean() == pytest.approx(metrics["AP"], abs=1e-12)


def test_precision_recall_and_f1_at_the_best_confidence():
    """By hand: one class, ten boxes, eight found at falling confidence with two false ones between them."""
    labels = [Labels(f"{i}.jpg", i, (100, 100), np.zeros(1), np.array([[0.5, 0.5, 0.4, 0.4]]), []) for i in range(10)]
    _, truth = ground_truth(labels, {0: "a"})
    rows = [[i, 30, 30, 40, 40, 0.9 - 0.05 * i, 0] for i in range(8)]
    rows += [[8, 0, 0, 5, 5, 0.72, 0], [9, 0, 0, 5, 5, 0.1, 0]]
    metrics, curves = coco_metrics(truth, np.array(rows, dtype=float))
    assert metrics["R"] == pytest.approx(0.8)
    assert metrics["P"] == pytest.approx(8 / 9)
    assert metrics["F1"] == pytest.approx(2 * (8 / 9) * 0.8 / (8 / 9 + 0.8))
    half = 500  # confidence 0.5
    assert curves.r[0, 700] == pytest.approx(0.4, abs=0.1)
    assert curves.r[0, half] > curves.r[0, 700] > curves.r[0, 899]
    assert curves.p[0, 950] == 1  # nothing is that sure


def test_what_goes_wrong_is_told_by_kind_and_image():
    labels = [Labels(f"{i}.jpg", i, (100, 100), np.zeros(1), np.array([[0.5, 0.5, 0.4, 0.4]]), []) for i in range(3)]
    _, truth = ground_truth(labels, {0: "a", 1: "b"})
    rows = np.array([[0, 30, 30, 40, 40, 0.9, 0], [1, 30, 30, 40, 40, 0.8, 1], [2, 0, 0, 9, 9, 0.7, 0]], dtype=float)
    diagnosis = diagnose(truth, rows)
    assert diagnosis["confusion"].tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert [diagnosis["images"][i]["tp"] for i in range(3)] == [1, 0, 0]
    assert diagnosis["tide"]["Cls"] > 0
    assert diagnosis["tide"]["Dupe"] == 0
    assert [image["id"] for image, _ in worst_first(truth, diagnosis)][-1] == 0


def test_a_results_file_is_read_and_checked(tmp_path: Path):
    truth, rows = scene(5, 2)
    content = [{"image_id": int(r[0]), "bbox": list(r[1:5]), "score": r[5], "category_id": int(r[6])} for r in rows]
    file = tmp_path / "p.json"
    file.write_text(json.dumps(content[::-1]))
    read = read_predictions(str(file), truth)
    assert coco_metrics(truth, read)[0]["AR100"] == coco_metrics(truth, rows)[0]["AR100"]
    assert (np.diff(read[:, 0]) >= 0).all()
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
            read_predictions(str(file), truth)
    file.write_text("[]")
    assert read_predictions(str(file), truth).shape == (0, 7)


def test_the_same_loss_however_the_batches_are_dealt():
    batches = [(0, 4, [1.1, 2.2]), (4, 2, [0.3, 0.7]), (6, 1, [9.9, 3.1])]
    expected = _mean_losses(batches)
    assert expected == pytest.approx([(4.4 + 0.6 + 9.9) / 7, (8.8 + 1.4 + 3.1) / 7])
    assert _mean_losses(batches[::-1]) == _mean_losses([batches[1], batches[0], batches[2]]) == expected


def test_ground_truth_is_in_original_pixels():
    labels = [Labels("7.jpg", 7, (100, 200), np.array([1.0]), np.array([[0.5, 0.5, 0.2, 0.4]]), [])]
    _, truth = ground_truth(labels, {0: "a", 1: "b"})
    (annotation,) = truth["annotations"]
    assert annotation["bbox"] == pytest.approx([80, 30, 40, 40])
    assert annotation["area"] == pytest.approx(1600)
    assert (annotation["image_id"], annotation["category_id"], annotation["id"]) == (7, 1, 1)
    assert truth["images"] == [{"id": 7, "file_name": "7.jpg", "width": 200, "height": 100}]


def test_missing_and_repeated_images_are_an_error_with_their_ids():
    _check_ids([3, 1, 2], [1, 2, 3])
    with pytest.raises(RuntimeError, match=r"missing \[9\]"):
        _check_ids([1, 2], [1, 2, 9])
    with pytest.raises(RuntimeError, match=r"more than once \[2\]"):
        _check_ids([1, 2, 2], [1, 2])


def test_pycocotools_is_a_path_of_its_own(tmp_path: Path):
    truth, rows = scene(8, 2)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    np.save(tmp_path / "rows.npy", rows)
    code = (
        "import sys; sys.modules['hotcoco'] = None\n"
        "import json, numpy\nfrom train.evaluation.coco import coco_metrics\n"
        f"truth = json.load(open({str(tmp_path / 'truth.json')!r}))\n"
        f"print(coco_metrics(truth, numpy.load({str(tmp_path / 'rows.npy')!r}), 'pycocotools')[0]['AP'])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(said) == coco_metrics(truth, rows)[0]["AP"]


def test_an_annotation_file_is_checked_and_matched_by_folder(tmp_path: Path):
    config = EvalConfig(annotations=str(tmp_path / "truth.json"))
    labels = [Labels(f"/data/cam{i}/1.jpg", i, (100, 100), np.zeros(1), np.zeros((1, 4)), []) for i in (1, 2)]
    content: dict = {
        "images": [{"id": 10 + i, "file_name": f"cam{i}/1.jpg", "width": 100, "height": 100} for i in (1, 2)],
        "annotations": [{"image_id": 12, "category_id": 5, "bbox": [1, 2, 30, 40]}],
        "categories": [{"id": 5, "name": "a"}],
    }

    def read(**changes: list) -> tuple[list[Labels], dict]:
        Path(config.annotations).write_text(json.dumps(content | changes))
        return ground_truth(labels, {0: "a"}, config)

    found, truth = read()
    assert [entry.image_id for entry in found] == [11, 12]
    assert [(a["image_id"], a["area"], a["iscrowd"]) for a in truth["annotations"]] == [(12, 1200, 0)]
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
