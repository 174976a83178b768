import hashlib
from pathlib import Path

import numpy as np
import pytest

from train.data.formats import read_label
from train.data.shapes import SIZES, draw_shapes


def _digest(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_same_seed_draws_the_same_files_once(tmp_path: Path):
    first = draw_shapes(tmp_path / "a", {"train": 30})
    again = draw_shapes(tmp_path / "b", {"train": 30})
    other = draw_shapes(tmp_path / "c", {"train": 30}, seed=1)
    assert _digest(first.parent) == _digest(again.parent)
    assert _digest(first.parent) != _digest(other.parent)
    stamp = first.stat().st_mtime_ns
    assert draw_shapes(tmp_path / "a", {"train": 99}) == first
    assert first.stat().st_mtime_ns == stamp
    assert len(list(first.parent.glob("images/train/*.jpg"))) == 30
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["shapes"]  # no drafts left


def test_sizes_empty_images_and_polygons(tmp_path: Path):
    folder = draw_shapes(tmp_path, {"train": 80}).parent
    labels = {file.stem: read_label(file.read_text(), 3) for file in folder.glob("labels/train/*.txt")}
    others = {kind: draw_shapes(tmp_path, {"train": 80}, carries=kind).parent for kind in ("polygons", "keypoints")}
    polygons, points = (
        {
            file.stem: read_label(file.read_text(), 3, (4, 3) if kind == "keypoints" else ())
            for file in other.glob("labels/train/*.txt")
        }
        for kind, other in others.items()
    )
    for image in folder.glob("images/train/*.jpg"):
        assert all(
            (other / "images" / "train" / image.name).read_bytes() == image.read_bytes() for other in others.values()
        )
    assert {len(classes) for classes, _, _ in labels.values()} >= {0, 1, 2, 3}
    assert {c for classes, _, _ in labels.values() for c in classes} == {0, 1, 2}
    assert len(SIZES) >= 4
    for stem, (classes, boxes, segments) in labels.items():
        assert segments == []
        assert np.array_equal(classes, polygons[stem][0])
        np.testing.assert_allclose(boxes, polygons[stem][1], atol=2e-6)  # six decimals
        assert len(polygons[stem][2]) == len(classes) == len(points[stem][2])
        np.testing.assert_array_equal(boxes, points[stem][1])
        for (x, y, w, h), (top, right, bottom, left) in zip(boxes, points[stem][2], strict=True):
            sides = (y - h / 2, x + w / 2, y + h / 2, x - w / 2)
            assert (top[1], right[0], bottom[1], left[0]) == pytest.approx(sides, abs=2e-6)
