"""Data sets that are Hugging Face's parquet files."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl
import pytest
import yaml
from accelerate import Accelerator

from tests.conftest import DETECT, ROOT, TINY, succeed
from tests.data.test_coco_json import NAMES, assert_ap_is_pycocotools, write
from tests.labels import to_train_on, to_validate_on
from train.config.errors import InputError
from train.config.options import TrainConfig
from train.data import cache, huggingface
from train.data.files import find_data
from train.data.huggingface import parquet_splits
from train.data.sets import TrainSet
from train.data.tables import Table
from train.evaluation.cocofiles import read_truth
from train.processes import room
from train.processes.holders import take

PNG = cv2.imencode(".png", np.zeros((32, 64, 3), np.uint8))[1].tobytes()
BOX = {"bbox": [8.0, 4, 16, 8], "category": 1}
Row = tuple[Any, list[dict[str, Any]]]  # an image and its objects


def described(layout: str, names: list[str]) -> Any:
    """The features as a version of `datasets` writes them: struct of lists and list of structs, before 4 and since."""
    box = {"feature": {"dtype": "float64", "_type": "Value"}, "length": 4, "_type": "Sequence"}
    label = {"names": names, "_type": "ClassLabel"}
    return {
        "lists": {"bbox": {"feature": box, "_type": "List"}, "category": {"feature": label, "_type": "List"}},
        "lists 2": {"feature": {"bbox": box, "category": label}, "length": -1, "_type": "Sequence"},
        "structs": {"feature": {"bbox": box, "category": label}, "_type": "List"},
        "structs 2": [{"bbox": box, "category": label}],
    }[layout]


def write_parquet(file: Path, rows: list[Row], layout: str = "lists", names: Any = NAMES, kind: Any = pl.Int64) -> None:
    """A file of images and objects, whose categories are of this kind, in one of the two layouts."""
    kinds = {"bbox": pl.List(pl.Float64), "category": kind, "iscrowd": pl.Int64, "area": pl.Float64}
    objects: list[Any] = [[{key: one.get(key) for key in kinds} for one in each] for _, each in rows]
    form: Any = pl.List(pl.Struct(kinds))
    if layout.startswith("lists"):
        objects = [{key: [one[key] for one in each] for key in kinds} for each in objects]
        form = pl.Struct({key: pl.List(value) for key, value in kinds.items()})
    image = pl.Struct({"bytes": pl.Binary, "path": pl.String})
    frame = pl.DataFrame({"image": [image for image, _ in rows], "objects": objects}, {"image": image, "objects": form})
    features = {"info": {"features": {"objects": described(layout, names)}}} if names else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(file, metadata={"huggingface": json.dumps(features)})


def parquet_of(coco: Path, folder: Path, layout: str) -> Path:
    """The data set of COCO's JSON files beside this YAML as parquet files of five images each."""
    for split, name in (("train", "train"), ("val", "validation")):
        content = json.loads((coco.parent / f"{split}.json").read_text())
        numbers = {category["id"]: i for i, category in enumerate(content["categories"])}
        rows: list[Row] = []
        for image in content["images"]:
            data = (coco.parent / "images" / split / image["file_name"]).read_bytes()
            objects = [
                {"bbox": [*map(float, a["bbox"])], "category": numbers[a["category_id"]], "iscrowd": a["iscrowd"]}
                for a in content["annotations"]
                if a["image_id"] == image["id"]
            ]
            rows.append(({"bytes": data, "path": image["file_name"]}, objects))
        files = -(-len(rows) // 5)
        for number in range(files):
            file = folder / "data" / f"{name}-{number:05}-of-{files:05}.parquet"
            write_parquet(file, rows[5 * number : 5 * number + 5], layout)
    return folder


@pytest.mark.parametrize("layout", ["lists", "structs 2"])
def test_the_same_numbers_are_the_same_labels_samples_and_truth(
    layout: str, tmp_path: Path, accelerator: Accelerator, monkeypatch
):
    monkeypatch.setattr(huggingface, "CHUNK", 1)  # a row at a time
    text, coco = write(tmp_path, "boxes")
    found = []
    config = TrainConfig(imgsz=64, batch=4)
    for place in (text, parquet_of(coco, tmp_path / "parquet", layout)):
        data = find_data(str(place))
        assert data.names == dict(enumerate(NAMES))
        labels, val = to_train_on(data, config, accelerator), to_validate_on(data, config, accelerator)
        found.append((labels, data, read_truth(val, data, config, accelerator)))
    (ours, data, truth), (theirs, of_parquet, other) = found
    for array in ("sizes", "shapes", "first", "cls", "boxes", "usable", "ids"):
        assert np.array_equal(ours.source.arrays[array], theirs.source.arrays[array]), array
    assert len(theirs.source.arrays["boxes"]) > 10
    a, b = (TrainSet(labels, about, config, 32) for labels, about in ((ours, data), (theirs, of_parquet)))
    for position in range(len(a)):
        one, same = a[(0, position, True)], b[(0, position, True)]
        assert all(np.array_equal(one[name], same[name]) for name in ("img", "cls", "bboxes"))
    assert np.array_equal(truth.marks().boxes, other.marks().boxes)
    assert np.array_equal(truth.marks().area, other.marks().area)
    with pytest.raises(InputError, match=r"train/detect\.py trains on boxes"):
        find_data(str(tmp_path / "parquet"), carries="polygons")


def folder_of(folder: Path, rows: list[Row], **options: Any) -> Path:
    """A data set of these rows, to train and to validate on."""
    for name in ("train", "test"):
        write_parquet(folder / f"{name}.parquet", rows, **options)
    return folder


def faults_of(folder: Path, accelerator: Accelerator) -> list[str]:
    return to_train_on(find_data(str(folder)), TrainConfig(), accelerator).faults


def test_what_an_image_cannot_be_used_for_is_said(tmp_path: Path, accelerator: Accelerator):
    good = {"bytes": PNG, "path": None}
    broken: list[tuple[Any, Any, str]] = [
        (good, BOX | {"bbox": [1.0, 2, 3]}, r"object 2 has the bbox \[1.0, 2.0, 3.0\], not left, top, width, height"),
        (good, BOX | {"bbox": [1.0, 2, 3, float("nan")]}, r"object 2 has the bbox .*nan\], not left"),
        (good, BOX | {"bbox": [1e300, 2.0, 3, 4]}, r"object 2 has the bbox \[1e\+300, .*\], not left"),
        (good, BOX | {"bbox": None}, "object 2 has the bbox None, not left"),
        (good, BOX | {"category": 3}, "object 2 has the category 3; there are 0 to 2"),
        (good, BOX | {"category": -1}, "object 2 has the category -1; there are 0 to 2"),
        (good, BOX | {"category": None}, "object 2 has the category None; there are 0 to 2"),
        (good, BOX | {"bbox": [60.0, 4, 16, 8]}, r"the bbox \[60.0, 4.0, 16.0, 8.0\] .* leaves its image of 64x32"),
        (None, BOX, "it has no image"),
        ({"bytes": None, "path": None}, BOX, "it has no image"),
        ({"bytes": b"GIF89a", "path": "a.gif"}, BOX, "its image is in no known form: it begins with 474946383961"),
        ({"bytes": PNG[:60], "path": "a.png"}, BOX, "not a readable image"),
        ({"bytes": None, "path": "gone.png"}, BOX, "it has no image but the path 'gone.png', where no file is in"),
    ]
    for layout in ("lists", "structs"):
        rows: list[Row] = [(good, [BOX])] + [(image, [BOX, one]) for image, one, _ in broken]
        rows.append((good, [BOX | {"bbox": [8.0, 4, 0, 8]}]))  # a box without a side is none
        faults = faults_of(folder_of(tmp_path / layout, rows, layout=layout), accelerator)
        assert len(faults) == len(broken)
        for number, (_, _, message) in enumerate(broken, 2):
            odd = [fault for fault in faults if re.search(message, fault)]
            assert odd, message
            if "leaves" not in message and "readable" not in message:
                assert any(f"train.parquet: row {number}: " in fault for fault in odd), (message, odd)
    kinds = {"bbox": pl.List(pl.List(pl.Float64)), "category": pl.List(pl.Int64)}
    frame = pl.read_parquet(tmp_path / "lists" / "train.parquet").head(2)
    metadata = pl.read_parquet_metadata(tmp_path / "lists" / "train.parquet")
    odd = [{"bbox": [[8.0, 4, 16, 8]], "category": [1]}, {"bbox": [[8.0, 4, 16, 8]], "category": [1, 2]}]
    frame = frame.with_columns(objects=pl.Series(odd, dtype=pl.Struct(kinds)))
    frame.write_parquet(tmp_path / "train.parquet", metadata={"huggingface": metadata["huggingface"]})
    assert "row 2: it has 1 bbox, 2 category" in faults_of(tmp_path, accelerator)[0]


def test_the_names_of_the_classes(tmp_path: Path, accelerator: Accelerator):
    image = {"bytes": PNG, "path": "a.png"}
    for layout in ("lists", "lists 2", "structs", "structs 2"):
        folder = folder_of(tmp_path / layout, [(image, [BOX])], layout=layout)
        assert find_data(str(folder)).names == dict(enumerate(NAMES)), layout
    words: list[Row] = [(image, [BOX | {"category": "wedge"}, BOX | {"category": "disc"}])]
    folder = folder_of(tmp_path / "words", words, names=None, kind=pl.String)
    write_parquet(folder / "test.parquet", [(image, [BOX | {"category": "box"}])], names=None, kind=pl.String)
    data = find_data(str(folder))
    assert data.names == {0: "box", 1: "disc", 2: "wedge"}  # by the alphabet, of all splits
    with pytest.raises(InputError, match=r"words has no `val` images, but train, test; --split of a training or val"):
        data.images("val")
    assert to_train_on(data, TrainConfig(), accelerator)[0].cls.tolist() == [2, 1]
    folder = folder_of(tmp_path / "numbers", [(image, [BOX])], names=None)
    with pytest.raises(InputError, match=r"train\.parquet has numbers as categories, .* data\.yaml .* `names: \["):
        find_data(str(folder))
    (folder / "data.yaml").write_text("names: [cat, dog]\n")
    data = find_data(str(folder))
    assert data.names == {0: "cat", 1: "dog"}
    assert to_train_on(data, TrainConfig(), accelerator)[0].cls.tolist() == [1]
    (folder / "data.yaml").write_text("names: [cat]\n")
    assert "there are 0 to 0" in faults_of(folder, accelerator)[0]


@pytest.mark.parametrize("kind", ["sequence", "list", "struct"])
def test_class_names_stand_in_the_readme_alone(kind: str, tmp_path: Path):
    folder = folder_of(tmp_path / "numbers", [({"bytes": PNG, "path": "a.png"}, [BOX])], names=None)
    label = {"class_label": {"names": {"1": "dog", "0": "cat"}}}
    category = {"name": "category"} | ({"sequence": label} if kind == "struct" else {"dtype": label})
    features = [{"name": "image", "dtype": "image"}, {"name": "objects", kind: [{"name": "bbox"}, category]}]
    card = "---\n" + yaml.safe_dump({"license": "mit", "dataset_info": {"features": features}}) + "---\n# Pets\n"
    (folder / "README.md").write_text(card)
    assert find_data(str(folder)).names == {0: "cat", 1: "dog"}
    (folder / "data.yaml").write_text("names: [a, b]\n")
    assert find_data(str(folder)).names == {0: "a", 1: "b"}  # by whoever has written it for this
    (folder / "data.yaml").unlink()
    for text in (
        "", "# Pets", card.replace("dog", "cat"), card.replace("'1'", "'2'"), card.replace("class_label", "int"),
        card.replace("cat", "!!python/object/apply:os.getcwd []"), "---\n&a [*a]\n---\n", "---\ndataset_info: [\n",
        "---\ndataset_info: {features: [&a {name: objects, list: *a}]}\n---\n",
    ):  # fmt: skip
        (folder / "README.md").write_text(text)
        with pytest.raises(InputError, match=r"neither it nor README\.md says what they are called"):
            find_data(str(folder))


def test_a_broken_file_is_one_message(tmp_path: Path):
    image = {"bytes": PNG, "path": "a.png"}
    folder = folder_of(tmp_path / "good", [(image, [BOX])])
    whole = (folder / "train.parquet").read_bytes()
    for content in (b"", b"PAR1", whole[:-9], whole[: len(whole) // 2], b"\0" * 500):
        (folder / "train.parquet").write_bytes(content)
        with pytest.raises(InputError, match=r"train\.parquet is not a parquet file that can be read: .* Download it"):
            find_data(str(folder))
    for columns, message in (
        ({"image": [b"x"], "label": [1]}, r"has the columns image \(Binary\), label \(Int64\); Hugging Face's object"),
        ({"image": ["x"], "objects": [{"bbox": [[1.0]], "category": [1]}]}, r"has the columns image \(String\)"),
        ({"image": [b"x"], "objects": [{"bbox": [[1.0]], "category": [0.5]}]}, r"Float64.*a number or a name"),
        ({"image": [b"x"], "objects": [{"bbox": [1.0], "category": 1}]}, "'category': Int64.*a number or a name"),
        ({"image": [b"x"], "objects": [[{"bbox": [1.0], "category": [1]}]]}, r"'category': List\(Int64\).*a number or"),
    ):
        pl.DataFrame(columns).write_parquet(folder / "train.parquet")
        with pytest.raises(InputError, match=message):
            find_data(str(folder))
    (folder / "train.parquet").unlink()
    for number, names in enumerate((NAMES, NAMES[::-1])):
        write_parquet(folder / f"train-{number}.parquet", [(image, [BOX])], names=names)
    with pytest.raises(InputError, match=r"train-1\.parquet has other classes in its metadata than .*train-0\.parq"):
        find_data(str(folder))
    with pytest.raises(InputError, match="names two classes 'a' in its metadata"):
        find_data(str(folder_of(tmp_path / "twice", [(image, [BOX])], names=["a", "b", "a"])))
    with pytest.raises(InputError, match=r"without Hugging Face's .*/good is such a folder; name that"):
        find_data(str(tmp_path))


def test_no_path_leads_out_of_the_folder(tmp_path: Path, accelerator: Accelerator):
    home = tmp_path / "set"
    home.mkdir()
    (home / "inside.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    paths = [
        "../../evil.png",
        "/evil.png",
        "a\0b.png",
        "..",
        ".hidden.png",
        "a" * 300,
        "é" * 150,
        "x/y.png",
        "z\\y.png",
    ]
    rows: list[Row] = [({"bytes": PNG, "path": path}, [BOX]) for path in [*paths, "Y.png", None, "evil.jpg"]]
    rows += [({"bytes": None, "path": path}, [BOX]) for path in ("inside.png", "./inside.png")]
    rows += [({"bytes": None, "path": path}, [BOX]) for path in ("../secret.png", f"{tmp_path}/secret.png", "a\0b")]
    before = sorted(path for path in tmp_path.rglob("*"))
    write_parquet(home / "train.parquet", rows)
    data = find_data(str(home), folder=tmp_path / "kept")
    names = [os.path.basename(file) for file in data.images("train")]
    (folder,) = {os.path.dirname(file) for file in data.images("train")}
    assert sorted(os.listdir(folder)) == names
    assert len({name.lower() for name in names}) == len(names) == len(rows)
    assert {"evil.png", "evil_1.png", "00000002.png", "y.png", "y_8.png", "Y_9.png", "inside.png"} <= {*names}
    assert sum(name.endswith(".png") for name in names) == len(rows) - 3
    written = {path for path in tmp_path.rglob("*") if tmp_path / "kept" not in (path, *path.parents)}
    assert written == {*before, home / "train.parquet"}
    labels = to_train_on(data, TrainConfig(index_dir=str(tmp_path / "kept")), accelerator)
    assert len(labels) == len(rows) - 3
    assert all("where no file is in" in fault for fault in labels.faults)


def test_images_are_written_once_and_make_way_for_those_of_the_next_state(tmp_path: Path, monkeypatch):
    kept, said = tmp_path / "kept", []
    rows: list[Row] = [({"bytes": PNG, "path": f"{i}.png"}, [BOX]) for i in range(25)]
    write_parquet(tmp_path / "train.parquet", rows)
    monkeypatch.setattr(huggingface, "QUIET", -1)
    data = find_data(str(tmp_path), folder=kept, say=said.append)
    (folder,) = kept.glob("*.inside*")
    assert len(said) == 1 + 25 // 3  # a line for each tenth
    assert said[1] == f"3 of 25 images written to {kept}"
    first = os.stat(folder / "7.png")
    find_data(str(tmp_path), folder=kept, say=None)
    assert os.stat(folder / "7.png") == first
    (folder / "7.png").unlink()
    find_data(str(tmp_path), folder=kept)
    assert len(os.listdir(folder)) == 25
    held = take(folder)  # by a run
    write_parquet(tmp_path / "train.parquet", rows[:20])
    data = find_data(str(tmp_path), folder=kept)
    assert len(data.images("train")) == 20
    assert folder.is_dir()
    assert held is not None
    os.close(held)
    write_parquet(tmp_path / "train.parquet", rows[:10])
    data = find_data(str(tmp_path), folder=kept)
    (other,) = kept.glob("*.inside*")
    assert len(os.listdir(other)) == len(data.images("train")) == 10
    assert other != folder
    monkeypatch.setattr(room, "SHARED", tmp_path)
    monkeypatch.setattr(sys, "argv", ["cache", "--index-dir", str(kept)])
    cache.main()  # make clean-cache
    assert not list(kept.glob("*.inside*"))


def test_a_disk_without_room_is_named(tmp_path: Path, small_disk: Path, monkeypatch):
    rng = np.random.default_rng(0)
    rows: list[Row] = [({"bytes": PNG + rng.bytes(400_000), "path": None}, [BOX]) for _ in range(4)]
    write_parquet(tmp_path / "set" / "train.parquet", rows)
    with pytest.raises(InputError, match=r"take 1.6 MB in .*small, where 1.0\d MB are free\. .* --index-dir"):
        find_data(str(tmp_path / "set"), folder=small_disk)
    monkeypatch.setattr(room, "disk", lambda folder: 10**9)
    with pytest.raises(InputError, match=r"cannot be written to .*small: No space left on device\. .* --index-dir"):
        find_data(str(tmp_path / "set"), folder=small_disk)
    assert not os.listdir(small_disk)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written to .*file: .* --index-dir"):
        find_data(str(tmp_path / "set"), folder=tmp_path / "file")


EXPORT = """
import sys
from pathlib import Path
from train.data.files import find_data
print(len(find_data(sys.argv[1], folder=Path(sys.argv[2])).images("train")))
"""
KILLED = """
import os, signal
from train.data import huggingface
def half(path, row, taken, whole=huggingface._stem):
    return os.kill(os.getpid(), signal.SIGKILL) if row == 7 else whole(path, row, taken)
huggingface._stem = half
"""


@pytest.mark.slow
def test_an_export_that_is_killed_and_two_at_once(tmp_path: Path):
    rows: list[Row] = [({"bytes": PNG, "path": f"{i}.png"}, [BOX]) for i in range(300)]
    write_parquet(tmp_path / "set" / "train.parquet", rows)
    kept = tmp_path / "kept"
    more = [str(tmp_path / "set"), str(kept)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED + EXPORT, *more]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    (draft,) = kept.iterdir()
    assert draft.name.endswith(".draft")
    assert len(os.listdir(draft)) == 7
    os.utime(draft, (1, 1))  # nobody writes it any more
    command = [sys.executable, "-c", EXPORT, *more]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in both] == ["300\n"] * 2
    assert [process.returncode for process in both] == [0, 0]
    names = sorted(file.name.partition(".")[2] for file in kept.iterdir())
    assert [name[:5] for name in names] == ["insid", "table"]
    assert Table(next(map(str, kept.glob("*.table*")))).files == sorted(f"{i}.png" for i in range(300))


def test_where_the_files_of_a_split_are(tmp_path: Path):
    for number, (files, found) in enumerate((
        (("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet", "data/test-0.parquet"),
         {"train": "data/train-*", "val": "data/validation-*", "test": "data/test-*"}),
        (("train.parquet", "valid.parquet"), {"train": "train", "val": "valid"}),
        (("train/0.parquet", "val/0.parquet", "val/1.parquet"), {"train": "train/*", "val": "val/*"}),
        (("data/train/a.parquet", "data/dev/a.parquet"), {"train": "data/train/*", "val": "data/dev/*"}),
        (("default/train/0.parquet", "default/test/0.parquet"), {"train": "default/train/*", "test": "default/test/*"}),
        (("0000.parquet", "._0000.parquet"), {"train": "*"}),
        (("pretrain-0.parquet", "values.txt"), {"train": "*"}),
        (("a/train.parquet",), {}),
    )):  # fmt: skip
        for file in files:
            (tmp_path / str(number) / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / str(number) / file).touch()
        splits = parquet_splits(tmp_path / str(number))
        assert {split: entry["annotations"] for split, entry in splits.items()} == {
            split: f"{pattern}.parquet" for split, pattern in found.items()
        }


@pytest.mark.slow
def test_the_ap_of_a_training_is_pycocotools_on_the_same_numbers(tmp_path: Path):
    _, coco = write(tmp_path, "boxes")
    place = parquet_of(coco, tmp_path / "parquet", "lists")
    options = ["--model", TINY, "--imgsz", 64, "--batch", 8, "--nbs", 8, "--epochs", 2, "--conf", 0.0001, "--lr0", 0.05]
    options += ["--workers", 0, "--trackers", "none", "--no-plots", "--index-dir", tmp_path / "index"]
    said = succeed(2, DETECT, *options, "--data", place, "--name", "parquet", cwd=tmp_path)
    assert said.count(f"reading {place}/data/train-00000-of-00003.parquet") == 1
    run = tmp_path / "runs" / "detect" / "parquet"
    content = json.loads((coco.parent / "val.json").read_text())
    numbers = {category["id"]: i for i, category in enumerate(content["categories"])}
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    content["annotations"] = [
        a | {"category_id": numbers[a["category_id"]]} for a in content["annotations"] if not a["iscrowd"]
    ]
    (tmp_path / "val.json").write_text(json.dumps(content))
    assert_ap_is_pycocotools(run, tmp_path / "val.json")
    again = succeed(1, DETECT, "--resume", run, "--epochs", 3, cwd=tmp_path)
    assert "reading" not in again
