"""Pictures, for where people would rather look than read. Drawn with Ultralytics' plotting by the main process."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image
from pycocotools import mask as coco_mask
from ultralytics.utils.metrics import ConfusionMatrix, plot_mc_curve, plot_pr_curve
from ultralytics.utils.patches import imread
from ultralytics.utils.plotting import Annotator, colors, plot_images, plot_labels

from train.config.words import printable
from train.data.formats import ImageLabels, with_visibility
from train.data.labels import Labels
from train.evaluation.coco import Curves
from train.evaluation.detections import KINDS, Detections
from train.evaluation.evaluate import Evaluation
from train.evaluation.joints import joint_errors
from train.evaluation.truth import Truth
from train.reporting.fonts import drawable, provide_fonts

TILE = 320  # px, longer side of one image on the page
SHOWN, LABELLED = 12, 100_000  # images on a page, and those whose labels are drawn
SIZES = ("APs", "APm", "APl")
CONFIDENCE = 0.25  # detections below it are not drawn
ERRORS = {
    "Cls": "class",
    "Loc": "location",
    "Both": "class and location",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}


@dataclass
class Mark:
    """An object on an image: of the truth, or found."""

    box: list[float]  # left, top, width, height in pixels of the image
    category: int  # id
    score: float | None = None  # of what was found
    mask: np.ndarray | None = None  # (height, width) uint8 of the image, 0 or 1
    keypoints: np.ndarray | None = None  # (k, 3) x, y in pixels, and whether it is visible: from 0.25 on


def draw_evaluation(evaluation: Evaluation, truth: Truth, diagnosis: dict[str, Any] | None, folder: Path) -> None:
    """Curves, the confusion matrix, TIDE errors and the page of the worst images, as far as there is anything to show.

    Args:
        evaluation: gives the curves and the detections.
        truth: of the split.
        diagnosis: what `diagnose` returned.
        folder: where the pictures go.
    """
    by_id = truth.names
    for kind, curves in evaluation.curves.items():
        names = list(drawable({id_: by_id[id_] for id_ in curves.category_ids}).values())
        measured = curves.ap["AP50"] >= 0
        if measured.any():
            shown = {i: names[k] for i, k in enumerate(np.flatnonzero(measured))}
            draw_curves(curves, shown, measured, folder, KINDS[kind][0].replace("/", "_"))
    if evaluation.detections.keypoints is not None:
        draw_joints(joint_errors(truth, evaluation.detections.sure(CONFIDENCE)), truth, folder / "keypoint_errors.png")
    if diagnosis:
        matrix = ConfusionMatrix(dict(enumerate(names)))
        matrix.matrix = diagnosis["confusion"].astype(float).T  # Ultralytics' rows are detections
        for normalize in (True, False):
            matrix.plot(normalize=normalize, save_dir=folder)
        draw_tide(diagnosis["tide"], folder / "tide.png")
    images = worst_first(truth, diagnosis)
    draw_page(evaluation.detections, truth, images, folder / "val.jpg")


def draw_curves(curves: Curves, names: dict[int, str], measured: np.ndarray, folder: Path, before: str = "") -> None:
    """Precision-recall, and F1, precision and recall by confidence, at IoU (or OKS) 0.50, of the classes that occur.

    Args:
        curves: of all classes.
        names: of those that occur, by their places among these.
        measured: which do.
        folder: where the pictures go.
        before: what their names begin with.
    """
    confidence = np.linspace(0, 1, 1000)
    ap = curves.ap["AP50"][measured][:, None]
    plot_pr_curve(np.linspace(0, 1, 101), curves.pr[measured], ap, folder / f"{before}PR_curve.png", names)
    for letter, label, values in (("F1", "F1", curves.f1), ("P", "Precision", curves.p), ("R", "Recall", curves.r)):
        plot_mc_curve(confidence, values[measured], folder / f"{before}{letter}_curve.png", names, ylabel=label)


def draw_joints(errors: np.ndarray, truth: Truth, file: Path) -> None:
    """How far each keypoint is off, over the size of its object: median, quartiles and deciles; nothing to draw where
    no object was found.

    Args:
        errors: (objects, keypoints) of those that were found, see `joint_errors`.
        truth: names the keypoints.
        file: the picture to write.
    """
    of_each = [column[np.isfinite(column)] for column in errors.T]
    if not any(map(len, of_each)):
        return
    names = [printable(name) for name in truth.keypoint_names] or [str(k) for k in range(len(of_each))]
    figure, axes = plt.subplots(figsize=(7, 1.5 + 0.3 * len(of_each)), tight_layout=True)
    axes.boxplot(of_each, orientation="horizontal", whis=(10, 90), showfliers=False, tick_labels=names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("distance over the root of the object's area, of objects found at IoU 0.50")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_tide(tide: dict[str, float], file: Path) -> None:
    """AP50 lost by kind of error, and each kind's share of the sum."""
    total = max(sum(tide.values()), 1e-9)
    figure, axes = plt.subplots(figsize=(7, 3), tight_layout=True)
    bars = axes.barh([ERRORS[kind] for kind in tide], list(tide.values()), color="#1f77b4")
    axes.bar_label(bars, [f"{value:.3f}  {value / total:.0%}" for value in tide.values()], padding=3)
    axes.margins(x=0.25)
    axes.invert_yaxis()
    axes.set_xlabel("AP50 that these errors cost (TIDE), and share")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def worst_first(truth: Truth, diagnosis: dict[str, Any] | None) -> list[tuple[int, str]]:
    """Places of images with a caption, those of the lowest F1 and among them of the most errors first; without a
    diagnosis in the order of the split.
    """
    if not diagnosis:
        return [(place, "") for place in range(len(truth))]
    found = diagnosis["images"]
    nothing = {"f1": 1.0, "tp": 0, "fp": 0, "fn": 0}
    ranked = []
    for place, id_ in enumerate(truth.ids.tolist()):
        one = found.get(id_, nothing)
        errors = one["fp"] + one["fn"]
        caption = f"{one['tp']} found, {one['fn']} missed, {one['fp']} false"
        ranked.append((one["f1"] if errors else 1.0, -errors, id_, place, caption))
    return [(place, caption) for *_, place, caption in sorted(ranked)]


