"""A data YAML is read as it is written, or refused with the place and the mend."""

import time
from pathlib import Path

import pytest

from train.config.errors import InputError
from train.config.plain import checked_name
from train.data.data_yaml import CLASSES, read_data_yaml

SPLITS = "train: a\nval: a\n"


def read(folder: Path, text: str | bytes):
    file = folder / "data.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_data_yaml(file)


def test_class_names_are_what_is_written(tmp_path: Path):
    written = ["no", "yes", "on", "off", "null", "1.0", "2024-01-01", "12:30", "~", "0x1F", "火", "🍎", "a b", "it's"]
    assert list(read(tmp_path, f"{SPLITS}names: [{', '.join(written)}]\n").names.values()) == written
    mapping = "names:\n  0: yes\n  1: 1e3\n"
    assert read(tmp_path, SPLITS + mapping).names == {0: "yes", 1: "1e3"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("names: [person, dog, person]", "the classes 0 and 2 are both named 'person'"),
        ("names: {0: a, 1: a}", "the classes 0 and 1 are both named 'a'"),
        ("names: [a]\nnames: [b]", "says `names` twice, in line 3 and in line 4"),
        ("names: [a]\ntrain: b", "says `train` twice, in line 1 and in line 4"),
        ("names: {0: a, 0: b}", "says `0` twice"),
        ("names: {person: 0}", "`names` has the key 'person'; write `0: person`"),
        ("names: {person: x}", "has the key 'person'; it must be a class index"),
        ("names: {-1: x}", "has the key '-1'"),
        ("names: {0: a, 2: b}", r"class indices in `names` are \[0, 2\]"),
        ("names: [[a], b]", "class 0 in `names` is a list or mapping"),
        ("names: {0: {a: b}}", "class 0 in `names` is a list or mapping"),
        ("names: person", "`names` is 'person'; it must list the class names"),
        ("names: []", "the class indices in `names`"),
        ('names: ["a\\nb"]', r"class 0 in `names` is 'a\\nb', which holds '\\n'"),
        ('names: ["\\e[41mX"]', r"which holds '\\x1b'"),
        ('names: ["a\\u202Eb"]', r"which holds '\\u202e'"),
        ('names: ["a\\u2028b"]', r"which holds '\\u2028'"),
        ('names: ["", b]', "class 0 in `names` is empty"),
        ('names: ["\\u200b", b]', "class 0 in `names` is empty"),
        ("names: [a]\ntest: ['']", "`test` is a list of 1; it must be a folder"),
        ("names: !!set {a, b}", "has the key 'a'"),
        ("names: {0x0: a}", "has the key '0x0'"),
        ("nc: 80.0", "says nc: 80.0; it must be a whole number"),
        ("names: [a]\npath: 2024-01-01", "says path: 2024-01-01; it must be a folder"),
        (f"names: [{'x' * 201}]", "has 201 characters; 200 is the most"),
        ("nc: 2", None),
        ("nc: two", "says nc: 'two'; it must be a whole number"),
        ("nc: true", "says nc: True; it must be a whole number"),
        ("nc: 0", "says nc: 0"),
        (f"nc: {CLASSES + 1}", "says nc"),
        ("nc: 3\nnames: [a]", "says nc: 3 but names 1"),
        ("names: [a]\nchannels: 0", "says channels: 0"),
        ("names: [a]\npath: [x]", "says path"),
        ("names: [a]\ntest: {images: x}", "`test` has annotations: None; it must be"),
        ("names: [a]\ntest: 5", "`test` is 5; it must be a folder"),
        ("names: [a]\ntest: [x, 5]", "`test` is"),
        ("names: [a]\nbackbone: []\nhead: []", "is the YAML of a model; that is --model"),
        ("names: [a]\nkpt_shape: [17]", r"says kpt_shape: a list of 1; it must be the number of keypoints and 2 or 3"),
        ("names: [a]\nkpt_shape: [3, 4]", "says kpt_shape"),
        ("names: [a]\nkpt_shape: [3, 2]\nflip_idx: [0, 1]", "says flip_idx: a list of 2; it must be the 3 keypoints"),
        ("names: [a]\nkpt_shape: [3, 2]\nflip_idx: [1, 2, 0]", "flip_idx.* two that change places.*name each other"),
        ("names: [a]\nkpt_shape: [3, 2]\nflip_idx: [0, 1, 9]", "says flip_idx"),
        ("names: [a]\nkpt_shape: [2, 3]\nkpt_oks_sigmas: [0.1]", "says kpt_oks_sigmas: a list of 1; it must be 2 numb"),
        ("names: [a]\nkpt_shape: [2, 3]\nkpt_oks_sigmas: [0.1, 0]", "it must be 2 numbers above 0"),
        ("names: [a]\nkpt_shape: [2, 3]\nkpt_names: [nose]", "says kpt_names: a list of 1; it must be 2 names"),
        ("names: [a\n", "is not YAML that can be read"),
        ("--- {}\n--- {}", "is not YAML that can be read"),
    ],
)
def test_what_is_refused_says_where_and_how_to_mend_it(tmp_path: Path, names: str, message: str | None):
    if message is None:
        assert read(tmp_path, f"{SPLITS}{names}\n").names == {0: "class_0", 1: "class_1"}
        return
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path, f"{SPLITS}{names}\n")
    assert str(error.value).isprintable()


