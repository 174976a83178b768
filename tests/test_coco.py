"""The metric against pycocotools, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train.coco import METRICS, _check_ids, coco_metrics, ground_truth
from train.labels import Labels


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
    return ground_truth(labels, {i: f"c{i}" for i in range(classes)}), np.array(rows, dtype=np.float64)


@pytest.mark.parametrize("seed", range(3))
def test_hotcoco_and_pycocotools_agree_bit_for_bit(seed: int):
    truth, rows = scene(60, 4, seed)
    ours, per_class = coco_metrics(truth, rows, "hotcoco")
    reference, reference_per_class = coco_metrics(truth, rows, "pycocotools")
    assert 0.05 < ours["AP"] < 0.9
    assert ours == reference
    assert per_class == reference_per_class
    assert list(ours) == list(METRICS)


def test_no_detections_no_truth_and_a_class_that_never_occurs():
    truth, rows = scene(10, 2)
    truth["categories"].append({"id": 2, "name": "never"})
    nothing = np.zeros((0, 7))
    empty = truth | {"annotations": []}
    for evaluator in ("hotcoco", "pycocotools"):
        assert coco_metrics(truth, nothing, evaluator)[0]["AP"] == 0
        assert coco_metrics(empty, rows, evaluator)[0]["AP"] == -1
        assert coco_metrics(empty, nothing, evaluator)[0]["AR100"] == -1
        assert coco_metrics(truth, rows, evaluator)[1]["never"] == {"AP": -1.0, "AP50": -1.0}
    assert coco_metrics(truth, rows, "hotcoco") == coco_metrics(truth, rows, "pycocotools")


def test_the_mean_over_classes_is_the_ap():
    truth, rows = scene(60, 4)
    metrics, per_class = coco_metrics(truth, rows)
    assert np.mean([values["AP"] for values in per_class.values()]) == pytest.approx(metrics["AP"], abs=1e-12)


def test_ground_truth_is_in_original_pixels():
    labels = [Labels("7.jpg", 7, (100, 200), np.array([1.0]), np.array([[0.5, 0.5, 0.2, 0.4]]), [])]
    truth = ground_truth(labels, {0: "a", 1: "b"})
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
        "import json, numpy\nfrom train.coco import coco_metrics\n"
        f"truth = json.load(open({str(tmp_path / 'truth.json')!r}))\n"
        f"print(coco_metrics(truth, numpy.load({str(tmp_path / 'rows.npy')!r}), 'pycocotools')[0]['AP'])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(said) == coco_metrics(truth, rows)[0]["AP"]