def draw_page(
    detections: Detections, truth: Truth, images: list[tuple[int, str]], file: Path, count: int = SHOWN
) -> None:
    """A page of validation images: on the left of each pair the truth, on the right the detections.

    Args:
        detections: on all images.
        truth: of the split.
        images: places of images in it with captions; those that cannot be read are passed over.
        file: the picture to write.
        count: how many images to show.
    """
    names = drawable(truth.names)
    colour = {id_: index for index, id_ in enumerate(truth.names)}
    provide_fonts(names.values(), (Path(truth.file(place)).name for place, _ in images[:count]))
    pairs: list[np.ndarray] = []
    for place, caption in images:
        picture = _picture(truth.file(place))
        if picture is None:
            continue
        pair = np.hstack([_tile(picture, marks, names, colour) for marks in marks_on(place, truth, detections)])
        words = Annotator(pair, font_size=14, pil=True)
        text = printable(f"{Path(truth.file(place)).name}  {caption}")
        words.text([6, len(pair) - 24], text, txt_color=(0, 0, 0))
        pairs.append(words.result())
        if len(pairs) == count:
            break
    if pairs:
        rows = _by(3, pairs)
        width = max(sum(pair.shape[1] for pair in row) for row in rows)
        cv2.imwrite(str(file), np.vstack([_row(row, width) for row in rows]))


def _row(pairs: list[np.ndarray], width: int) -> np.ndarray:
    """Pictures of one width side by side, on white where one is lower or there are fewer."""
    row = np.full((max(len(pair) for pair in pairs), width, 3), 255, np.uint8)
    for i, pair in enumerate(pairs):
        row[: len(pair), i * pair.shape[1] : (i + 1) * pair.shape[1]] = pair
    return row


