"""What people get wrong: exit code 2, one message that names the value and the mend, nothing written."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.conftest import DETECT, POSE, ROOT, SEGMENT, VALIDATE, launch
from train.config.objects import Objects
from train.config.options import TrainConfig
from train.model.build import build_model
from train.model.weights import as_checkpoint

NAMES = "names: [circle, square, triangle]\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """A folder with broken data YAMLs, weights and options; every case is run in it."""
    folder = tmp_path_factory.mktemp("mistakes")
    root = f"path: {shapes.parent}\n"
    files = {
        "good.yaml": f"{root}train: images/train\nval: images/val\n{NAMES}",
        "empty.yaml": "",
        "nonames.yaml": f"{root}train: images/train\nval: images/val\n",
        "nc.yaml": f"{root}train: images/train\nval: images/val\nnc: 7\n{NAMES}",
        "gap.yaml": f"{root}train: images/train\nval: images/val\nnames: {{0: a, 2: b}}\n",
        "notrain.yaml": f"{root}train: images/nothing\nval: images/val\n{NAMES}",
        "noval.yaml": f"{root}train: images/train\n{NAMES}",
        "emptytrain.yaml": f"path: {folder}\ntrain: void\nval: void\n{NAMES}",
        "unlabelled.yaml": f"path: {folder}\ntrain: unlabelled\nval: unlabelled\n{NAMES}",
        "faulty.yaml": f"path: {folder}\ntrain: images\nval: images\n{NAMES}",
        "broken.yaml": "train: [a\n",
        "utf16.yaml": "",
        "swapped.yaml": f"{root}train: images/train\nval: images/val\nnames: {{circle: 0}}\n",
        "twins.yaml": f"{root}train: images/train\nval: images/val\nnames: [a, b, a]\n",
        "named.json": '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a\\nb"}]}',
        "twin.json": '{"images": [], "annotations": [], "categories": '
        '[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
        "deep.json": "[" * 5000,
        "binary.json": "",
        "args.yaml": "epochs: many\nmosaic: -3\n",
        "list.yaml": "- epochs\n",
        "segmented.yaml": "task: segment\nepochs: 3\n",
        "turned.yaml": "task: obb\n",
        "pose.yaml": f"{root}train: images/train\nval: images/val\nkpt_shape: [2, 3]\n{NAMES}",
        "mirrored.yaml": f"{root}train: images/train\nval: images/val\nkpt_shape: [2, 3]\nflip_idx: [1, 1]\n{NAMES}",
        "unknown.json": '[{"image_id": 777777, "category_id": 0, "bbox": [1, 2, 3, 4], "score": 0.5}]',
        "other.json": '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "circle"}]}',
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "utf16.yaml").write_bytes("train: a\n".encode("utf-16"))
    (folder / "binary.json").write_bytes(b"\xff\x00" * 50)
    (folder / "run" / "weights").mkdir(parents=True)
    (folder / "run" / "config.json").write_text("{}")
    (folder / "void").mkdir()
    (folder / "unlabelled").mkdir()
    cv2.imwrite(str(folder / "unlabelled" / "a.png"), np.zeros((64, 64, 3), np.uint8))
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for stem, row in (("a", "0 0.5 0.5 0.5 0.5"), ("b", "9 0.5 0.5 0.5 0.5")):
        cv2.imwrite(str(folder / "images" / f"{stem}.png"), np.zeros((64, 64, 3), np.uint8))
        (folder / "labels" / f"{stem}.txt").write_text(f"0 0.1 0.1 0.1 0.1\n{row}\n")

    (folder / "text.pt").write_text("not a checkpoint")
    (folder / "nothing.pt").write_bytes(b"")
    model, _ = build_model(TrainConfig(), "yolov8n.yaml", Objects(names={0: "circle", 1: "square", 2: "triangle"}))
    torch.save(as_checkpoint(model, {}, 0, {}), folder / "good.pt")
    (folder / "cut.pt").write_bytes((folder / "good.pt").read_bytes()[:100_000])
    gray, _ = build_model(
        TrainConfig(), "yolov8n.yaml", Objects(names={0: "circle", 1: "square", 2: "triangle"}, channels=1)
    )
    torch.save(as_checkpoint(gray, {}, 0, {}), folder / "gray.pt")
    code = (  # as the original YOLOv5 code would have saved it
        "import sys, types, torch\nm = types.ModuleType('models'); y = types.ModuleType('models.yolo')\n"
        "class DetectionModel: pass\nDetectionModel.__module__ = 'models.yolo'; y.DetectionModel = DetectionModel\n"
        "sys.modules.update({'models': m, 'models.yolo': y})\n"
        "torch.save({'model': DetectionModel()}, 'yolov5s.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    return folder


GOOD = ["--data", "good.yaml", "--imgsz", "64", "--epochs", "1", "--trackers", "none"]
CASES = [
    (["--epoch", "3"], "--epochs"),
    (["--epochs", "0", "--mosaic", "2", "--lr0", "-1"], r"--epochs is 0.*--lr0 is -1.*--mosaic is 2"),
    (["--epochs", "ten"], "ten"),
    (["--optimizer", "Lion"], "Lion"),
    (["--rect", "--multi-scale", "0.5"], "--rect and --multi-scale contradict each other"),
    (["--trackers", "none", "wandb"], "name trackers or `none`"),
    (["--trackers", "wandbb"], "'wandbb'; Accelerate knows .*wandb"),
    (["--trackers", "clearml"], "clearml, which is not installed: pip install clearml"),
    (["--mixed-precision", "fp16"], "fp16, which the CPU does not compute"),
    (["--val-precision", "fp16"], "--val-precision is fp16, which the CPU does not compute"),
    (["--val-interval", "0", "--val-fraction", "2"], "--val-fraction is 2.*--val-interval is 0"),
    (["--max-dets", "10", "1", "100"], r"--max-dets is \[10, 1, 100\]; it must be three rising numbers"),
    ([*GOOD, "--annotations", "gone.json"], r"gone\.json is not a COCO annotation file that can be read"),
    ([*GOOD, "--annotations", "other.json"], r"other\.json lacks 21 of 21 images"),
    (["--resume", "run", "--model", "x.pt"], "--resume goes on with the run's own options; leave out --model"),
    (["--resume", "gone"], r"gone/config\.json cannot be read"),
    (["--resume", "run"], r"--resume run: there is no run/weights/state_….pt; nothing was saved there yet"),
    (["--device", "0"], r"no --device here; instead: CUDA_VISIBLE_DEVICES=0,1 .* make train GPUS=2"),
    (["data=good.yaml", "epochs=3"], r"options are written --data good\.yaml --epochs 3"),
    (["--seed", "4294967296"], r"--seed is 4294967296; it must be between 0 and 4294967295"),
    ([*GOOD, "--log-file", "void"], r"--log-file is 'void', a folder; name a file in it"),
    ([*GOOD, "--log-file", "good.yaml/x/log.txt"], r"good\.yaml is a file\. Name another with --log-file"),
    ([*GOOD, "--classes", "99"], r"--classes names 99, but .*good\.yaml has the classes 0 to 2"),
    ([*GOOD, "--model", "good.yaml"], r"--model good\.yaml is the YAML of a data set; that is --data"),
    ([*GOOD, "--model", "run"], r"--model run is a folder; name a file\."),
    ([*GOOD, "--model", "best.onnx"], r"--model is 'best\.onnx', an exported model; name the \.pt checkpoint"),
    (["--data", "void"], r"--data is 'void', a folder without a data YAML"),
    (["--data", "utf16.yaml"], r"it is UTF-16\. Save it as UTF-8"),
    (["--data", "swapped.yaml"], r"`names` has the key 'circle'; write `0: circle`"),
    (["--data", "twins.yaml"], r"the classes 0 and 2 are both named 'a'"),
    (["--data", "other.json"], r"it must be a data YAML"),
    ([*GOOD, "--annotations", "named.json"], r"category 1 is 'a\\nb', which holds '\\n'"),
    ([*GOOD, "--annotations", "twin.json"], r"the categories 1 and 2 are both 'a'"),
    ([*GOOD, "--annotations", "deep.json"], r"deep\.json is not a COCO annotation file"),
    (
        [*GOOD, "--annotations", "binary.json"],
        r"binary\.json is not a COCO annotation file that can be read: it is not UTF",
    ),
    ([*GOOD, "--annotations", "/dev/zero"], r"it is no regular file"),
    (["--cfg", "args.yaml"], r"epochs is 'many'; it must be a whole number"),
    (["--cfg", "gone.yaml"], r"--cfg gone\.yaml cannot be read"),
    (["--cfg", "list.yaml"], r"--cfg list\.yaml holds no options"),
    (["--cfg", "broken.yaml"], r"--cfg broken\.yaml is not YAML"),
    (["--data", "gone.yaml"], r"'gone\.yaml', but there is no such file"),
    (["--data", "broken.yaml"], r"broken\.yaml is not YAML"),
    (["--data", "empty.yaml"], r"empty\.yaml has no `names`"),
    (["--data", "nonames.yaml"], r"nonames\.yaml has no `names`"),
    (["--data", "nc.yaml"], r"nc\.yaml says nc: 7 but names 3 classes"),
    (["--data", "gap.yaml"], r"class indices in `names` are \[0, 2\]"),
    (["--data", "notrain.yaml"], r"`train: images/nothing`, but there is no .*images/nothing"),
    (["--data", "noval.yaml"], r"names no `val` images"),
    (["--data", "emptytrain.yaml"], r"no images in .*void"),
    (["--data", "unlabelled.yaml"], r"no train image has a usable label"),
    (
        ["--data", "faulty.yaml", "--strict"],
        r"--strict.*labels/b\.txt: line 2 has class 9; there are the classes 0 to 2",
    ),
    ([*GOOD, "--imgsz", "100"], r"--imgsz is 100; .* The nearest is 96"),
    ([*GOOD, "--model", "gone.pt"], r"no checkpoint gone\.pt"),
    ([*GOOD, "--model", "gone.yaml"], r"no model gone\.yaml"),
    ([*GOOD, "--model", "text.pt"], r"text\.pt is not a checkpoint that can be loaded"),
    ([*GOOD, "--model", "nothing.pt"], r"nothing\.pt is not a checkpoint that can be loaded"),
    ([*GOOD, "--model", "cut.pt"], r"cut\.pt is not a checkpoint that can be loaded"),
    ([*GOOD, "--model", "gray.pt"], r"gray\.pt takes images of 1 channels, the data set has 3"),
    ([*GOOD, "--model", "yolov5s.pt"], r"original YOLOv5 code. Use its successor yolov5su\.pt"),
    ([*GOOD, "--model", "yolov8n-seg.yaml"], r"Segment head, of a segment model; train/segment\.py trains that"),
    ([*GOOD, "--model", "rtdetr-l.yaml"], r"RTDETRDecoder head; these scripts are for YOLO detect, segment and pose"),
    ([*GOOD, "--mask-ratio", "4"], r"There is no --mask-ratio here"),
    (["--cfg", "segmented.yaml"], r"segmented\.yaml is of the task 'segment'; train/segment\.py trains that"),
    (["--cfg", "turned.yaml"], r"turned\.yaml is of the task 'obb'; these scripts train detect, segment, pose"),
    ([*GOOD, "--freeze", "99"], r"--freeze is 99; this model has the layers 0 to 22"),
    ([*GOOD, "--freeze", "0", "77.cv2"], r"--freeze is 0 77\.cv2; this model has the layers 0 to 22"),
    ([*GOOD, "--end2end"], r"--end2end was given, but yolov8n\.yaml has no one-to-one head"),
    (
        [*GOOD, "--project", "good.yaml"],
        r"good\.yaml cannot be made: .*good\.yaml is a file\. Name another with --project",
    ),
]


TASK_CASES = [
    (SEGMENT, GOOD, r"no train image has a usable label.*boxes, without polygons; train/detect\.py"),
    (SEGMENT, [*GOOD, "--model", "yolov8n.yaml"], r"Detect head, of a detect model; train/detect\.py trains that"),
    (SEGMENT, [*GOOD, "--mask-ratio", "0"], r"--mask-ratio is 0; it must be between 1 and 32"),
    (SEGMENT, [*GOOD[2:], "--data", "pose.yaml"], r"names a kpt_shape: .* train/pose\.py"),
    (POSE, GOOD, r"good\.yaml names no kpt_shape, .*train/detect\.py"),
    (
        POSE,
        [*GOOD[2:], "--data", "pose.yaml", "--sigmas", "0.1", "-1"],
        r"--sigmas is \[0\.1, -1\.0\]; it must be 2 ",
    ),
    (POSE, [*GOOD[2:], "--data", "pose.yaml", "--pose", "-1"], r"--pose is -1\.0; it must be 0 or more"),
    (POSE, [*GOOD[2:], "--data", "pose.yaml", "--model", "yolo11n-seg.yaml"], r"train/segment\.py trains that"),
    (POSE, [*GOOD[2:], "--data", "mirrored.yaml"], r"says flip_idx: a list of 2"),
]


VALIDATE_CASES = [
    ([], "either --weights, a checkpoint, or --predictions"),
    (["--weights", "gone.pt"], r"no checkpoint gone\.pt"),
    (["--weights", "best.onnx"], r"--weights is 'best\.onnx', an exported model"),
    (["--weights", "run"], r"--weights run is a folder; name a file\."),
    (["--model", "good.pt"], r"no --model here; instead: --weights"),
    (
        ["--weights", "good.pt", "--data", "good.yaml", "--save-dir", "good.yaml"],
        r"good\.yaml is a file\. .*--save-dir",
    ),
    (["--predictions", "deep.json", "--data", "good.yaml"], r"deep\.json is not a COCO results file"),
    (["--weights", "cut.pt"], r"cut\.pt is not a checkpoint that can be loaded"),
    (["--weights", "good.pt"], r"good\.pt does not say what it was trained on"),
    (["--weights", "good.pt", "--data", "good.yaml", "--split", "test"], "names no `test` images"),
    (["--predictions", "gone.json", "--data", "good.yaml"], r"gone\.json is not a COCO results file"),
    (["--predictions", "other.json", "--data", "good.yaml"], r"other\.json is not a COCO results file"),
    (
        ["--predictions", "unknown.json", "--data", "good.yaml"],
        "names image ids that the data set does not have.*777777",
    ),
    (["--predictions", "unknown.json"], "--predictions needs --data"),
]


# What only the labels or the images can say: all else is told before they are read, which takes minutes at times
AFTER_LABELS = ("usable label", "--strict", "lacks 21")


def test_each_mistake_is_one_message_with_its_mend(home: Path, tmp_path: Path):
    before = sorted(home.rglob("*"))
    cases = [(DETECT, *case) for case in CASES] + [(VALIDATE, *case) for case in VALIDATE_CASES] + TASK_CASES
    lines = "".join(json.dumps([str(script), *arguments]) + "\n" for script, arguments, _ in cases)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "2"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)  # another test's index would hide that labels are read
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "workers" / "mistakes.py")],
        input=lines, capture_output=True, text=True, cwd=home, env=environment, timeout=300,
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(cases), done.stderr[-2000:]
    wrong = []
    for (_, arguments, message), result in zip(cases, results, strict=True):
        said = re.sub(r"\s+", " ", result["err"])
        once = len(re.findall(message, said)) == 1 or ("full helptext" in said and re.search(message, said))  # tyro's
        late = "reading the labels" in result["out"] and not any(word in message for word in AFTER_LABELS)
        if result["code"] != 2 or not once or "Traceback" in said or late:
            wrong.append((arguments, result["code"], said[-300:]))
    assert not wrong
    assert sorted(home.rglob("*")) == before


def test_faulty_files_are_left_out_counted_and_listed(home: Path, tmp_path: Path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    picture = np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8)
    for stem in ("good", "text", "nan", "class", "columns", "latin", "cut", "deep"):
        cv2.imwrite(str(images / f"{stem}.jpg"), picture)
        (labels / f"{stem}.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    (labels / "text.txt").write_text("hello\n")
    (labels / "nan.txt").write_text("0 nan 0.5 0.5 0.5\n")
    (labels / "class.txt").write_text("0 0.5 0.5 0.5 0.5\n-1 0.5 0.5 0.5 0.5\n")
    (labels / "columns.txt").write_text("0 0.5 0.5\n")
    (labels / "latin.txt").write_bytes(b"\xe9 0.5 0.5 0.5 0.5\n")
    (images / "cut.jpg").write_bytes((images / "good.jpg").read_bytes()[:-200])
    (images / "more.jpg").write_bytes((images / "good.jpg").read_bytes() + b"trailing bytes are no fault")
    (images / "deep.jpg").unlink()
    cv2.imwrite(str(images / "deep.png"), picture.astype(np.uint16) * 257)  # 16 bits: read as 8
    cv2.imwrite(str(images / "dot.png"), picture[:1, :1])
    (images / "zero.png").write_bytes(b"")
    (images / "words.png").write_text("not an image")
    (tmp_path / "data.yaml").write_text(f"train: images\nval: images\n{NAMES}")
    options = ["--imgsz", 64, "--epochs", 1, "--batch", 4, "--trackers", "none", "--data", "data.yaml", "--no-plots"]
    done = launch(2, DETECT, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    listed = (tmp_path / "runs" / "detect" / "exp" / "faults.txt").read_text()
    reasons = {
        "text.txt: line 1 is not numbers", "nan.txt: line 1 holds a value that is not finite",
        "class.txt: line 2 has class -1", "columns.txt: line 1 has 3 columns", "latin.txt: not UTF-8",
        "cut.jpg: not a readable image", "dot.png: 1x1 px is too small", "zero.png: not an image",
        "words.png: not an image",
    }  # fmt: skip
    assert all(reason in listed for reason in reasons), listed
    assert len(listed.splitlines()) == 2 * len(reasons)  # of the train and of the val split
    assert done.stdout.count("warning: left out are 18 images (") == 1
    assert "python train/check_data.py data.yaml" in done.stdout
    assert "3 images with 2 boxes to train on" in done.stdout  # good, deep and more, which has no labels


def test_a_full_disk_at_the_first_save_leaves_nothing_half_written(home: Path, tmp_path: Path):
    limit = 3_000_000  # bytes in one file: less than the checkpoint

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-c", "import signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
         f"sys.argv[0] = {str(DETECT)!r}; runpy.run_path(sys.argv[0], run_name='__main__')",
         *GOOD, "--project", str(tmp_path), "--workers", "0", "--no-plots"],
        cwd=home, capture_output=True, text=True, preexec_fn=full, timeout=120,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert "error: The weights are lost: " in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "exp" / "weights").iterdir()) == []


NO_SOCKETS = """
import socket
def refuse(self, address, connect=socket.socket.connect):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        print("SOCKET TO", address, flush=True)
        raise OSError("sockets are forbidden here")
    return connect(self, address)
