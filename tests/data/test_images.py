"""The scan lists what the loader would refuse, and what would hang it or never end."""

import io
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from ultralytics.utils.patches import imread

from tests.data.conftest import load
from tests.labels import labels_of
from train.config.errors import InputError
from train.config.objects import Objects
from train.config.options import TrainConfig
from train.data import formats, sets
from train.data.files import find_data
from train.data.formats import ImageLabels, read_image
from train.data.sets import TrainSet

PICTURE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)


def encoded(kind: str, picture: np.ndarray = PICTURE, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return buffer.getvalue()


def broken_png() -> bytes:
    """IDAT of random bytes with the right checksum."""
    data = encoded("PNG")
    start = data.index(b"IDAT")
    body = bytes(range(256)) * 2
    chunk = struct.pack(">I", len(body)) + b"IDAT" + body + struct.pack(">I", zlib.crc32(b"IDAT" + body))
    return data[: start - 4] + chunk + data[-12:]


def floats() -> bytes:
    _, data = cv2.imencode(".tif", PICTURE.astype(np.float32))
    return data.tobytes()


def hollow_jpeg() -> bytes:
    return encoded("JPEG")[:20] + bytes(500) + b"\xff\xd9"


def damaged(progressive: bool) -> bytes:
    """Half a JPEG and behind it the whole."""
    data = encoded("JPEG", np.tile(PICTURE, (4, 4, 1)), progressive=progressive)
    return data[: len(data) // 2] + data


# What passes PIL's check of the header and ends a training when the order comes to it
REFUSED = {
    "cut.bmp": lambda: encoded("BMP")[:-4000],
    "cut.tif": lambda: encoded("TIFF")[:-4000],
    "cut.jp2": lambda: encoded("JPEG2000")[:-800],
    "hollow.jpg": hollow_jpeg,
    "float.tif": floats,
    "idat.png": broken_png,
    "icon.jpg": lambda: encoded("ICO"),
    "paint.png": lambda: encoded("PCX"),
    "targa.bmp": lambda: encoded("TGA"),
    "post.jpg": lambda: encoded("EPS"),
    "headless.jpg": lambda: b"\xff\xd8\xff\xd9",
    "cut.jpg": lambda: encoded("JPEG")[:-300],
    "cut.webp": lambda: encoded("WEBP")[:-200],
    "glued.jpg": lambda: damaged(progressive=True),
    "html.jpg": lambda: b"<!doctype html>" * 20,
    "lfs.jpg": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "empty.jpg": lambda: b"",
}
TAKEN = {
    "a.jpg": lambda: encoded("JPEG"),
    "progressive.jpg": lambda: encoded("JPEG", progressive=True),
    "gray.jpg": lambda: encoded("JPEG", PICTURE[..., 0]),
    "more.jpg": lambda: encoded("JPEG") + b"",
    "a.png": lambda: encoded("PNG"),
    "a.bmp": lambda: encoded("BMP"),
    "a.webp": lambda: encoded("WEBP"),
    "a.tif": lambda: encoded("TIFF", compression="tiff_lzw"),
    "a.jp2": lambda: encoded("JPEG2000"),
    "deep.png": lambda: cv2.imencode(".png", PICTURE.astype(np.uint16) * 257)[1].tobytes(),
    "png.jpg": lambda: encoded("PNG"),
}


@pytest.mark.parametrize("name", [*REFUSED, *TAKEN])
def test_the_scan_says_what_the_loader_will_say(name: str, tmp_path: Path):
    file = tmp_path / name
    file.write_bytes((REFUSED | TAKEN)[name]())
    found = read_image(str(file), str(tmp_path / "none.txt"), 0, 3)
    assert isinstance(found, str) == (name in REFUSED), found
    if isinstance(found, ImageLabels):
        TrainSet(labels_of([found]), Objects(names={0: "a"}), TrainConfig(imgsz=64)).load_image(0)
    elif name not in ("html.jpg", "lfs.jpg", "empty.jpg", "headless.jpg"):  # these no decoder takes anyway
        assert str(file) in found


def test_pipes_devices_and_links_in_circles_neither_hang_nor_multiply(tmp_path: Path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    for name in ("a", "b"):
        (images / f"{name}.jpg").write_bytes(encoded("JPEG"))
    (images / "x").symlink_to(".")
    (images / "y").symlink_to("..")
    (images / "z").symlink_to(".")
    os.mkfifo(images / "pipe.jpg")
    (images / "device.jpg").symlink_to("/dev/zero")
    (images / "gone.jpg").symlink_to("nowhere.jpg")
    (images / "folder.jpg").mkdir()
    (labels / "a.txt").symlink_to("/dev/zero")
    (tmp_path / "data.yaml").write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: [a]\n")
    files = find_data(str(tmp_path / "data.yaml")).images("train")
    assert sorted(Path(file).name for file in files) == ["a.jpg", "b.jpg", "device.jpg", "gone.jpg", "pipe.jpg"]
    said = {Path(f).name: read_image(f, str(labels / f"{Path(f).stem}.txt"), 0, 1) for f in files}
    assert isinstance(said["b.jpg"], ImageLabels)
    for name in ("device.jpg", "pipe.jpg"):
        assert "it is no regular file" in said[name]
    assert "No such file" in said["gone.jpg"]
    assert "labels/a.txt: cannot be read (it is no regular file)" in said["a.jpg"]


def test_damaged_jpegs_are_refused_by_the_scan_and_by_the_loader_alike(tmp_path: Path, capfd):
    rng = np.random.default_rng(0)
    file, refused = tmp_path / "a.jpg", 0
    for i in range(400):
        data = bytearray(encoded("JPEG", PICTURE, progressive=i % 2 == 0))
        data[rng.integers(2, 600)] = rng.integers(256)
        file.write_bytes(data)
        try:
            loaded = imread(str(file)) is not None
        except Exception:
            loaded = False
        scanned = isinstance(read_image(str(file), "", 0, 1), ImageLabels)
        assert loaded or not scanned, i
        refused += not scanned
    assert 20 < refused < 380


def test_links_to_folders_do_not_hide_labels(tmp_path: Path):
    for folder in ("images/train", "labels/train"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "images" / "train" / "a.jpg").write_bytes(b"")
    (tmp_path / "images" / "all").symlink_to("train")
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [a]\n")
    assert find_data(str(tmp_path / "data.yaml")).images("train") == [str(tmp_path / "images" / "train" / "a.jpg")]


def test_an_endless_label_file_is_listed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(formats, "LARGEST", 100)
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG"))
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n" * 100)
    assert "a.txt: larger than" in read_image(str(tmp_path / "a.jpg"), str(tmp_path / "a.txt"), 0, 1)


def test_an_image_that_breaks_later_is_tried_again_and_then_named(shapes: Path, accelerator, tmp_path, monkeypatch):
    labels, names = load(shapes, "train", accelerator)
    file = tmp_path / "later.jpg"
    content = Path(labels[0].im_file).read_bytes()
    labels = labels_of([replace(labels[0], im_file=str(file))])
    images = TrainSet(labels, Objects(names=names), TrainConfig(imgsz=64))
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            file.write_bytes(content)  # the network disk is back

    monkeypatch.setattr(sets.time, "sleep", sleep)
    assert images.load_image(0)[0].shape == (*labels[0].shape, 3) or images.load_image(0)[0].size
    assert slept == [0.1, 1.0]
    file.write_bytes(b"broken")
    images = TrainSet(labels, Objects(names=names), TrainConfig(imgsz=64))
    with pytest.raises(InputError, match=rf"{file} can no longer be read.*--resume"):
        images.load_image(0)


@pytest.mark.parametrize(
    ("text", "data", "message"),
    [
        ("train: images\nval: images\nnames: [a]\n", "labels", "a folder without a data YAML, which lists train, val"),
        (
            "train: labels\nval: images\nnames: [a]\n",
            "data.yaml",
            r"no images in .*labels \(avif, bmp, .*first .*a.txt",
        ),
        ("train: images\\train\nval: images\nnames: [a]\n", "data.yaml", "Paths are written with / on this system"),
        ("train: images\nval: images\nnames: [a]\n", "C:\\d.yaml", "no such file.*Paths are written with /"),
        ("train: images\nval: images\nnames: [a]\n", "truth.json", "it must be a data YAML"),
        ("train: ''\nval: ''\nnames: [a]\n", "data.yaml", "names no images; add the lines `train"),
        ("train: images/a.jpg\nval: images\nnames: [a]\n", "data.yaml", "an image; name its folder, or a .txt list"),
        (
            f"train: {'y' * 5000}\nval: images\nnames: [a]\n",
            "data.yaml",
            "says `train: y{200}`, but there is no .{300}[.]$",
        ),
        ("train: long.txt\nval: images\nnames: [a]\n", "data.yaml", None),
    ],
)
def test_what_people_name_instead_of_a_data_yaml(
    tmp_path: Path, monkeypatch, text: str, data: str, message: str | None
):
    monkeypatch.chdir(tmp_path)
    Path("long.txt").write_text("x" * 5000 + ".jpg\n")
    for folder, name in (("images", "a.jpg"), ("labels", "a.txt")):
        Path(folder).mkdir()
        Path(folder, name).write_text("")
    Path("truth.json").write_text("{}")
    Path("data.yaml").write_text(text)
    if message is None:
        (file,) = find_data(data).images("train")
        assert "File name too long" in read_image(file, "", 0, 1)
        return
    with pytest.raises(InputError, match=message):
        find_data(data).images("train")


def test_images_of_other_channels_than_the_yaml_says_are_named(shapes: Path, accelerator):
    labels, names = load(shapes, "train", accelerator)
    with pytest.raises(InputError, match=rf"{labels[0].im_file} has 3 channels, but the data YAML says channels: 4"):
        TrainSet(labels, Objects(names=names, channels=4), TrainConfig(imgsz=64)).load_image(0)


def test_classes_that_the_data_set_lacks(shapes: Path):
    with pytest.raises(InputError, match=r"--classes names 99, but .* has the classes 0 to 2"):
        find_data(str(shapes), classes=(1, 99))
