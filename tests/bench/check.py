"""What annotation files and the check of a data set cost, and what a peer finds: `make bench-check`.

usage: python -m tests.bench.check [--data DATA.yaml] [--images 118000] [--annotations 860000] [--only json check peer]

`json`: COCO's JSON of train2017's size, made here with polygons as long as COCO's, read in turns by this project, from
the file to the index, and by pycocotools' COCO(file). `check`: train/check_data.py on --images links to the images of
--data (the built-in shapes without it), of which each is a copy of another, first and again. `peer`: LibreYOLO's doctor
(pip install libreyolo) and this one on the same planted faults. Prints Markdown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.data import ROOT, linked, sources

TURNS, POINTS = 3, 24  # points of an outline
SIZE = (480, 640)


def annotated(file: Path, images: int, annotations: int) -> None:
    """Write a JSON file in COCO's form, images and annotations in any order."""
    rng = np.random.default_rng(0)
    of, category = rng.integers(0, images, annotations), rng.integers(1, 81, annotations)
    corners = rng.uniform((0, 0), (500, 350), (annotations, 2))
    sides = rng.uniform(10, 120, (annotations, 2))
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    circle = (np.stack((np.cos(angles), np.sin(angles)), 1) + 1) / 2
    with open(file, "w") as opened:
        entries = [
            {"id": int(i), "file_name": f"{i:012}.jpg", "height": SIZE[0], "width": SIZE[1]}
            for i in rng.permutation(images)
        ]
        kinds = [{"id": k, "name": f"class {k}"} for k in range(1, 81)]
        opened.write(f'{{"images": {json.dumps(entries)}, "categories": {json.dumps(kinds)}, "annotations": [')
        for i in range(annotations):
            outline = (corners[i] + circle * sides[i]).round(2)
            box = [round(float(value), 2) for value in (*corners[i], *sides[i])]
            one = {"id": i + 1, "image_id": int(of[i]), "category_id": int(category[i]), "iscrowd": 0, "bbox": box}
            one |= {"area": round(box[2] * box[3] * 0.7, 2), "segmentation": [outline.ravel().tolist()]}
            opened.write(json.dumps(one) + ("," if i + 1 < annotations else "]}"))


def job(name: str, *arguments: object) -> float:
    """Seconds of one piece of work, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.check", "--job", json.dumps([name, *map(str, arguments)])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def job_index(data: str, kept: str, carries: Any) -> float:
    """This project's reading of a data set: the annotation file and the index."""
    from accelerate import Accelerator

    from train.config.options import Data
    from train.data.files import find_data
    from train.data.scan import read_index

    accelerator, begun = Accelerator(cpu=True), time.perf_counter()
    found = find_data(data, carries=carries, folder=Path(kept))
    read_index(found, ("train",), Data(index_dir=kept), accelerator)
    return time.perf_counter() - begun


def job_table(data: str, kept: str, carries: Any) -> float:
    """Of it the annotation file alone."""
    from train.data.files import find_data

    begun = time.perf_counter()
    find_data(data, carries=carries, folder=Path(kept))
    return time.perf_counter() - begun


def job_pycocotools(file: str) -> float:
    """pycocotools' reading of the annotation file."""
    from pycocotools.coco import COCO

    begun = time.perf_counter()
    COCO(file)
    return time.perf_counter() - begun


