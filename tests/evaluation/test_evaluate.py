"""Evaluation on 1 to 4 real processes: the same bits, whatever the data looks like, and never a hang."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou
from ultralytics.models.yolo.detect import DetectionValidator

from tests.conftest import ROOT, succeed
from tests.labels import to_validate_on
from train.config.options import ValConfig
from train.data.files import find_data
from train.data.loaders import val_loader
from train.data.sets import ValSet
from train.evaluation.coco import METRICS
from train.evaluation.cocofiles import read_truth
from train.evaluation.evaluate import Evaluation, evaluate
from train.model.inference import inference_copy
from train.model.weights import load_detector
from train.processes.accelerator import resolved

RANKS = (1, 2, 3, 4)
NAMES = "names: [circle, square, triangle]\n"


@pytest.fixture(scope="module")
def home(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data YAMLs of all kinds over the images that `trained` was validated on."""
    folder = tmp_path_factory.mktemp("evaluation")
    files = sorted((trained.parent.parent.parent / "datasets" / "shapes" / "images" / "val").glob("*.jpg"))
    (folder / "images").mkdir()
    (folder / "bare").mkdir()
    (folder / "labels").mkdir()
    for file in files[:13]:
        (folder / "bare" / file.name).symlink_to(file)  # without labels
        (folder / "images" / file.name).symlink_to(file)
        label = file.parents[2] / "labels" / "val" / f"{file.stem}.txt"
        rows = [row for row in label.read_text().splitlines() if row[0] != "2"]
        (folder / "labels" / f"{file.stem}.txt").write_text("\n".join(rows))  # a data set without triangles
    lists = {"all": files, "one": files[:1], "three": files[:3], "thirteen": files[:13]}
    bare = sorted((folder / "bare").iterdir())
    lists |= {"some": [*files[20:26], *bare[:5]], "none": bare[:7], "two": sorted((folder / "images").iterdir())}
    for name, entries in lists.items():
        (folder / f"{name}.txt").write_text("".join(f"{entry}\n" for entry in entries))
        (folder / f"{name}.yaml").write_text(f"path: {folder}\ntrain: {name}.txt\nval: {name}.txt\n{NAMES}")
    rng = np.random.default_rng(0)
    truth = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "square"}, {"id": 3, "name": "circle"}]}
    truth["categories"].append({"id": 90, "name": "triangle"})
    for number, file in enumerate(files[:13]):
        truth["images"].append({"id": 1000 - number, "file_name": f"val/{file.name}", "width": 320, "height": 240})
        for row in (file.parents[2] / "labels" / "val" / f"{file.stem}.txt").read_text().splitlines():
            c, x, y, w, h = map(float, row.split())
            height, width = _shape(file)
            box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            one = {"image_id": 1000 - number, "category_id": (3, 7, 90)[int(c)], "bbox": box, "id": 0}
            one |= {"area": box[2] * box[3] * rng.uniform(0.1, 1), "iscrowd": int(rng.random() < 0.2)}
            truth["annotations"].append(one)
    truth["annotations"] = [a | {"id": i} for i, a in enumerate(truth["annotations"])]
    (folder / "coco.json").write_text(json.dumps(truth))
    return folder


def _shape(file: Path) -> tuple[int, int]:
    import cv2

    return cv2.imread(str(file)).shape[:2]


CASES: list[tuple[str, dict]] = [
    ("learnt", {"data": "all", "val_limit": 208, "mixed_precision": "bf16", "val_batch": 7}),  # bf16: scores tie
    ("one", {"data": "one"}),
    ("fewer", {"data": "three", "val_batch": 1}),  # than ranks
    ("idle", {"data": "thirteen", "val_batch": 32, "rect": False}),  # one batch: all ranks but one have none
    ("unlabelled", {"data": "some", "val_batch": 2}),
    ("nolabels", {"data": "none", "val_batch": 2}),
    ("nothing", {"data": "thirteen", "conf": 1.0, "val_batch": 2}),
    ("never", {"data": "two", "val_batch": 4}),  # no triangle in any image
    ("full", {"data": "thirteen", "conf": 0.0, "iou": 1.0, "val_batch": 3}),  # 300 detections in each image
    ("prime", {"data": "thirteen", "val_batch": 1}),
    ("crowd", {"data": "thirteen", "annotations": "coco.json", "val_batch": 2}),
    ("subset", {"data": "thirteen", "val_fraction": 0.5, "val_batch": 2}),
    ("pycocotools", {"data": "thirteen", "coco_eval": "pycocotools", "max_dets": (1, 5, 20), "val_batch": 2}),
    ("missing", {"data": "thirteen", "val_batch": 1}),
    ("twice", {"data": "thirteen", "val_batch": 1}),
    ("weights", {"data": "thirteen", "val_batch": 1}),
]


