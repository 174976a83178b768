"""Names of any kind: files that are not UTF-8, classes in any script, on consoles that can print neither."""

import json
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import ImageFont

from tests.conftest import DETECT, TINY, launch
from train.reporting import fonts
from train.reporting.fonts import drawable, provide_fonts
from train.reporting.lines import _padded

CLASSES = ["火车 ひらがな", "🍎 apple", "سيارة"]


def test_a_run_with_names_of_every_kind_on_a_console_that_knows_ascii_alone(tmp_path: Path):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    rng = np.random.default_rng(0)
    names = [b"caf\xe9", "火车".encode(), "🍎".encode(), b"two\nlines", b'quo"te', b"a b", b"plain", b"\x1b[31mred"]
    picture = cv2.imencode(".jpg", rng.integers(0, 255, (64, 80, 3), np.uint8))[1].tobytes()
    for i, name in enumerate([*names, b"br\xf6ken"]):
        (tmp_path / os.fsdecode(b"images/" + name + b".jpg")).write_bytes(picture[: None if i < len(names) else 90])
        (tmp_path / os.fsdecode(b"labels/" + name + b".txt")).write_text(f"{i % 3} 0.5 0.5 0.5 0.5\n")
    (tmp_path / "d.yaml").write_text(
        f"path: {tmp_path}\ntrain: images\nval: images\nnames: {json.dumps(CLASSES)}\n", encoding="utf-8"
    )
    options = ["--model", TINY, "--data", "d.yaml", "--imgsz", 64, "--epochs", 1, "--batch", 8, "--workers", 0]
    plain = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = launch(1, DETECT, *options, cwd=tmp_path, **plain)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
    assert r"images/br\udcf6ken.jpg: not an image of a known format" in done.stdout
    assert r"\u706b\u8f66" in done.stdout
    assert "took" in done.stdout.splitlines()[-1]
    run = tmp_path / "runs" / "detect" / "exp"
    assert len((run / "faults.txt").read_text().splitlines()) == 2
    assert set(json.loads((run / "metrics.json").read_text())["per_class"]) == set(CLASSES)
    assert len(json.loads((run / "ground_truth.json").read_text())["images"]) == len(names)
    for picture_ in (
        "val.jpg",
        "labels.png",
        "confusion_matrix.png",
        "confusion_matrix_normalized.png",
        "train_batch0.jpg",
    ):
        assert (run / picture_).exists(), picture_
    log = (run / "logs" / "rank0.log").read_text(encoding="utf-8")
    assert "Glyph" not in log  # matplotlib's word for a box
    assert "could not be written" not in log
    assert "the trackers failed" not in log
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    assert all(line[:2] == "20" for line in log.splitlines()), log  # no name broke a line


def test_every_script_has_a_font(monkeypatch):
    # fonts of the system may be none, as in a container
    monkeypatch.setattr(fonts.font_manager, "findSystemFonts", lambda: [])
    fonts._chosen.cache_clear()
    for text in (
        "한국어",
        "火车汽車",
        "ひらがなカタカナ",
        "한국어",
        "हिन्दी",
        "سيارة",
        "מכונית",
        "รถยนต์",
        "машина",
        "αυτοκίνητο",
    ):
        assert provide_fonts([text]) == ""
        font = ImageFont.truetype(fonts.plotting.check_font("Arial.Unicode.ttf"), 20)  # the one of labels on images
        missing = bytes(font.getmask("\U000fffff"))
        assert all(bytes(font.getmask(c)) != missing for c in text), text
    fonts._chosen.cache_clear()


def test_a_symbol_that_no_font_has_is_spelt(monkeypatch):
    monkeypatch.setattr(fonts.font_manager, "findSystemFonts", lambda: [])
    fonts._chosen.cache_clear()
    assert drawable({0: "🍎 red", 1: "dog"}) == {0: ":red_apple: red", 1: "dog"}
    assert provide_fonts(["கார்"]) != ""
    fonts._chosen.cache_clear()


def test_nothing_is_asked_of_the_network_for_a_font(monkeypatch):
    from ultralytics.utils import downloads

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(downloads, "safe_download", refuse)
    monkeypatch.setattr(downloads, "is_url", refuse)
    provide_fonts(["火"])
    annotator = fonts.plotting.Annotator(np.zeros((64, 64, 3), np.uint8), pil=True, example="火")
    annotator.box_label([5, 20, 40, 40], "火")
    assert Path(fonts.plotting.check_font("Arial.ttf")).exists()


@pytest.mark.parametrize(
    ("name", "columns"), [("dog", 20), ("火车", 20), ("x" * 40, 20), ("火" * 40, 20), ("🍎", 20), ("हिन्दी", 20)]
)
def test_columns_of_the_table_stand_under_each_other(name: str, columns: int):
    import unicodedata

    padded = _padded(name, columns)
    width = sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in padded)
    assert width == columns
    assert re.sub(" +$", "", padded) in name
