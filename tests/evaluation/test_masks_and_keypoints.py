"""Masks and keypoints: the same bits on 1 to 4 real processes, and what pycocotools says of the results files."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import crop_mask, scale_boxes, scale_masks

from tests.bench.masks import compare, decoded, in_words, overlaps, proto_of, saved_by_ultralytics
from tests.conftest import POSE, ROOT, SEGMENT, succeed
from tests.labels import labels_of, to_validate_on
from tests.truths import truth_of
from train.config.errors import InputError
from train.config.objects import Objects
from train.config.options import ValConfig
from train.config.task_options import PoseConfig, SegmentConfig
from train.data.files import find_data
from train.data.formats import ImageLabels
from train.data.loaders import val_loader
from train.data.sets import ValSet
from train.evaluation.coco import KEYPOINT_METRICS, METRICS, coco_metrics, diagnose, metric_names
from train.evaluation.cocofiles import (
    check_predictions,
    own_truth,
    read_annotated,
    read_annotations,
    read_predictions,
    read_truth,
)
from train.evaluation.detections import Detections
from train.evaluation.evaluate import Evaluation, evaluate
from train.evaluation.joints import joint_errors
from train.evaluation.truth import Truth
from train.model.build import build_model, set_end2end
from train.model.inference import detect, in_original, inference_copy
from train.model.outputs import Letterbox
from train.model.tasks import TASKS, with_sigmas
from train.model.weights import load_detector
from train.processes.accelerator import resolved

RANKS, MORE = (1, 2), (3, 4)
SCRIPTS = {"segment": SEGMENT, "pose": POSE}
KINDS = {"segment": "segm", "pose": "keypoints"}
WORKER = ROOT / "tests" / "workers" / "evaluation.py"
CASES: list[tuple[str, dict[str, Any]]] = [
    ("whole", {"val_batch": 2}),
    ("idle", {"val_batch": 32, "rect": False, "val_limit": 13}),  # one batch: all ranks but one have none
    ("bare", {"data": "bare.yaml", "val_batch": 2}),
    ("nothing", {"conf": 1.0, "val_batch": 4}),
    ("own", {"annotations": "coco.json", "val_batch": 3}),
    ("pycocotools", {"coco_eval": "pycocotools", "max_dets": (1, 5, 20), "val_batch": 2}),
]


# On real processes ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folders(drawn: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, Path]]:
    """By task the folder of the results by number of processes; one launch each."""
    homes = {task: tmp_path_factory.mktemp(task) for task in SCRIPTS}
    best = {task: prepared(task, drawn[task], home) for task, home in homes.items()}
    for ranks in RANKS:
        launch_worker(homes, best, ranks)
    return {task: {ranks: home / str(ranks) for ranks in RANKS} for task, home in homes.items()}


def launch_worker(homes: dict[str, Path], best: dict[str, Path], ranks: int) -> None:
    """Evaluate the cases of both tasks on so many ranks."""
    asked: list[object] = []
    for task, home in homes.items():
        (home / str(ranks)).mkdir()
        asked += [best[task], home / "cases.json", home / str(ranks)]
    succeed(ranks, WORKER, *asked, cwd=homes["pose"])


@pytest.fixture(params=["segment", "pose"])
def results(request, folders: dict[str, dict[int, Path]]) -> tuple[str, dict[int, Path]]:
    return request.param, folders[request.param]


def prepared(task: str, yaml: Path, home: Path) -> Path:
    """A checkpoint that finds something, and in the folder the cases and what they need."""
    model = ROOT / "tests" / "fixtures" / {"segment": "tiny-seg.yaml", "pose": "tiny-pose.yaml"}[task]
    options = "--imgsz 160 --epochs 12 --val-interval 12 --batch 4 --nbs 4 --optimizer AdamW --lr0 0.01 --mosaic 0"
    options += " --warmup-epochs 1 --workers 0 --trackers none --no-plots --hsv-h 0 --hsv-s 0 --hsv-v 0"
    succeed(1, SCRIPTS[task], "--data", yaml, "--model", model, *options.split(), cwd=home)
    best = home / "runs" / task / "exp" / "weights" / "best.pt"
    truth = json.loads((best.parents[1] / "ground_truth.json").read_text())
    rng = np.random.default_rng(0)
    for annotation in truth["annotations"]:  # as a file has its own
        annotation["area"] *= rng.uniform(0.5, 1)
        annotation["iscrowd"] = int(rng.random() < 0.2)
        if annotation["iscrowd"] and "segmentation" in annotation:
            size = next((i["height"], i["width"]) for i in truth["images"] if i["id"] == annotation["image_id"])
            runs = coco_mask.frPyObjects(annotation["segmentation"], *size)[0]
            annotation["segmentation"] = {"size": [*size], "counts": runs["counts"].decode()}
    for image in truth["images"]:
        image["id"] += 1000
    for annotation in truth["annotations"]:
        annotation["image_id"] += 1000
    (home / "coco.json").write_text(json.dumps(truth))
    content = yaml.read_text().replace("images/val", f"{yaml.parent}/bare/images")
    (home / "bare.yaml").write_text(f"path: {yaml.parent}\n{content}")
    bare = yaml.parent / "bare" / "images"
    bare.mkdir(parents=True)
    for file in sorted((yaml.parent / "images" / "val").iterdir())[:5]:
        (bare / file.name).symlink_to(file)
    cases = []
    for name, more in CASES:
        paths = {key: str(home / more[key]) for key in ("data", "annotations") if key in more}
        cases.append([name, {"data": str(yaml), "max_det": 60} | more | paths])
    (home / "cases.json").write_text(json.dumps(cases))
    return best


@pytest.mark.parametrize("name", [name for name, _ in CASES])
def test_the_number_of_processes_changes_no_bit(results: tuple[str, dict[int, Path]], name: str):
    task, folders = results
    for ranks in RANKS[1:]:
        check_same(task, folders[1], folders[ranks], name)


def check_same(task: str, one: Path, other: Path, name: str) -> None:
    """The arrays and the results files of a case are the same."""
    a, b = (np.load(folder / f"{name}.npz") for folder in (one, other))
    assert {"masks", "keypoints"} & {*a.files}
    assert all(np.array_equal(a[part], b[part]) for part in a.files)
    for kind in TASKS[task].iou_types:
        assert (one / f"{name}.{kind}.json").read_bytes() == (other / f"{name}.{kind}.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", MORE)
def test_nor_do_more(folders: dict[str, dict[int, Path]], ranks: int):
    homes = {task: by_ranks[1].parent for task, by_ranks in folders.items()}
    best = {task: home / "runs" / task / "exp" / "weights" / "best.pt" for task, home in homes.items()}
    launch_worker(homes, best, ranks)
    for task, home in homes.items():
        for name, _ in CASES:
            check_same(task, home / "1", home / str(ranks), name)


@pytest.mark.parametrize("name", ["whole", "own", "pycocotools"])
def test_the_numbers_are_pycocotools_on_the_files_as_they_are(results: tuple[str, dict[int, Path]], name: str):
    task, folders = results
    said = json.loads((folders[2] / f"{name}.json").read_text())["metrics"]
    kind = KINDS[task]
    coco = COCO(str(folders[2] / f"{name}.truth.json"))
    for iou_type, before in (("bbox", ""), (kind, {"segm": "mask/", "keypoints": "pose/"}[kind])):
        result = COCOeval(coco, coco.loadRes(str(folders[2] / f"{name}.{iou_type}.json")), iou_type)
        if iou_type == "keypoints":
            result.params.kpt_oks_sigmas = np.full(4, 1 / 4)
        elif name == "pycocotools":
            result.params.maxDets = [1, 5, 20]
        result.evaluate()
        result.accumulate()
        result.summarize()
        names = metric_names((1, 5, 20) if name == "pycocotools" else (1, 10, 100), (iou_type,))
        theirs = dict(zip(names, result.stats, strict=False))
        if name == "pycocotools":
            del theirs[f"{before}AP"]  # which pycocotools has at 100 detections alone
        assert {key: said[key] for key in theirs} == theirs
    assert said[f"{before}AP50"] > 0.01, "what is compared should have found something"


def test_nothing_found_and_nothing_to_find(results: tuple[str, dict[int, Path]]):
    task, folders = results
    before = {"segment": "mask/", "pose": "pose/"}[task]
    nothing, bare = (json.loads((folders[2] / f"{name}.json").read_text())["metrics"] for name in ("nothing", "bare"))
    assert (nothing[f"{before}AP"], bare[f"{before}AP"]) == (0, -1)
    assert json.loads((folders[2] / f"nothing.{KINDS[task]}.json").read_text()) == []


# In this process ------------------------------------------------------------------------------------------------------
LEFT: dict[str, dict[str, Any]] = {"two classes of three": {"classes": (0, 2)}, "all as one": {"single_cls": True}}


def evaluated(task: str, best: Path, yaml: Path, options: dict[str, Any]) -> tuple[Evaluation, Truth]:
    """A checkpoint on the classes that are left. Where that is one, the model's three become it by their mean."""
    accelerator, carries = Accelerator(cpu=True), TASKS[task].carries
    config = ValConfig(weights=str(best), data=str(yaml), imgsz=160, workers=0, max_det=60, **options)
    data = find_data(config.data, config.single_cls, config.classes, carries)
    config = with_sigmas(resolved(config, accelerator), TASKS[task], data)
    annotated = read_annotated(config, accelerator, carries)
    labels = to_validate_on(data, config, accelerator, carries)
    truth = read_truth(labels, data, config, accelerator, annotated)
    loader = val_loader(ValSet(labels, data, config, 32, judged=False), config, accelerator)
    model, _ = load_detector(str(best))
    if config.single_cls:
        head = model.model[-1]
        for layers in head.cv3:
            known, layers[-1] = layers[-1], nn.Conv2d(layers[-1].in_channels, 1, 1)
            for name, parameter in layers[-1].named_parameters():
                parameter.data = getattr(known, name).data.mean(0, keepdim=True)
        head.nc, head.no = 1, head.no - 2
    model = inference_copy(model, accelerator.device, config.memory_format)
    return evaluate(model, loader, truth, config, accelerator), truth