@pytest.fixture(scope="module")
def results(home: Path, trained: Path) -> dict[int, Path]:
    """Folder of the results by number of processes; one launch each."""
    cases = []
    for name, options in CASES:
        paths = {key: str(home / options[key]) for key in ("annotations",) if key in options}
        cases.append([name, options | {"data": str(home / f"{options['data']}.yaml")} | paths])
    (home / "cases.json").write_text(json.dumps(cases))
    folders = {}
    for ranks in RANKS:
        folders[ranks] = home / str(ranks)
        folders[ranks].mkdir()
        worker = ROOT / "tests" / "workers" / "evaluation.py"
        succeed(ranks, worker, trained / "weights" / "best.pt", home / "cases.json", folders[ranks], cwd=home)
    return folders


def found(results: dict[int, Path], name: str, ranks: int = 1) -> tuple[dict, np.ndarray]:
    """What the JSON says, and the detections."""
    return json.loads((results[ranks] / f"{name}.json").read_text()), np.load(results[ranks] / f"{name}.npz")[
        "detections"
    ]


@pytest.mark.parametrize("name", [name for name, _ in CASES[:-3]])
def test_the_number_of_processes_changes_no_bit(results: dict[int, Path], name: str):
    one = np.load(results[1] / f"{name}.npz")
    counts = {key: found(results, name)[0][key] for key in ("images", "boxes", "per_class", "metrics")}
    for ranks in RANKS[1:]:
        other = np.load(results[ranks] / f"{name}.npz")
        assert all(np.array_equal(one[part], other[part]) for part in one.files)
        assert counts == {key: found(results, name, ranks)[0][key] for key in counts}


def test_the_cases_are_what_they_are_called(results: dict[int, Path]):
    by_ranks = {ranks: {n: c for n, *c in json.loads((results[ranks] / "batches.json").read_text())} for ranks in RANKS}
    assert by_ranks[4]["one"] == [1, 0, 0, 0]
    assert by_ranks[4]["fewer"] == [1, 1, 1, 0]
    assert by_ranks[3]["idle"] == [1, 0, 0]
    assert by_ranks[2]["prime"] == [7, 6]
    learnt, detections = found(results, "learnt")
    assert 0.2 < learnt["metrics"]["AP"] < 0.9
    assert learnt["images"] >= 200
    scores = Counter(map(tuple, detections[:, [0, 5, 6]]))
    assert sum(count - 1 for count in scores.values()) > 100  # ties
    assert found(results, "nolabels")[0]["metrics"]["AP"] == -1
    assert found(results, "nothing")[1].shape == (0, 7)
    assert found(results, "nothing")[0]["metrics"]["AP"] == 0
    never, _ = found(results, "never")
    assert never["per_class"]["triangle"]["boxes"] == 0
    assert never["per_class"]["triangle"]["AP"] == -1 < never["metrics"]["AP"]
    full, detections = found(results, "full")
    assert set(Counter(detections[:, 0]).values()) == {300}
    assert full["images"] == 13
    assert found(results, "subset")[0]["images"] == 6
    assert "AR5" in found(results, "pycocotools")[0]["metrics"]


@pytest.mark.parametrize("name", ["learnt", "unlabelled", "never", "full", "crowd"])
def test_pycocotools_says_the_same(results: dict[int, Path], name: str, tmp_path: Path):
    said, detections = found(results, name, 3)
    truth = COCO(str(results[3] / f"{name}.truth.json"))
    rows = [{"image_id": int(r[0]), "bbox": list(r[1:5]), "score": r[5], "category_id": int(r[6])} for r in detections]
    (tmp_path / "predictions.json").write_text(json.dumps(rows))
    result = COCOeval(truth, truth.loadRes(str(tmp_path / "predictions.json")), "bbox")
    result.evaluate()
    result.accumulate()
    result.summarize()
    assert np.array_equal(result.stats, [said["metrics"][metric] for metric in METRICS])
    for k, id_ in enumerate(result.params.catIds):
        precision = result.eval["precision"][:, :, k, 0, 2]
        expected = precision[precision > -1].mean() if (precision > -1).any() else -1
        assert said["per_class"][truth.cats[id_]["name"]]["AP"] == expected


def test_a_coco_files_ids_areas_and_crowd_boxes_count(results: dict[int, Path], home: Path):
    truth = json.loads((results[2] / "crowd.truth.json").read_text())
    given = json.loads((home / "coco.json").read_text())
    assert [a["area"] for a in truth["annotations"]] == [a["area"] for a in given["annotations"]]
    assert sum(a["iscrowd"] for a in truth["annotations"]) == sum(a["iscrowd"] for a in given["annotations"]) > 0
    said, detections = found(results, "crowd", 2)
    assert set(detections[:, 0]) <= set(range(988, 1001))
    assert set(detections[:, 6]) <= {3, 7, 90}
    without, _ = found(results, "prime", 2)
    assert said["metrics"]["APs"] != without["metrics"]["APs"]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    ("name", "message"),
    [("missing", "image ids missing ["), ("twice", "more than once ["), ("weights", "evaluated different weights")],
)
def test_an_incomplete_evaluation_ends_all_ranks(results: dict[int, Path], ranks: int, name: str, message: str):
    if name == "weights" and ranks == 1:
        assert (results[1] / "weights.npz").exists()
        return
    said = (results[ranks] / f"{name}.txt").read_text().splitlines()
    assert len(said) == ranks
    assert all(message in line for line in said)


