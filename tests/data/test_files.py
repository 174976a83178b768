"""Where the images of a data set are."""

from pathlib import Path

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