def same_images(truth: Truth) -> list[int]:
    """Places of images evenly drawn from the split, SHOWN of them: the same ones every time."""
    every = max(len(truth) // SHOWN, 1)
    return [*range(0, len(truth), every)][:SHOWN]


def marks_on(place: int, truth: Truth, detections: Detections) -> tuple[list[Mark], list[Mark]]:
    """The truth on an image, without scores, and the detections from CONFIDENCE on."""
    annotations = truth.annotations(np.array([place]), iou_type="segm" if detections.masks is not None else "")
    marks = [Mark(one["bbox"], one["category_id"]) for one in annotations]
    id_ = int(truth.ids[place])
    sure = detections.between(id_, id_).sure(CONFIDENCE)
    found = [Mark(row[1:5], int(row[6]), row[5]) for row in sure.rows.tolist()]
    if sure.masks is not None:
        outlined = sure.outlines(truth.sizes_by_id(np.array([place])))
        for mark, one in zip([*marks, *found], [*(a["segmentation"] for a in annotations), *outlined], strict=True):
            mark.mask = coco_mask.decode(one)
    if sure.keypoints is not None:
        points = [np.array(one["keypoints"]).reshape(-1, 3) for one in annotations] + [*sure.keypoints]
        for mark, one in zip([*marks, *found], points, strict=True):
            mark.keypoints = one
    return marks, found


def _tile(picture: np.ndarray, marks: list[Mark], names: dict[int, str], colour: dict) -> np.ndarray:
    """The image with its objects, on white of TILE px across and with room for a line below."""
    scale = TILE / max(picture.shape[:2])
    small = with_masks(cv2.resize(picture, None, fx=scale, fy=scale), marks, colour)
    annotator = Annotator(small, line_width=2, font_size=11, pil=True)
    for mark in marks:
        x, y, w, h = mark.box
        text = "" if mark.score is None else f" {mark.score:.2f}"
        box = np.array([x, y, x + w, y + h]) * scale
        annotator.box_label(box.tolist(), names[mark.category] + text, color=colors(colour[mark.category], bgr=True))
    drawn = with_keypoints(annotator.result(), marks, scale)
    tile = np.full((min(drawn.shape[0], TILE) + 32, TILE + 8, 3), 255, np.uint8)
    tile[4 : 4 + drawn.shape[0], 4 : 4 + drawn.shape[1]] = drawn[:TILE, :TILE]
    return tile


def with_masks(picture: np.ndarray, marks: list[Mark], colour: dict[int, int]) -> np.ndarray:
    """A picture (height, width, 3) BGR, perhaps smaller than the masks, with these shining through in the colours of
    their categories.
    """
    for mark in marks:
        if mark.mask is not None:
            inside = cv2.resize(mark.mask, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0
            own = np.array(colors(colour[mark.category], bgr=True))
            picture[inside] = (picture[inside] * 0.6 + own * 0.4).astype(np.uint8)
    return picture


def with_keypoints(picture: np.ndarray, marks: list[Mark], scale: float) -> np.ndarray:
    """A picture with the keypoints of these, whose coordinates are `scale` times smaller on it."""
    if all(mark.keypoints is None for mark in marks):
        return picture
    annotator = Annotator(picture, line_width=2)
    for mark in marks:
        if mark.keypoints is not None:
            annotator.kpts(mark.keypoints * (scale, scale, 1), conf_thres=CONFIDENCE)
    return annotator.result()


def _picture(file: str) -> np.ndarray | None:
    """The image, BGR, in the formats that Ultralytics knows; None where it is not there."""
    return imread(file) if os.path.isfile(file) else None


def small_picture(file: str) -> np.ndarray | None:
    """The image, RGB, at most 2 TILE px wide and high; None where it is not there."""
    picture = _picture(file)
    if picture is None:
        return None
    scale = min(2 * TILE / max(picture.shape[:2]), 1)
    return cv2.cvtColor(cv2.resize(picture, None, fx=scale, fy=scale), cv2.COLOR_BGR2RGB)


def draw_samples(labels: Labels, names: dict[int, str], file: Path) -> None:
    """A page of images evenly drawn from a split, with their objects."""
    names = drawable(names)
    places = [*range(0, len(labels), max(len(labels) // SHOWN, 1))][:SHOWN]
    provide_fonts(names.values(), (Path(labels.file(place)).name for place in places))
    tiles = []
    for entry in (labels[place] for place in places):
        if (picture := _picture(entry.im_file)) is not None:
            tile = _tile(picture, _marks_of(entry), names, {k: k for k in names})
            words = Annotator(tile, font_size=14, pil=True)
            words.text([6, len(tile) - 24], printable(Path(entry.im_file).name), txt_color=(0, 0, 0))
            tiles.append(words.result())
    if tiles:
        cv2.imwrite(str(file), np.vstack([_row(row, 4 * tiles[0].shape[1]) for row in _by(4, tiles)]))


def _marks_of(entry: ImageLabels) -> list[Mark]:
    """The objects of an image's labels."""
    height, width = entry.shape
    sides = np.array((width, height, width, height))
    corners = np.concatenate((entry.boxes[:, :2] - entry.boxes[:, 2:] / 2, entry.boxes[:, 2:]), 1) * sides
    marks = [Mark(box, int(cls)) for box, cls in zip(corners.tolist(), entry.cls, strict=True)]
    for mark, polygon in zip(marks, entry.segments, strict=False):
        mark.mask = np.zeros((height, width), np.uint8)
        cv2.fillPoly(mark.mask, [(polygon * sides[:2]).round().astype(np.int32)], 1)
    for mark, points in zip(marks, entry.keypoints, strict=False):
        mark.keypoints = with_visibility(points[None])[0] * (width, height, 1)
    return marks


def _by(number: int, items: list[np.ndarray]) -> list[list[np.ndarray]]:
    return [items[i : i + number] for i in range(0, len(items), number)]


def draw_labels(labels: Labels, names: dict[int, str], file: Path) -> None:
    """How often each class occurs, and where and how large its boxes are, on at most LABELLED images."""
    names = drawable(names)
    places = np.arange(min(len(labels), LABELLED)) * len(labels) // min(len(labels), LABELLED)
    _, classes, boxes = labels.boxes(places)
    plot_labels(boxes, classes.astype(float), names, file.parent)
    drawn = file.with_name("labels.jpg")  # as Ultralytics names it
    Image.open(drawn).save(file)
    drawn.unlink()


def draw_batch(batch: dict[str, Any], names: dict[int, str], file: Path) -> None:
    """Images of a training batch as the loader gives them, uint8, with their objects, which are scaled in place."""
    names = drawable(names)
    shown: dict[str, Any] = {
        name: batch[name] for name in ("bboxes", "batch_idx", "masks", "keypoints") if name in batch
    }
    shown["cls"] = batch["cls"].squeeze(-1)
    shown["img"] = batch["img"].float() / 255  # Ultralytics takes uint8 images for floats where the first one is black
    plot_images(shown, paths=[printable(file) for file in batch["im_file"]], fname=file, names=names, threaded=False)


def draw_results(rows: list[dict[str, Any]], val: str, file: Path) -> None:
    """results.png: losses of training and validation, AP, P and R, learning rate and speed over the epochs."""
    losses = [name.removeprefix("train/") for name in rows[0] if name.startswith("train/")]
    panels = [(name, {"train": f"train/{name}", val: f"{val}/{name}"}) for name in losses]
    for kind in KINDS:
        before, word, _ = KINDS[kind]
        for title, names in (("AP", ("AP", "AP50", "AP75")), ("P, R, F1", ("P", "R", "F1")), ("AP by size", SIZES)):
            columns = {name: f"{val}/{before}{name}" for name in names if f"{val}/{before}{name}" in rows[0]}
            panels += [(word + title, columns)] if columns else []
    panels += [("learning rate", {name: name for name in rows[0] if name.startswith("lr/")})]
    panels += [("images/s", {"": "images_per_s"})]
    across = -(-len(panels) // 2)
    figure, axes = plt.subplots(2, across, figsize=(4 * across, 7), tight_layout=True)
    for panel in axes.flat[len(panels) :]:
        panel.set_axis_off()
    for panel, (title, columns) in zip(axes.flat, panels, strict=False):
        for label, column in columns.items():
            measured = [(row["epoch"], row[column]) for row in rows if row[column] not in (None, -1)]
            panel.plot(*zip(*measured, strict=True), marker=".", label=label) if measured else None
        panel.set_title(title)
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(alpha=0.3)
        if len(columns) > 1 and panel.lines:
            panel.legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)
