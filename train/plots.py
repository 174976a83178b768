"""Pictures, for where people would rather look than read. Drawn with Ultralytics' plotting by the main process."""

import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from ultralytics.utils.patches import imread
from ultralytics.utils.plotting import Annotator, colors

from train.coco import Evaluation

TILE = 320  # px, longer side of one image on the page


def draw_validation(
    evaluation: Evaluation, truth: dict[str, Any], file: Path, images: int = 12, score: float = 0.25
) -> None:
    """A page of validation images, evenly drawn from the split: on the left the truth, on the right the detections.

    Args:
        evaluation: gives the detections.
        truth: COCO ground truth; `file_name` is the path of the image.
        file: the picture to write.
        images: how many images to show.
        score: detections below it are not drawn.
    """
    _provide_font()
    names = {category["id"]: category["name"] for category in truth["categories"]}
    every = max(len(truth["images"]) // images, 1)
    pairs = []
    for image in truth["images"][::every][:images]:
        picture = imread(image["file_name"])  # Ultralytics', for the formats it knows
        marks = [(a["bbox"], a["category_id"], "") for a in truth["annotations"] if a["image_id"] == image["id"]]
        rows = evaluation.detections
        rows = rows[(rows[:, 0] == image["id"]) & (rows[:, 5] >= score)]
        found = [(row[1:5], int(row[6]), f" {row[5]:.2f}") for row in rows]
        pairs.append(np.hstack([_tile(picture, marks, names), _tile(picture, found, names)]))
    pairs += [np.full_like(pairs[0], 255)] * (-len(pairs) % 3)
    cv2.imwrite(str(file), np.vstack([np.hstack(pairs[i : i + 3]) for i in range(0, len(pairs), 3)]))


def _tile(picture: np.ndarray, marks: list[tuple[Any, int, str]], names: dict[int, str]) -> np.ndarray:
    """The image with its boxes (ltwh in its own pixels) on a white square of TILE px."""
    scale = TILE / max(picture.shape[:2])
    annotator = Annotator(cv2.resize(picture, None, fx=scale, fy=scale), line_width=2, font_size=11, pil=True)
    for (x, y, w, h), category, text in marks:
        box = np.array([x, y, x + w, y + h]) * scale
        annotator.box_label(box.tolist(), names[category] + text, color=colors(category, bgr=True))
    drawn = annotator.result()
    tile = np.full((TILE + 8, TILE + 8, 3), 255, np.uint8)
    tile[4 : 4 + drawn.shape[0], 4 : 4 + drawn.shape[1]] = drawn[:TILE, :TILE]
    return tile


def _provide_font() -> None:
    """Ultralytics downloads its font where it finds none; matplotlib's stands in for it."""
    font = Path(os.environ["YOLO_CONFIG_DIR"]) / "Ultralytics" / "Arial.ttf"
    if not font.exists() and font.parent.is_dir():
        shutil.copyfile(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", font)