def test_where_the_time_went(results: dict[int, Path]):
    seconds = found(results, "learnt", 2)[0]["seconds"]
    assert list(seconds) == ["data", "inference", "postprocess", "gather", "metric"]
    assert all(0 <= mean <= slowest for slowest, mean in seconds.values())
    assert seconds["inference"][1] > 0.1


# In this process ------------------------------------------------------------------------------------------------------
def evaluated(weights: Path, data: str, **options) -> Evaluation:
    accelerator = Accelerator(cpu=True)
    config = resolved(ValConfig(weights=str(weights), data=data, imgsz=160, workers=0, **options), accelerator)
    model, _ = load_detector(config.weights)
    files = find_data(config.data)
    labels = to_validate_on(files, config, accelerator)
    truth = read_truth(labels, files, config, accelerator)
    loader = val_loader(ValSet(labels, files, config, 32), config, accelerator)
    return evaluate(inference_copy(model, accelerator.device, config.memory_format), loader, truth, config, accelerator)


@pytest.mark.slow
def test_the_validation_batch_moves_no_detection(trained: Path):
    data = str(trained.parent.parent.parent / "datasets" / "shapes" / "shapes.yaml")
    by_batch = {n: evaluated(trained / "weights" / "best.pt", data, split="train", val_batch=n) for n in (1, 7, 32)}
    one = by_batch[1]
    assert one.images >= 500
    assert 0.2 < one.metrics["AP"] < 0.9
    for other in (by_batch[7], by_batch[32]):
        assert other.metrics["AP"] == pytest.approx(one.metrics["AP"], abs=1e-3)
        assert len(other.detections) == pytest.approx(len(one.detections), rel=1e-3)
        unmatched = sum(_unmatched(a, b) for a, b in zip(_by_image(one), _by_image(other), strict=True))
        # fp32 sums differ by 1e-6 between batch sizes; a score or an IoU at the very threshold may fall on either side
        assert unmatched <= 1e-3 * len(one.detections)


def _by_image(evaluation: Evaluation) -> list[np.ndarray]:
    ids = np.arange(evaluation.images)
    return [evaluation.detections.between(id_, id_).rows for id_ in ids]


def _unmatched(a: np.ndarray, b: np.ndarray) -> int:
    """Detections of one image without a partner of the same class, score and place on the other side."""
    if not len(a) or not len(b):
        return len(a) + len(b)
    corners = [torch.tensor(np.concatenate([x[:, 1:3], x[:, 1:3] + x[:, 3:5]], 1)) for x in (a, b)]
    # A box that the border has cut to no width has no IoU.
    near = (box_iou(*corners) > 0.999).numpy() | ((corners[0][:, None] - corners[1]).abs().amax(2) < 1e-3).numpy()
    same = near & (a[:, None, 6] == b[None, :, 6]) & (np.abs(a[:, None, 5] - b[None, :, 5]) < 1e-4)
    return int((same.sum(1) != 1).sum() + (same.sum(0) != 1).sum())


def test_detections_are_those_of_ultralytics_validator_at_batch_one(trained: Path, tmp_path: Path):
    data = str(trained.parent.parent.parent / "datasets" / "shapes" / "shapes.yaml")
    theirs: dict[int, np.ndarray] = {}

    class Collecting(DetectionValidator):
        def update_metrics(self, preds, batch):
            for i, pred in enumerate(preds):
                scaled = self.scale_preds(pred, self._prepare_batch(i, batch))
                rows = torch.cat([scaled["bboxes"], scaled["conf"][:, None], scaled["cls"][:, None]], 1)
                theirs[int(Path(batch["im_file"][i]).stem)] = rows.double().numpy()
            super().update_metrics(preds, batch)

    arguments = {"model": str(trained / "weights" / "best.pt"), "data": data, "imgsz": 160, "batch": 1, "workers": 0}
    validator = Collecting(
        args=arguments | {"conf": 0.001, "plots": False, "device": "cpu", "rect": True}, save_dir=tmp_path
    )
    validator()
    ours = evaluated(trained / "weights" / "best.pt", data, val_batch=1)
    assert len(theirs) == ours.images
    for id_, expected in theirs.items():
        rows = ours.detections.between(id_, id_).rows
        assert len(rows) == len(expected)
        boxes = np.concatenate([rows[:, 1:3], rows[:, 1:3] + rows[:, 3:5]], 1)
        partner = (  # not by position: scores of 1e-5 apart change places
            (np.abs(boxes[:, None] - expected[None, :, :4]).max(2, initial=0) <= 1e-3)
            & (np.abs(rows[:, None, 5] - expected[None, :, 4]) <= 1e-5)
            & (rows[:, None, 6] == expected[None, :, 5])
        )
        assert partner.any(0).all()
        assert partner.any(1).all()
