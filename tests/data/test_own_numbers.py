"""The truth of annotation files that are not COCO's is their own numbers, and not what is left of shares of a side."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from accelerate import Accelerator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from ultralytics.utils.ops import xywh2ltwh

from tests.data.test_huggingface import write_parquet
from tests.data.test_voc import as_xml
from tests.labels import to_validate_on
from train.config.options import EvalConfig
from train.data.files import find_data
from train.evaluation.coco import coco_metrics
from train.evaluation.cocofiles import read_truth
from train.evaluation.detections import Detections

NAMES = ["box", "disc", "wedge"]
WIDTH, HEIGHT = 500, 333  # by which hardly anything can be divided and multiplied again
IMAGE = cv2.imencode(".png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))[1].tobytes()


def scene(form: str, folder: Path) -> tuple[dict[str, list], np.ndarray]:
    """A data set to validate on, in this form; what COCO would say of it, and detections on it."""
    rng = np.random.default_rng(0)
    content: dict[str, list] = {"images": [], "annotations": []}
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    rows: list[Any] = []
    detected = []
    for part in ("Annotations", "JPEGImages", "ImageSets/Main") if form == "voc" else ():
        (folder / part).mkdir(parents=True)
    for i in range(12):
        content["images"].append({"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT})
        table = np.concatenate((rng.uniform(0, 150, (5, 2)), rng.uniform(20, 180, (5, 2))), 1)
        boxes = table.astype(int).tolist() if form == "voc" else table.tolist()
        classes = rng.integers(0, 3, 5).tolist()
        for box, c in zip(boxes, classes, strict=True):
            one = {"id": len(content["annotations"]) + 1, "image_id": i, "category_id": c, "bbox": box, "iscrowd": 0}
            content["annotations"].append(one | {"area": box[2] * box[3]})
            detected.append([i, *(np.array(box) + rng.normal(0, 6, 4)), rng.random(), c])
        if form == "voc":
            named = [(NAMES[c], box) for box, c in zip(boxes, classes, strict=True)]
            (folder / "Annotations" / f"{i}.xml").write_text(as_xml(named, WIDTH, HEIGHT))
            (folder / "JPEGImages" / f"{i}.png").write_bytes(IMAGE)
        objects = [{"bbox": [*map(float, box)], "category": c} for box, c in zip(boxes, classes, strict=True)]
        rows.append(({"bytes": IMAGE, "path": f"{i}.png"}, objects))
    if form == "voc":
        (folder / "ImageSets" / "Main" / "val.txt").write_text("".join(f"{i}\n" for i in range(12)))
    else:
        write_parquet(folder / "validation-00000-of-00001.parquet", rows, names=NAMES)
    return content, np.array(detected)


@pytest.mark.parametrize("form", ["parquet", "voc"])
def test_the_truth_and_the_ap_are_those_of_the_files_own_numbers(form: str, tmp_path: Path, accelerator: Accelerator):
    content, rows = scene(form, tmp_path)
    data = find_data(str(tmp_path))
    labels = to_validate_on(data, EvalConfig(), accelerator)
    truth = read_truth(labels, data, EvalConfig(), accelerator)
    marks = truth.marks()
    columns = (truth.ids[marks.image], marks.category, marks.boxes, marks.area)
    said = [*zip(*(column.tolist() for column in columns), strict=True)]
    given = [(a["image_id"], a["category_id"], a["bbox"], a["area"]) for a in content["annotations"]]
    assert sorted(said) == sorted(given)
    shares = xywh2ltwh(labels.boxes(np.arange(len(labels)))[2] * (WIDTH, HEIGHT, WIDTH, HEIGHT))
    assert not np.array_equal(shares, marks.boxes)
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    result = COCOeval(coco, coco.loadRes(rows), "bbox")
    result.evaluate()
    result.accumulate()
    result.summarize()
    assert 0.1 < result.stats[0] < 0.9
    assert np.array_equal(result.stats, list(coco_metrics(truth, Detections(rows))[0].values())[:12])
    config = EvalConfig(classes=(1,))
    some = read_truth(to_validate_on(data, config, accelerator), data, config, accelerator)
    assert some.marks().boxes.tolist() == [box for _, category, box, _ in said if category == 1]


def test_an_index_that_is_not_checked_is_none_of_the_changed_file(tmp_path: Path, accelerator: Accelerator):
    content, _ = scene("voc", tmp_path)
    before = to_validate_on(find_data(str(tmp_path)), EvalConfig(), accelerator)
    named = [(NAMES[a["category_id"]], a["bbox"]) for a in content["annotations"][:5]]
    text = as_xml([(named[0][0], [1, 2, 30, 40]), *named], WIDTH, HEIGHT)
    (tmp_path / "Annotations" / "0.xml").write_text(text)
    data = find_data(str(tmp_path))
    after = to_validate_on(data, EvalConfig(index_check="off"), accelerator)
    assert after.source.from_file == before.source.from_file
    boxes = read_truth(after, data, EvalConfig(), accelerator).marks().boxes
    assert boxes == pytest.approx(read_truth(before, data, EvalConfig(), accelerator).marks().boxes)
    assert len(to_validate_on(data, EvalConfig(), accelerator)[0].cls) == 6