@pytest.mark.parametrize("annotated", [False, True])
@pytest.mark.parametrize("name", LEFT)
def test_of_the_classes_that_are_left_the_numbers_are_pycocotools(results, drawn, name: str, annotated: bool):
    """The truth is filtered here, out of the labels of all classes, or out of the annotation file."""
    (task, folders), options = results, LEFT[name]
    kind, home = KINDS[task], folders[1].parent
    file = home / "coco.json" if annotated else folders[1] / "whole.truth.json"
    best = home / "runs" / task / "exp" / "weights" / "best.pt"
    found, truth = evaluated(task, best, drawn[task], options | ({"annotations": str(file)} if annotated else {}))
    left = COCO()
    left.dataset = json.loads(file.read_text())
    if "classes" in options:
        left.dataset["annotations"] = [a for a in left.dataset["annotations"] if a["category_id"] in (0, 2)]
        assert found.per_class["square"]["boxes"] == 0 < found.per_class["circle"]["boxes"]
    else:
        left.dataset["annotations"] = [a | {"category_id": 0} for a in left.dataset["annotations"]]
        left.dataset["categories"] = [{"id": 0, "name": "item"}]
    left.createIndex()
    assert found.boxes == len(left.dataset["annotations"])
    for iou_type, before in (("bbox", ""), (kind, {"segm": "mask/", "keypoints": "pose/"}[kind])):
        entries = found.detections.results(iou_type, truth.sizes_by_id(np.arange(len(truth))))
        result = COCOeval(left, left.loadRes([one for one in entries if one["category_id"] != 1]), iou_type)
        if iou_type == "keypoints":
            result.params.kpt_oks_sigmas = np.full(4, 1 / 4)
        result.evaluate()
        result.accumulate()
        result.summarize()
        theirs = dict(zip(metric_names((1, 10, 100), (iou_type,)), result.stats, strict=False))
        assert {key: found.metrics[key] for key in theirs} == theirs
        assert theirs[f"{before}AP50"] > 0.01, "what is compared should have found something"


