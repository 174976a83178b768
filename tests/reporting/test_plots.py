"""Pictures, as far as a test can look at them."""

from pathlib import Path
from typing import Any

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from matplotlib.axes import Axes
from pycocotools import mask as coco_mask
from ultralytics.utils.plotting import colors

from tests.truths import truth_of
from train.config.options import TrainConfig
from train.config.task_options import PoseConfig
from train.evaluation.coco import METRICS
from train.evaluation.detections import Detections
from train.evaluation.evaluate import measure
from train.evaluation.truth import Truth
from train.reporting import plots
from train.reporting.training_report import TrainingReport


def test_epochs_on_the_axis_are_whole_numbers(tmp_path: Path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    losses = [f"{part}/{loss}_loss" for part in ("train", "val") for loss in ("box", "cls", "dfl")]
    columns = [*losses, *(f"val/{name}" for name in (*METRICS, "P", "R", "F1")), "lr/pg0", "images_per_s"]
    for epochs in (1, 3):
        rows = [{"epoch": epoch + 1} | dict.fromkeys(columns, 0.5 + epoch) for epoch in range(epochs)]
        plots.draw_results(rows, "val", tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 0
    for figure in drawn:
        for panel in figure.axes:
            assert np.array_equal(panel.get_xticks(), np.round(panel.get_xticks()))


def test_a_batch_is_drawn_as_it_was_and_stays_as_it_is(tmp_path: Path):
    torch.manual_seed(0)
    report = TrainingReport(Accelerator(cpu=True), TrainConfig(hang_timeout=0, trackers=("none",)))
    report.open(tmp_path, report.config)
    report.names = {0: "circle"}
    images = (torch.rand(2, 3, 64, 64) * 255).byte()
    images[0] = 0  # as in the dark
    batch = {"img": images, "cls": torch.zeros(3, 1), "bboxes": torch.rand(3, 4) / 2 + 0.2}
    batch |= {"batch_idx": torch.tensor([0.0, 0, 1])}
    before = {name: tensor.clone() for name, tensor in batch.items()}
    report.training_batch(0, batch | {"im_file": ["a.jpg", "b.jpg"]})
    images += 1  # the step goes on, while a thread draws
    report.close()
    images -= 1
    drawn = cv2.imread(str(tmp_path / "train_batch0.jpg"))
    second = drawn[drawn.shape[0] // 2 :, : drawn.shape[1] // 2]  # below the first
    assert second.mean() == pytest.approx(images[1].float().mean().item(), abs=25)
    assert all(torch.equal(batch[name], before[name]) for name in before)


# Masks and keypoints --------------------------------------------------------------------------------------------------
GREY, SIDE = 114, 160
SPOTS = np.array([[45.5, 90.5, 2], [60.5, 100.5, 1], [75.5, 110.5, 0], [90.5, 95.5, 2], [105.5, 120.5, 2]])


def grey_batch() -> dict[str, Any]:
    """Two grey images, the first with two objects, the second with one; five keypoints each, the third invisible."""
    batch: dict[str, Any] = {"img": torch.full((2, 3, SIDE, SIDE), GREY, dtype=torch.uint8)}
    batch |= {"cls": torch.tensor([[1.0], [0.0], [2.0]]), "batch_idx": torch.tensor([0.0, 0, 1])}
    batch |= {"bboxes": torch.tensor([[0.5, 0.6, 0.7, 0.5]] * 3), "im_file": ["a.jpg", "b.jpg"]}
    masks = torch.zeros(2, SIDE // 4, SIDE // 4, dtype=torch.uint8)
    masks[0, 18:30, 12:18], masks[0, 18:30, 22:28], masks[1, 18:30, 18:28] = 1, 2, 1
    points = torch.from_numpy(SPOTS / (SIDE, SIDE, 1)).float()
    return batch | {"masks": masks, "keypoints": points.repeat(3, 1, 1)}


def shade(number: int, share: float) -> np.ndarray:
    """BGR of a colour of Ultralytics' palette over grey."""
    return share * np.array(colors(number, bgr=True)) + (1 - share) * GREY


def test_masks_of_a_batch_have_the_colours_of_their_classes(tmp_path: Path):
    report = TrainingReport(Accelerator(cpu=True), TrainConfig(hang_timeout=0, trackers=("none",)))
    report.open(tmp_path, report.config)
    report.names = {0: "circle", 1: "square", 2: "triangle"}
    batch = grey_batch()
    del batch["keypoints"]
    report.training_batch(0, batch)
    report.close()
    drawn = cv2.imread(str(tmp_path / "train_batch0.jpg"))
    for (x, y), number in (((60, 96), 1), ((100, 96), 0), ((92, SIDE + 96), 2)):  # the second image below the first
        patch = drawn[y - 6 : y + 6, x - 6 : x + 6].reshape(-1, 3)
        assert np.abs(patch.mean(0) - shade(number, 0.6)).max() < 12, number
    for x, y in ((38, 96), (50, SIDE + 96)):  # beside them, within their boxes
        assert np.abs(drawn[y - 2 : y + 2, x - 2 : x + 2].astype(int) - GREY).max() < 12


def test_keypoints_of_a_batch_are_where_they_are(tmp_path: Path):
    report = TrainingReport(Accelerator(cpu=True), PoseConfig(hang_timeout=0, trackers=("none",)))
    report.open(tmp_path, report.config)
    report.names = {0: "circle", 1: "square", 2: "triangle"}
    batch = grey_batch()
    del batch["masks"]
    report.training_batch(0, batch)
    report.close()
    plots.draw_batch(batch, report.names, tmp_path / "batch.png")  # without a JPEG's losses
    exact, drawn = (cv2.imread(str(tmp_path / name)).astype(int) for name in ("batch.png", "train_batch0.jpg"))
    for below in (0, SIDE):
        for number, (x, y, seen) in enumerate(SPOTS.astype(int).tolist()):
            y += below
            expected = colors(number, bgr=True) if seen else (GREY,) * 3
            assert np.abs(exact[y, x] - expected).max() <= 1  # grey is rounded
            assert (np.abs(drawn[y, x] - GREY).max() > 25) == bool(seen)


def page(kind: str, folder: Path) -> np.ndarray:
    """The page of one grey image of 320 px with an object of the truth and another one found, and an unsure one."""
    cv2.imwrite(str(folder / "a.png"), np.full((320, 320, 3), GREY, np.uint8))
    outlines = [np.array([[x, 100], [x + 60, 100], [x + 60, 200], [x, 200]], float) for x in (40, 140, 240)]
    boxes = [[x, 100, 60, 100] for x in (40, 140, 240)]
    spots = SPOTS * (0.5, 0.5, 1) + (20, 70, 0)  # of the first; the others' are 100 px to the right each
    one = {"id": 1, "image_id": 1, "category_id": 7, "bbox": boxes[0], "area": 6000.0, "iscrowd": 0}
    one["beside"] = {"segmentation": [outlines[0].ravel().tolist()]} if kind == "segm" else {
        "keypoints": spots.ravel().tolist(), "num_keypoints": 4
    }  # fmt: skip
    content = {"images": [{"id": 1, "file_name": str(folder / "a.png"), "height": 320, "width": 320}]}
    content |= {"categories": [{"id": 7, "name": "a"}, {"id": 3, "name": "b"}], "annotations": [one]}
    rows = np.array([[1, *boxes[1], 0.9, 3], [1, *boxes[2], 0.2, 3]], float)
    runs = [coco_mask.frPyObjects([outline.ravel().tolist()], 320, 320)[0]["counts"] for outline in outlines[1:]]
    points = np.stack([spots + np.array([shift, 0, 0]) for shift in (100, 200)])
    found = Detections(rows, masks=runs) if kind == "segm" else Detections(rows, keypoints=points)
    plots.draw_page(found, truth_of(content, sigmas=(0.1,) * 5), [(0, "")], folder / "page.png")
    return cv2.imread(str(folder / "page.png"))


LEFT, RIGHT = 4, 4 + plots.TILE + 8  # of the truth's picture and that of what was found, on a page


def test_a_page_shows_masks_in_the_colours_of_their_classes(tmp_path: Path):
    drawn = page("segm", tmp_path)
    truth, found = (drawn[4 + 110 : 4 + 190, at : at + 320] for at in (LEFT, RIGHT))
    for picture, x, number in ((truth, 40, 0), (found, 140, 1)):
        assert (picture[:, x + 5 : x + 55] == shade(number, 0.4).astype(np.uint8)).all()
        rest = np.concatenate((picture[:, : x - 5], picture[:, x + 65 : 235]), 1)
        assert (rest == GREY).all()
    assert (found[:, 245:295] == GREY).all()  # of too low a score


def test_a_page_shows_keypoints_where_they_are(tmp_path: Path):
    drawn = page("keypoints", tmp_path)
    for at, shift, other in ((LEFT, 0, 100), (RIGHT, 100, 0)):
        for number, (x, y, seen) in enumerate(SPOTS * (0.5, 0.5, 1) + (20, 70, 0)):
            # Ultralytics draws keypoints in red for blue on what OpenCV writes
            assert drawn[4 + int(y), at + int(x) + shift].tolist() == [*(colors(number) if seen else (GREY,) * 3)]
            assert (drawn[4 + int(y), at + int(x) + other] == GREY).all()


def test_how_far_keypoints_are_off_is_drawn_as_it_is(tmp_path: Path, monkeypatch):
    """Eleven objects of area 100: the first keypoint is 0 to 10 px off, the second 3, the third is not labelled. A
    twelfth, which is far off, has too low a score.
    """
    marks, rows, points = [], [], []
    for i in range(12):
        box = [20.0 * i, 10.0, 10.0, 10.0]
        own = np.array([[20 * i, 10, 2], [20 * i + 5, 10, 1], [20 * i + 5, 15, 0]], float)
        beside = {"keypoints": own.ravel().tolist(), "num_keypoints": 2}
        marks.append({"id": i + 1, "image_id": 1, "category_id": 0, "bbox": box, "area": 100.0, "iscrowd": 0})
        marks[-1] |= {"beside": beside}
        rows.append([1, *box, 0.9 if i < 11 else 0.2, 0])
        points.append(own + np.array([[i if i < 11 else 90, 0, 0], [0, 3, 0], [50, 0, 0]]))
    content = {"images": [{"id": 1, "file_name": "gone.jpg", "height": 40, "width": 300}], "annotations": marks}
    truth: Truth = truth_of(content | {"categories": [{"id": 0, "name": "a"}]}, sigmas=(0.1,) * 3)
    truth.keypoint_names = ("nose", "ear", "tail")
    found = Detections(np.array(rows, float), keypoints=np.array(points))
    config, boxes, figures = PoseConfig(sigmas=(0.1,) * 3), [], []
    boxplot = Axes.boxplot
    monkeypatch.setattr(Axes, "boxplot", lambda *a, **more: boxes.append(boxplot(*a, **more)) or boxes[-1])
    monkeypatch.setattr(plt, "close", figures.append)
    monkeypatch.setattr(plots, "draw_curves", lambda *_: None)
    plots.draw_evaluation(measure(truth, found, config, Accelerator(cpu=True)), truth, None, tmp_path)
    (drawn,) = boxes
    medians = [line.get_xdata()[0] for line in drawn["medians"]]
    assert medians == pytest.approx([0.5, 0.3, np.nan], nan_ok=True)
    quartiles = [(line.get_xdata().min(), line.get_xdata().max()) for line in drawn["boxes"][:2]]
    assert quartiles == [pytest.approx((0.25, 0.75)), pytest.approx((0.3, 0.3))]
    assert [text.get_text() for text in figures[0].axes[0].get_yticklabels()] == ["nose", "ear", "tail"]
    assert cv2.imread(str(tmp_path / "keypoint_errors.png")) is not None