def test_what_is_said_of_keypoints(tmp_path: Path):
    said = read(tmp_path, SPLITS + "names: [a]\nkpt_shape: [3, 3]\nflip_idx: [0, 2, 1]\nkpt_names: {0: [nose, l, r]}\n")
    assert (said.keypoints, said.flip_idx, said.sigmas) == ((3, 3), (0, 2, 1), ())
    assert said.keypoint_names == ("nose", "l", "r")
    more = read(tmp_path, SPLITS + "names: [a]\nkpt_shape: [2, 2]\nkpt_oks_sigmas: [1, 0.5]\n")
    assert (more.sigmas, more.keypoint_names) == ((1.0, 0.5), ("0", "1"))
    assert read(tmp_path, SPLITS + "names: [a]\nflip_idx: [5]\n").keypoints == ()


def test_names_as_json_writes_them(tmp_path: Path):
    assert read(tmp_path, SPLITS + r'names: ["\ud83c\udf4e", "\u706b"]').names == {0: "🍎", 1: "火"}
    with pytest.raises(InputError, match="which holds"):
        read(tmp_path, SPLITS + r'names: ["\ud83c"]')


def test_encodings_and_sizes(tmp_path: Path, monkeypatch):
    assert read(tmp_path, "\ufeff" + SPLITS + "names: [é]\r\n").names == {0: "é"}
    with pytest.raises(InputError, match=r"it is UTF-16\. Save it as UTF-8"):
        read(tmp_path, (SPLITS + "names: [a]\n").encode("utf-16"))
    with pytest.raises(InputError, match=r"it is not UTF-8 \(byte 24\). Save it as UTF-8"):
        read(tmp_path, SPLITS.encode() + b"names: [\xe9]\n")
    monkeypatch.setattr("train.data.data_yaml.LARGEST", 10)
    with pytest.raises(InputError, match="is larger than"):
        read(tmp_path, SPLITS)


def test_an_alias_bomb_is_refused_before_it_is_expanded(tmp_path: Path):
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
    started = time.monotonic()
    with pytest.raises(InputError, match="class 0 in `names` is a list or mapping"):
        read(tmp_path, f"{SPLITS}a0: &a0 [x]\n{levels}names: [*a9]\n")
    for key in ("train", "nc", "path"):
        with pytest.raises(InputError, match=f"{key}.* a list of 9; it must be"):
            read(tmp_path, f"a0: &a0 [x]\n{levels}{key}: *a9\nnames: [a]\n")
    assert time.monotonic() - started < 2  # seconds; it took 36


def test_a_pipe_or_a_device_is_no_data_yaml():
    with pytest.raises(InputError, match="cannot be read: it is no regular file"):
        read_data_yaml(Path("/dev/zero"))


def test_names_of_any_script_are_kept():
    for name in ("火车", "한국어", "हिन्दी", "سيارة", "👩\u200d🚒", "mañana", "Δ-7/8"):
        assert checked_name(name, "x") == name