# Scenes ---------------------------------------------------------------------------------------------------------------
def scene(kind: str, seed: int) -> tuple[Truth, Detections]:
    """Truth with crowds and areas of its own, and detections that hit, miss, repeat and tie."""
    rng = np.random.default_rng(seed)
    content: dict[str, list] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 4, "name": "a"}, {"id": 2, "name": "b"}],
    }
    rows, masks, points = [], [], []
    for image in range(12):
        height, width = (int(n) for n in rng.integers(150, 300, 2))
        content["images"].append({"id": 3 * image, "file_name": f"{image}.jpg", "height": height, "width": width})
        for _ in range(int(rng.integers(0, 5))):
            centre, size = rng.uniform(50, 120, 2), rng.uniform(15, 60, 2)  # on both sides of 32 x 32 px
            corners = centre + np.array([[-1, -1], [1, -1], [1, 1], [0, 1.4], [-1, 1]]) * size / 2
            keypoints = np.concatenate((corners, rng.integers(0, 3, (5, 1))), 1)
            crowd, category = int(rng.random() < 0.15), int(rng.choice([4, 2]))
            one = {
                "id": len(content["annotations"]) + 1,
                "image_id": 3 * image,
                "category_id": category,
                "iscrowd": crowd,
            }
            one |= {"bbox": [*(centre - size / 2), *size], "area": float(size.prod() * rng.uniform(0.4, 1))}
            if kind == "segm":
                one["beside"] = {"segmentation": [corners.ravel().tolist()]}
            else:
                seen = int((keypoints[:, 2] > 0).sum())
                one["beside"] = {"keypoints": keypoints.ravel().tolist(), "num_keypoints": seen}
            content["annotations"].append(one)
            for _ in range(int(rng.integers(0, 4))):
                off = rng.normal(0, 0.1, 2) * size
                moved = corners + off + rng.normal(0, 0.05, corners.shape) * size
                score = round(rng.random(), 1)
                rows.append([3 * image, *(centre - size / 2 + off), *size, score, category])
                masks.append(coco_mask.frPyObjects([moved.ravel().tolist()], height, width)[0]["counts"])
                points.append(np.concatenate((moved, rng.random((5, 1))), 1))
    beside = {"masks": masks} if kind == "segm" else {"keypoints": np.array(points)}
    return truth_of(content, sigmas=rng.uniform(0.03, 0.1, 5).tolist()), Detections(np.array(rows), **beside)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["segm", "keypoints"])