def measure_json(folder: Path, pairs: list[tuple[Path, Path]], images: int, annotations: int) -> None:
    """The rows of annotation files."""
    (folder / "images").mkdir()
    for i in range(images):
        os.link(pairs[i % len(pairs)][0], folder / "images" / f"{i:012}.jpg")
    file = folder / "train.json"
    annotated(file, images, annotations)
    content = {"path": str(folder), "train": {"images": "images", "annotations": "train.json"}}
    content["val"] = content["train"]
    (folder / "data.yaml").write_text(json.dumps(content))
    seconds: dict[str, list[float]] = {}
    for turn in range(TURNS):
        for name, arguments in (
            ("boxes", ("table", folder / "data.yaml", folder / f"b{turn}", "boxes")),
            ("polygons", ("table", folder / "data.yaml", folder / f"p{turn}", "polygons")),
            ("index", ("index", folder / "data.yaml", folder / f"i{turn}", "boxes")),
            ("again", ("index", folder / "data.yaml", folder / f"i{turn}", "boxes")),
            ("pycocotools", ("pycocotools", file)),
        ):
            seconds.setdefault(name, []).append(job(*arguments))
    found = {name: statistics.median(values) for name, values in seconds.items()}
    what = f"COCO JSON of {images:,} images and {annotations:,} annotations, {file.stat().st_size / 1e6:.0f} MB"
    theirs = found["pycocotools"]
    for name, words in (
        ("boxes", f"{what}: its boxes as a table"),
        ("polygons", "the same, with its polygons"),
        ("index", "the table of boxes and the index, all images looked at"),
        ("again", "both, the next time"),
    ):
        print(
            f"| {words} | COCO(file) {theirs:.1f} s | {found[name]:.1f} s | {theirs / found[name]:.2f}x |", flush=True
        )


def measure_check(data: str, images: int, folder: Path) -> None:
    """The rows of the check."""
    command = [sys.executable, str(ROOT / "train" / "check_data.py"), data, "--index-dir", str(folder / "kept")]
    for what in (f"check of {images:,} images, first", "the same, again"):
        begun = time.perf_counter()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr
        print(f"| {what} | | {time.perf_counter() - begun:.0f} s | |", flush=True)


PEER = """
import sys
from libreyolo.doctor import diagnose
for one in diagnose(sys.argv[1], progress=False).findings:
    print(one.check_id, *[str(path).rpartition("/")[2] for path in one.paths], sep="|")
"""


def compare(folder: Path) -> None:
    """What both find of the same faults, a row for each."""
    from tests.data.test_check_data import clean, plant

    file = clean(folder / "data")
    planted = plant(file)
    command = [sys.executable, str(ROOT / "train" / "check_data.py"), str(file), "--json"]
    ours = json.loads(subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout)["findings"]
    done = subprocess.run([sys.executable, "-c", PEER, str(file)], cwd=folder, capture_output=True, text=True)
    theirs: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        check, *names = line.split("|")
        for name in names or [""]:
            theirs.setdefault(name.rpartition(".")[0], []).append(check)
    if done.returncode:
        print(f"LibreYOLO's doctor: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    print("| planted | file | here | LibreYOLO's doctor |\n| --- | --- | --- | --- |")
    for kind, name, where in sorted(planted):
        mine = [f"{one['level']}, {one['where'] or 'file'}" for one in ours
                if (one["kind"], Path(one["file"]).name, one["where"]) == (kind, name, where)]  # fmt: skip
        about = theirs.get(name.rpartition(".")[0], [])
        if name == "data.yaml":  # of the whole data set, which its findings name no file of
            about = [check for check in theirs.get("", []) if check.startswith("balance.")]
        said = ", ".join(sorted({*about} - {"labels.identical_files"}))  # which all the planted ones are by chance
        print(f"| {kind} | {name} | {', '.join(mine[:1]) or 'not found'} | {said or 'not found'} |")


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a data YAML with real images; without it the built-in shapes")
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--annotations", type=int, default=860_000)
    parser.add_argument("--only", nargs="+", choices=("json", "check", "peer"), default=["json", "check", "peer"])
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        name, *arguments = json.loads(given.job)
        print(globals()[f"job_{name}"](*arguments))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pairs, names = sources(given.data, folder)
        if {"json", "check"} & {*given.only}:
            print("| | compared with | here | |\n| --- | --- | --- | --- |")
        if "json" in given.only:
            (folder / "json").mkdir()
            measure_json(folder / "json", pairs, given.images, given.annotations)
        if "check" in given.only:
            measure_check(linked(pairs, names, folder / "check", given.images, 128), given.images, folder)
        if "peer" in given.only:
            compare(folder)


if __name__ == "__main__":
    main()
