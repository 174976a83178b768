"""Where the images of a data set are."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from accelerate import Accelerator

from tests.labels import to_train_on, to_validate_on
from train.config.errors import InputError
from train.config.options import EvalConfig, TrainConfig
from train.data.files import find_data


def test_paths_are_relative_to_the_yaml_or_to_the_working_directory(shapes: Path, tmp_path: Path, monkeypatch):
    assert len(find_data(str(shapes)).images("train")) == 40
    monkeypatch.chdir(shapes.parent.parent)
    (tmp_path / "data.yaml").write_text("path: shapes\ntrain: images/train\nval: images/val\nnames: [a, b, c]\n")
    data = find_data(str(tmp_path / "data.yaml"))
    assert len(data.images("val")) == 21
    assert data.names == {0: "a", 1: "b", 2: "c"}


def test_a_folder_means_the_data_yaml_in_it(shapes: Path, tmp_path: Path):
    assert len(find_data(str(shapes.parent)).images("train")) == 40
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"path: {shapes.parent}\nval: images/val\nnames: [a, b, c]\n")
    with pytest.raises(InputError, match=r"a folder; name its data YAML, such as .*/a\.yaml"):
        find_data(str(tmp_path))
    (tmp_path / "b.yaml").rename(tmp_path / "data.yaml")  # as labelling tools call it
    assert find_data(str(tmp_path)).name == str(tmp_path / "data.yaml")


def test_text_lists_and_lists_of_sources(shapes: Path, tmp_path: Path):
    root = shapes.parent
    some = sorted(root.glob("images/train/*.jpg"))[:3]
    (tmp_path / "some.txt").write_text("\n".join(map(str, some)) + "\n")
    (tmp_path / "data.yaml").write_text(
        f"path: {root}\ntrain: [{tmp_path / 'some.txt'}, images/val]\nval: {tmp_path / 'some.txt'}\nnames: [a, b, c]\n"
    )
    data = find_data(str(tmp_path / "data.yaml"))
    assert data.images("val") == [str(file) for file in some]
    assert len(data.images("train")) == 24
    (tmp_path / "some.txt").write_text("\n".join(map(str, [*some, some[0]])))
    accelerator = Accelerator(cpu=True)
    assert len(to_validate_on(data, EvalConfig(), accelerator)) == 3
    assert len(to_train_on(data, TrainConfig(), accelerator)) == 25  # as often as it is listed


def test_a_data_set_that_is_not_there_names_the_folders(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}/coco8.*nothing is downloaded"):
        find_data("coco8.yaml")  # Ultralytics' own, with a download script
    with pytest.raises(InputError, match="no such file"):
        find_data("nowhere.yaml")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [a]\nnc: 2\n")
    with pytest.raises(InputError, match="nc: 2 but names 1"):
        find_data("data.yaml")


def test_a_user_without_a_home_folder(shapes: Path, monkeypatch):
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert len(find_data(str(shapes)).images("val")) == 21


def test_nothing_in_a_yaml_is_executed(shapes: Path, tmp_path: Path):
    (tmp_path / "data.yaml").write_text(
        f"path: {shapes.parent}\ntrain: images/train\nval: images/val\nnames: [a, b, c]\n"
        f"download: |\n  from pathlib import Path\n  Path('{tmp_path}/ran').touch()\n"
    )
    find_data(str(tmp_path / "data.yaml"))
    (tmp_path / "evil.yaml").write_text("names: !!python/object/apply:os.system ['touch ran']\n")
    with pytest.raises(InputError, match="is not YAML"):
        find_data(str(tmp_path / "evil.yaml"))
    assert not (tmp_path / "ran").exists()


def test_forms_that_ultralytics_takes(shapes: Path, tmp_path: Path):
    for kind in ("images", "labels"):  # as Roboflow exports: ../ although the folder is beside the YAML; linked folders
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / kind).symlink_to(shapes.parent / kind / "train")
    (tmp_path / "data.yaml").write_text("train: ../train/images\nvalidation: ../train/images\nnc: 3\n")
    data = find_data(str(tmp_path / "data.yaml"))
    assert data.names == {0: "class_0", 1: "class_1", 2: "class_2"}
    assert len(data.images("train")) == len(data.images("val")) == 40
    for fraction, images in ((0.25, 10), (7, 7), (1000, 40), (1e-9, 1)):
        assert len(to_train_on(data, TrainConfig(fraction=fraction), Accelerator(cpu=True))) == images
    assert find_data(str(tmp_path / "data.yaml"), single_cls=True).names == {0: "item"}


def fill(folder: Path, names: dict[str, str]) -> None:
    """Small images, and text files, at these places."""
    for name, text in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jpg"):
            cv2.imwrite(str(folder / name), np.zeros((32, 64, 3), np.uint8))
        else:
            (folder / name).write_text(text)


def test_an_export_of_roboflows_in_yolos_form_as_it_is_unzipped(tmp_path: Path):
    fill(tmp_path, {
        f"{split}/{kind}": "1 0.5 0.5 0.2 0.2\n"
        for split in ("train", "valid", "test")
        for kind in ("images/a_jpg.rf.0b1c.jpg", "labels/a_jpg.rf.0b1c.txt")
    } | {"README.dataset.txt": "# animals\n", "README.roboflow.txt": "exported\n", "data.yaml": (
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['cat', 'dog']\n\n"
        "roboflow:\n  workspace: w\n  project: animals\n  version: 1\n  license: CC BY 4.0\n  url: https://example.com\n"
    )})  # fmt: skip
    data = find_data(str(tmp_path))
    for split, folder in (("train", "train"), ("val", "valid"), ("test", "test")):
        assert data.images(split) == [str(tmp_path / folder / "images" / "a_jpg.rf.0b1c.jpg")]
    assert [entry.cls.tolist() for entry in to_train_on(data, TrainConfig(), Accelerator(cpu=True))] == [[1]]


@pytest.mark.parametrize("before", ["data/", ""])
def test_exports_of_cvats_as_they_are_unzipped(before: str, tmp_path: Path):
    ultralytics = {"data.yaml": "names:\n  0: cat\n  1: dog\npath: .\ntrain: train.txt\nval: valid.txt\n"}
    darknet = {"obj.names": "cat\ndog\n", "obj.data": (
        f"classes = 2\ntrain = {before}train.txt\nvalid = {before}valid.txt\nnames = {before}obj.names\n"
        "backup = backup/\n"
    )}  # fmt: skip
    for files, images, labels in ((ultralytics, "images/{}", "labels/{}"), (darknet, "obj_{}_data", "obj_{}_data")):
        for split in ("train", "valid"):
            files |= {f"{split}.txt": "".join(f"{before}{images.format(split)}/{name}.jpg\n" for name in "ab")}
            files |= {f"{images.format(split)}/{name}.jpg": "" for name in "ab"}
            files |= {f"{labels.format(split)}/{name}.txt": "1 0.5 0.5 0.2 0.2\n" for name in "ab"}
    fill(tmp_path / "ultralytics", ultralytics)
    fill(tmp_path / "darknet", darknet)
    accelerator = Accelerator(cpu=True)
    for form, folder in (("ultralytics", "images/{}"), ("darknet", "obj_{}_data")):
        data = find_data(str(tmp_path / form))
        assert data.names == {0: "cat", 1: "dog"}
        for split, name in (("train", "train"), ("val", "valid")):
            place = tmp_path / form / folder.format(name)
            assert data.images(split) == [str(place / "a.jpg"), str(place / "b.jpg")]
        assert [entry.cls.tolist() for entry in to_train_on(data, TrainConfig(), accelerator)] == [[1], [1]]
    (tmp_path / "darknet" / "obj.data").write_text("train = train.txt\n")
    with pytest.raises(InputError, match=r"obj\.data names no `val` images; add a line `valid = valid\.txt`"):
        find_data(str(tmp_path / "darknet")).images("val")
    for text, message in (
        ("", r"obj\.names names 0 classes; it must be from 1 to 100000, one in a line"),
        ("cat\n\ncat\n", r"obj\.names: the classes 0 and 1 are both named 'cat'"),
        ("a\x1bb\n", r"obj\.names: class 0 is 'a\\x1bb', which holds"),
    ):
        (tmp_path / "darknet" / "obj.names").write_text(text)
        with pytest.raises(InputError, match=message):
            find_data(str(tmp_path / "darknet"))
    (tmp_path / "darknet" / "obj.names").unlink()
    with pytest.raises(InputError, match=r"obj\.names is no file; .*obj\.data must name a list of the class names"):
        find_data(str(tmp_path / "darknet"))