def test_hotcoco_and_pycocotools_agree_bit_for_bit(kind: str, seed: int):
    truth, found = scene(kind, seed)
    ours, curves = coco_metrics(truth, found, "hotcoco", iou_type=kind)
    theirs, others = coco_metrics(truth, found, "pycocotools", iou_type=kind)
    assert ours == theirs
    assert np.array_equal(curves.pr, others.pr)
    assert 0.01 < ours["AP"] < 0.95
    assert [*ours][:10] == list((KEYPOINT_METRICS if kind == "keypoints" else METRICS)[:10])


@pytest.mark.parametrize("kind", ["segm", "keypoints"])
def test_a_file_with_boxes_is_measured_as_pycocotools_measures_it(kind: str):
    """Their areas are those of the boxes then."""
    truth, found = scene(kind, 1)
    found.area_of_box = True
    found.rows[:, 3:5] *= 3
    ours, theirs = (coco_metrics(truth, found, name, iou_type=kind)[0] for name in ("hotcoco", "pycocotools"))
    assert ours == theirs
    found.area_of_box = False
    assert ours != coco_metrics(truth, found, iou_type=kind)[0]


def test_what_goes_wrong_is_told_by_masks():
    truth, found = scene("segm", 2)
    told = diagnose(truth, found)
    boxes = diagnose(truth, Detections(found.rows))
    assert told["confusion"].sum() > 0
    assert told["tide"] != boxes["tide"]


def test_how_far_keypoints_are_off():
    """By hand: of an object of area 100 the first keypoint is 5 px off, the second exact, the third not labelled."""
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 50, "width": 50}],
        "categories": [{"id": 0, "name": "a"}],
    }
    one = {"id": 1, "image_id": 1, "category_id": 0, "bbox": [10, 10, 10, 10], "area": 100, "iscrowd": 0}
    content["annotations"] = [one | {"beside": {"keypoints": [10, 10, 2, 20, 20, 1, 0, 0, 0], "num_keypoints": 2}}]
    rows = np.array([[1, 10, 10, 10, 10, 0.9, 0], [1, 10, 10, 10, 10, 0.8, 0]], float)
    found = Detections(rows, keypoints=np.array([[[13, 14, 1], [20, 20, 1], [3, 3, 1]]] * 2, float))
    errors = joint_errors(truth_of(content, sigmas=(0.1,) * 3), found)
    assert errors.shape == (1, 3)  # the second detection has found nothing
    np.testing.assert_allclose(errors[0], [0.5, 0, np.nan])


