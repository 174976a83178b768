"""The metric against pycocotools, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.labels import labels_of
from tests.truths import truth_of
from train.data.formats import ImageLabels
from train.evaluation.coco import coco_metrics, diagnose, metric_names
from train.evaluation.detections import Detections
from train.evaluation.evaluate import _check_ids, _mean_losses
from train.evaluation.truth import Truth
from train.reporting.plots import worst_first


def scene(images: int, classes: int, seed: int = 0) -> tuple[Truth, Detections]:
    """Truth and detections that hit, miss, repeat and tie."""
    rng = np.random.default_rng(seed)
    labels, rows = [], []
    for image in range(images):
        n = int(rng.integers(0, 8))
        boxes = np.concatenate([rng.uniform(0.2, 0.8, (n, 2)), rng.uniform(0.02, 0.4, (n, 2))], 1)
        classes_here = rng.integers(0, classes, n).astype(float)
        labels.append(ImageLabels(f"{image}.jpg", 3 * image, (480, 640), classes_here, boxes, []))
        for c, (x, y, w, h) in zip(classes_here, boxes * (640, 480, 640, 480), strict=True):
            for _ in range(int(rng.integers(0, 3))):
                jitter = rng.normal(0, 0.08, 4) * (w, h, w, h)
                box = np.array([x - w / 2, y - h / 2, w, h]) + jitter
                rows.append([3 * image, *np.abs(box), round(rng.random(), 1), c])  # scores of one decimal: many ties
        for _ in range(int(rng.integers(0, 4))):
            rows.append([3 * image, *rng.uniform(1, 200, 4), round(rng.random(), 1), int(rng.integers(0, classes))])
    truth = Truth.of_labels(labels_of(labels), {i: f"c{i}" for i in range(classes)})
    return truth, Detections(np.array(rows, dtype=np.float64))


def one_box_each(images: int) -> list[ImageLabels]:
    box = np.array([[0.5, 0.5, 0.4, 0.4]])
    return [ImageLabels(f"{i}.jpg", i, (100, 100), np.zeros(1), box, []) for i in range(images)]


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
    content = truth.dataset()
    for annotation in content["annotations"]:  # as a COCO file has them
        annotation["iscrowd"] = int(rng.random() < 0.1)
        annotation["area"] *= float(rng.uniform(0.4, 1))
    truth = truth_of(content)
    ours = coco_metrics(truth, rows, "hotcoco")
    assert 0.05 < ours[0]["AP"] < 0.9
    same(ours, coco_metrics(truth, rows, "pycocotools"))
    assert list(ours[0]) == list(metric_names((1, 10, 100)))


def test_the_twelve_numbers_are_the_evaluators_own():
    truth, rows = scene(60, 4)
    coco = COCO()
    coco.dataset = truth.dataset()
    coco.createIndex()
    result = COCOeval(coco, coco.loadRes(rows.rows), "bbox")
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
    truth.categories.append({"id": 2, "name": "never"})
    nothing = Detections(np.zeros((0, 7)))
    empty = truth_of(truth.dataset() | {"annotations": []})
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
    labels = one_box_each(10)
    truth = Truth.of_labels(labels_of(labels), {0: "a"})
    rows = [[i, 30, 30, 40, 40, 0.9 - 0.05 * i, 0] for i in range(8)]
    rows += [[8, 0, 0, 5, 5, 0.72, 0], [9, 0, 0, 5, 5, 0.1, 0]]
    metrics, curves = coco_metrics(truth, Detections(np.array(rows, dtype=float)))
    assert metrics["R"] == pytest.approx(0.8)
    assert metrics["P"] == pytest.approx(8 / 9)
    assert metrics["F1"] == pytest.approx(2 * (8 / 9) * 0.8 / (8 / 9 + 0.8))
    half = 500  # confidence 0.5
    assert curves.r[0, 700] == pytest.approx(0.4, abs=0.1)
    assert curves.r[0, half] > curves.r[0, 700] > curves.r[0, 899]
    assert curves.p[0, 950] == 1  # nothing is that sure


def test_what_goes_wrong_is_told_by_kind_and_image():
    labels = one_box_each(3)
    truth = Truth.of_labels(labels_of(labels), {0: "a", 1: "b"})
    rows = np.array([[0, 30, 30, 40, 40, 0.9, 0], [1, 30, 30, 40, 40, 0.8, 1], [2, 0, 0, 9, 9, 0.7, 0]], dtype=float)
    diagnosis = diagnose(truth, Detections(rows))
    assert diagnosis["confusion"].tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert [diagnosis["images"][i]["tp"] for i in range(3)] == [1, 0, 0]
    assert diagnosis["tide"]["Cls"] > 0
    assert diagnosis["tide"]["Dupe"] == 0
    assert [place for place, _ in worst_first(truth, diagnosis)][-1] == 0


def test_the_same_loss_however_the_batches_are_dealt():
    batches = [(0, 4, [1.1, 2.2]), (4, 2, [0.3, 0.7]), (6, 1, [9.9, 3.1])]
    expected = _mean_losses(batches)
    assert expected == pytest.approx([(4.4 + 0.6 + 9.9) / 7, (8.8 + 1.4 + 3.1) / 7])
    assert _mean_losses(batches[::-1]) == _mean_losses([batches[1], batches[0], batches[2]]) == expected


def test_missing_and_repeated_images_are_an_error_with_their_ids():
    _check_ids([3, 1, 2], [1, 2, 3])
    with pytest.raises(RuntimeError, match=r"missing \[9\]"):
        _check_ids([1, 2], [1, 2, 9])
    with pytest.raises(RuntimeError, match=r"more than once \[2\]"):
        _check_ids([1, 2, 2], [1, 2])


def test_pycocotools_is_a_path_of_its_own(tmp_path: Path):
    truth, rows = scene(8, 2)
    (tmp_path / "truth.json").write_text(json.dumps(truth.dataset()))
    np.save(tmp_path / "rows.npy", rows.rows)
    code = (
        "import sys; sys.modules['hotcoco'] = None\n"
        "import json, numpy\nfrom train.evaluation.coco import coco_metrics\n"
        "from train.evaluation.cocofiles import read_annotations\n"
        "from train.evaluation.detections import Detections\n"
        f"truth = read_annotations({str(tmp_path / 'truth.json')!r})\n"
        f"rows = Detections(numpy.load({str(tmp_path / 'rows.npy')!r}))\n"
        "print(coco_metrics(truth, rows, 'pycocotools')[0]['AP'])\n"
        "try: coco_metrics(truth, rows)\nexcept ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ap, refused = done.stdout.splitlines()
    assert float(ap) == coco_metrics(truth, rows)[0]["AP"]
    assert refused.startswith("hotcoco cannot be imported: ")
    assert refused.endswith("say --coco-eval pycocotools.")


@pytest.mark.parametrize("boxed", [False, True])
def test_keypoints_that_coco_does_not_look_at_change_no_bit(boxed: bool):
    """More detections of a category than are measured, tied scores, and categories that an image has no truth of."""
    rng = np.random.default_rng(0)
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 480, "width": 640} for i in range(5)]
    content: dict[str, list] = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    content["categories"].append({"id": 7, "name": "b"})
    rows, points = [], []
    for image in range(5):
        corners = rng.uniform(100, 300, 2) + rng.uniform(0, 120, (4, 2))
        beside = {"keypoints": np.c_[corners, np.full(4, 2)].ravel().tolist(), "num_keypoints": 4}
        one = {"id": image + 1, "image_id": image, "category_id": 1, "iscrowd": 0, "bbox": [100, 100, 120, 120]}
        content["annotations"].append(one | {"area": 9000.0, "beside": beside})
        for n in range(60):
            moved = corners + rng.normal(0, 8, 2) + rng.normal(0, 3, (4, 2))
            rows.append([image, *rng.uniform(20, 200, 4), round(rng.random(), 1), 1 if n % 2 else 7])
            points.append(np.c_[moved, rng.random(4)])
    truth, keypoints = truth_of(content, sigmas=[0.05] * 4), np.array(points, np.float32)
    found = Detections(np.array(rows), keypoints=keypoints, area_of_box=boxed)
    assert len(found.surest(20)) == 5 * 2 * 20
    assert np.array_equal(found.surest(30).rows, found.rows)
    ours, theirs = (coco_metrics(truth, found, name, iou_type="keypoints") for name in ("hotcoco", "pycocotools"))
    same(ours, theirs)
    assert 0.05 < ours[0]["AP"] < 0.95