socket.socket.connect = refuse
resolve = socket.getaddrinfo
def getaddrinfo(host, *args, **kwargs):
    if host not in (None, "127.0.0.1", "::1", "localhost", socket.gethostname()):
        print("SOCKET TO", host, flush=True)
        raise OSError("sockets are forbidden here")
    return resolve(host, *args, **kwargs)
socket.getaddrinfo = getaddrinfo
"""


def test_nothing_is_downloaded_or_installed(home: Path, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(NO_SOCKETS)
    environment = {"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path / "home"), "PIP_NO_INDEX": "1"}
    environment |= {"WANDB_MODE": None, "NETRC": str(tmp_path / "none")}
    (tmp_path / "home").mkdir()
    options = [*GOOD[:-2], "--project", tmp_path / "runs"]
    done = launch(2, DETECT, *options, cwd=home, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "SOCKET TO" not in done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if not line.startswith("warning: slower than")]  # a busy machine
    assert "warning" not in "\n".join(said)  # no key: W&B offline, without a question or a complaint
    assert len(list((tmp_path / "runs" / "exp" / "wandb").glob("offline-run-*"))) == 1
    weights = tmp_path / "runs" / "exp" / "weights" / "best.pt"
    done = launch(1, VALIDATE, "--weights", weights, "--save-dir", tmp_path / "val", cwd=home, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "SOCKET TO" not in done.stdout + done.stderr
    assert not (tmp_path / "home" / ".config" / "Ultralytics").exists()