# Masks and keypoints in the original image ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "end2end"), [("yolov8n-seg.yaml", False), ("yolo26n-seg.yaml", False), ("yolo26n-seg.yaml", True)]
)
def test_masks_are_those_of_ultralytics_functions_on_one_image(kind: str, end2end: bool, drawn: dict[str, Path]):
    """Bit for bit; and how they differ from those that its save_json would write, by size."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    data = find_data(str(drawn["segment"]), carries="polygons")
    model, _ = build_model(SegmentConfig(model=kind), kind, Objects(names=data.names))
    if "26" in kind:
        set_end2end(model, end2end, kind)
    model = inference_copy(model, torch.device("cpu"), torch.contiguous_format)
    config = resolved(ValConfig(data=data.name, weights="x", imgsz=96, workers=0), accelerator)
    images = ValSet(to_validate_on(data, config, accelerator, "polygons"), data, config, 32, judged=False)
    shown: dict[str, list[float]] = {}
    with torch.inference_mode():
        for i in range(4):
            sample = images[i]
            raw = model(sample["img"][None].float() / 255)
            batch = {"img": sample["img"][None], "ori_shape": [sample["ori_shape"]], "ratio_pad": [sample["ratio_pad"]]}
            assert ("one2one" in raw) == end2end
            proto = proto_of(raw, model)[0]
            (one,) = detect(raw, model, 1e-5, 0.7, 30)
            one[:, 4] = 0.5
            raw_boxes, coefficients = one[:, :4].clone(), torch.randn(len(one), one.shape[1] - 6)
            one[:, 6:] = coefficients
            (boxes,), (masks,) = in_original([one], raw, model, batch)
            assert boxes.untyped_storage().nbytes() == boxes.nbytes  # the coefficients do not stay with them
            box = Letterbox(tuple(sample["img"].shape[1:]), sample["ori_shape"], sample["ratio_pad"])
            logits = (coefficients @ proto.flatten(1)).view(1, -1, *proto.shape[1:])
            logits = nn.functional.interpolate(logits, box.padded, mode="bilinear")
            scaled = scale_boxes(box.padded, raw_boxes.clone(), box.shape, box.ratio_pad)
            expected = crop_mask((scale_masks(logits, box.shape, box.ratio_pad)[0] > 0).byte(), scaled)
            ours = decoded(masks, box.shape)
            assert np.array_equal(ours, expected.numpy())
            assert torch.equal(boxes[:, :4], scaled)
            compare(ours, saved_by_ultralytics(proto, coefficients, raw_boxes, box), shown)
    print(f"at random, {in_words(shown)}")
    assert shown


def test_where_something_was_learnt_masks_are_nearly_those_of_save_json(folders: dict[str, dict[int, Path]], drawn):
    """They differ at their outlines."""
    best = folders["segment"][1].parent / "runs" / "segment" / "exp" / "weights" / "best.pt"
    shown = overlaps(str(best), str(drawn["segment"]), 160)
    print(in_words(shown))
    assert all(0.8 < np.mean(shown[size]) < 1 for size in ("small", "medium"))


@pytest.mark.parametrize("task", ["segment", "pose"])
def test_the_areas_of_label_files_are_cocos(task: str, drawn: dict[str, Path]):
    accelerator, carries = Accelerator(cpu=True), TASKS[task].carries
    data = find_data(str(drawn[task]), carries=carries)
    config = ValConfig(data=data.name, weights="x")
    truth = Truth.of_labels(to_validate_on(data, config, accelerator, carries), data.names)
    truth.sigmas = (0.1,) * 4
    content = truth.dataset()
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    assert len(content["annotations"]) > 20
    for one in content["annotations"]:
        if task == "segment":  # pixels of the polygon, as pycocotools fills it
            runs = coco_mask.frPyObjects(one["segmentation"], *sizes[one["image_id"]])
            assert one["area"] == coco_mask.area(runs).item()
        else:
            assert one["area"] == pytest.approx(0.53 * one["bbox"][2] * one["bbox"][3], rel=1e-12)


def test_masks_of_another_size_than_their_images_are_refused(tmp_path: Path):
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 50, "width": 40}],
        "categories": [{"id": 0, "name": "a"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 0, "bbox": [1, 1, 9, 9], "area": 9, "iscrowd": 0}],
    }
    content["annotations"][0]["beside"] = {"segmentation": [[1, 1, 9, 1, 9, 9]]}
    truth = truth_of(content)
    file = tmp_path / "found.json"
    for height, width in ((50, 40), (40, 50)):
        mask = {"size": [height, width], "counts": [100, 50, 1850]}
        file.write_text(json.dumps([{"image_id": 1, "category_id": 0, "score": 0.5, "segmentation": mask}]))
        found = read_predictions(str(file))
        if height == 50:
            check_predictions(str(file), found, truth)
        else:
            with pytest.raises(InputError, match=r"1 masks of another size .* 50x40 px, image 1 of 40x50"):
                check_predictions(str(file), found, truth)
    entry = ImageLabels("/x/a.jpg", 1, (40, 50), np.zeros(1), np.full((1, 4), 0.5), [np.eye(2).repeat(2, 0)])
    labels = labels_of([entry], base="/x", carries="polygons")
    with pytest.raises(InputError, match=r"truth\.json says 40x50 px of /x/a\.jpg, which has 50x40; 1 images differ"):
        own_truth("truth.json", labels, {0: "a"}, ValConfig(weights="x"), truth)


@pytest.mark.parametrize(
    ("kind", "end2end"), [("yolov8n-pose.yaml", False), ("yolo26n-pose.yaml", False), ("yolo26n-pose.yaml", True)]
)
def test_keypoints_are_those_of_ultralytics_own_forward(kind: str, end2end: bool):
    torch.manual_seed(0)
    about = Objects(names={0: "a", 1: "b"}, keypoints=(4, 3), flip_idx=(0, 3, 2, 1))
    model, _ = build_model(PoseConfig(model=kind, sigmas=(0.1,) * 4), kind, about)
    for module in model.modules():  # statistics other than 0 and 1, so that fusing has something to do
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    if "26" in kind:
        set_end2end(model, end2end, kind)
    image = torch.rand(2, 3, 64, 96)
    ours = inference_copy(model, torch.device("cpu"), torch.contiguous_format)
    theirs = deepcopy(model).eval().fuse(verbose=False)
    with torch.inference_mode():
        found = detect(ours(image), ours, 0.0, 0.7, 20)
        decoded = theirs(image)[0]
        expected = non_max_suppression(decoded, 0.0, 0.7, multi_label=True, max_det=20, nc=2, end2end=end2end)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == (20, 6 + 12)
        torch.testing.assert_close(a, b[:20], rtol=1e-4, atol=1e-3)


def test_an_annotation_file_without_what_is_needed(tmp_path: Path):
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 50, "width": 40}],
        "categories": [{"id": 0, "name": "a"}],
    }
    plain = {"id": 1, "image_id": 1, "category_id": 0, "bbox": [1, 1, 10, 10], "area": 100}
    file = tmp_path / "truth.json"

    def read(carries: Any, **beside: Any) -> Truth:
        file.write_text(json.dumps(content | {"annotations": [plain | beside]}))
        return read_annotations(str(file), carries)

    assert len(read("boxes")) == 1
    runs = coco_mask.frPyObjects([[1, 1, 20, 1, 20, 30]], 50, 40)[0]
    assert read("polygons", segmentation=[[1, 1, 9, 1, 9, 9]]).masks(0)[0]["counts"]
    assert read("polygons", segmentation={"size": [50, 40], "counts": runs["counts"].decode()}).masks(0)
    assert read("polygons", segmentation={"size": [50, 40], "counts": [100, 50, 1850]}).masks(0)
    assert read("keypoints", keypoints=[1, 2, 2, 3, 4, 0]).outlines(0)[0]["num_keypoints"] == 1
    for carries, beside, message in (
        ("polygons", {}, "entry 1 of `annotations` has no 'segmentation'"),
        ("polygons", {"segmentation": [[1, 2, 3, 4]]}, "segmentation of annotation 1 is neither polygons"),
        ("polygons", {"segmentation": []}, "is neither polygons"),
        ("polygons", {"segmentation": {"size": [40, 50], "counts": [2000]}}, "is neither polygons"),
        ("polygons", {"segmentation": {"size": [50, 40], "counts": [7]}}, "is neither polygons"),
        ("polygons", {"segmentation": {"size": [50, 40], "counts": "zz zz"}}, "is neither polygons"),
        ("keypoints", {}, "entry 1 of `annotations` has no 'keypoints'"),
        ("keypoints", {"keypoints": [1, 2]}, "lists of 2 numbers; each must have x, y and visibility"),
    ):
        with pytest.raises(InputError, match=message):
            read(carries, **beside)
