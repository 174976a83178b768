"""Feed the readers of labels, YAMLs and annotation files damaged ones for a while; anything but their own errors is a
find.

usage: python tests/fuzz.py [seconds] [seed]
"""

import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import polars as pl

from train.config.errors import InputError
from train.data.files import find_data
from train.data.formats import read_image
from train.data.shapes import draw_shapes
from train.data.tables import Table

LABELS = [b"0 0.5 0.5 0.2 0.2\n1 0.1 0.2 0.1 0.1\n", b"0 0.1 0.1 0.2 0.1 0.2 0.2\n", b"", b"\xef\xbb\xbf2 0.5 0.5 1 1"]
YAMLS = [
    b"path: .\ntrain: images/train\nval: [images/val, images/train]\nnames:\n  0: a\n  1: b\n",
    b"train: images/train\nval: list.txt\nnc: 2\nnames: [a, b]\nchannels: 3\ndownload: |\n  print(1)\n",
]
COCO = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 64}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 4, 16.5, 8], "area": 128, "iscrowd": 0}],
    "categories": [{"id": 1, "name": "cat"}],
}
VOC = """<annotation><size><width>64</width><height>64</height></size><object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>8</xmin><ymin>4</ymin><xmax>24.5</xmax><ymax>12</ymax></bndbox></object></annotation>"""
DARKNET = "classes = 1\ntrain = data/train.txt\nvalid = data/train.txt\nnames = data/obj.names\nbackup = backup/\n"
PIECES = [
    b"nan", b"inf", b"-1", b"1e400", b"\x00", b"\xff\xfe", b"\r", b"\n", b" ", b"0x1", b"1_0", b"&a", b"*a", b"<<: *a",
    b"!!python/object:os.system", b"{", b"[", b"- ", b": ", b"~", b"true", b"9" * 20, b"\xe2\x80\xa8", b"names:",
    b"train: 5\n", b"names: 3\n", b"? ", b"\t", b"|", b"0.5 " * 50,
]  # fmt: skip


def damage(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, repeat and insert at random places."""
    for _ in range(rng.randint(1, 6)):
        i, j = sorted(rng.randint(0, len(data)) for _ in range(2))
        data = rng.choice(
            [
                data[:i] + data[j:],
                data[:i] + rng.choice(PIECES) + data[i:],
                data[:j] + data[i:j] + data[j:],
                data[:i] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 4))) + data[j:],
            ]
        )
    return data


def data_sets(folder: Path, image: bytes) -> dict[Path, Path]:
    """By file that is damaged the folder of its data set: one of each form but Ultralytics'."""
    files: dict[str, str | bytes] = {
        "coco/train/_annotations.coco.json": json.dumps(COCO), "voc/Annotations/a.xml": VOC,
        "voc/ImageSets/Main/train.txt": "a\n", "darknet/obj.data": DARKNET, "darknet/obj.names": "cat\n",
        "darknet/train.txt": "data/a.jpg\n",
        "coco/train/a.jpg": image, "voc/JPEGImages/a.jpg": image, "darknet/a.jpg": image,
        "darknet/a.txt": LABELS[0], "parquet/train.parquet": b"",
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    objects = {"bbox": [[8.0, 4, 16, 8]], "category": ["cat"]}
    rows = {"image": [{"bytes": image[:2000], "path": "a.jpg"}] * 3, "objects": [objects] * 3}
    pl.DataFrame(rows).write_parquet(folder / "parquet" / "train.parquet", compression="uncompressed")
    names = ("coco/train/_annotations.coco.json", "voc/Annotations/a.xml", "darknet/obj.data", "parquet/train.parquet")
    return {folder / name: folder / name.partition("/")[0] for name in names}


def read(data: Path, kept: Path) -> int:
    """Read a data set as far as its tables go; how many images of it are refused."""
    found, refused = find_data(str(data), folder=kept), 0
    found.images("train")
    table = Table(*found.tables["train"]) if found.tables else None
    for row in range(len(table.files) if table else 0):
        assert table is not None
        try:
            refused += row in table.faults
            table.labels(row, (64, 64))
        except ValueError:
            refused += 1
    return refused


def main(seconds: float, seed: int) -> None:
    rng, cases, refused = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        yaml = draw_shapes(Path(folder), {"train": 2, "val": 1})
        image, label, data = next(yaml.parent.glob("images/train/*")), Path(folder, "l.txt"), yaml.parent / "fuzz.yaml"
        others = data_sets(Path(folder) / "others", image.read_bytes())
        whole, kept = {file: file.read_bytes() for file in others}, Path(folder) / "kept"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            label.write_bytes(damage(rng.choice(LABELS), rng))
            refused += isinstance(read_image(str(image), str(label), 0, 3), str)
            file = rng.choice([data, *others])
            file.write_bytes(damage(whole[file] if file in whole else rng.choice(YAMLS), rng))
            try:
                refused += read(others.get(file, data), kept)
            except InputError:
                refused += 1
            except BaseException:
                print(f"seed {seed}: {file}: {file.read_bytes()!r}", file=sys.stderr)
                raise
            shutil.rmtree(kept, ignore_errors=True)
            cases += 2
    print(f"{cases} damaged files, {refused} refused, none in an unexplained way (seed {seed})")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
