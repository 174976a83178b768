"""COCO's files: truth from an annotation file, detections from a results file."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate import Accelerator

from train.config.errors import InputError
from train.config.objects import Carries, Objects
from train.config.options import EvalConfig
from train.data.coco_json import UNREADABLE, CocoFile, json_fault, read_coco, read_json
from train.data.labels import Labels
from train.data.listing import DataFiles
from train.data.runlengths import counts_of
from train.evaluation.detections import KINDS, Detections
from train.evaluation.truth import Marks, Truth
from train.processes.collectives import on_main

Configured = TypeVar("Configured", bound=EvalConfig)
EMPTY = {KINDS["segm"][2]: "segmentation", KINDS["keypoints"][2]: "keypoints"}  # what entries would have, by file name


def _span(ids: list[int]) -> str:
    return f"{min(ids)} to {max(ids)}" if ids else "none"


def read_annotations(file: str, carries: Carries = "boxes") -> Truth:
    """The truth that a COCO annotation file says; InputError where it is not one."""
    return as_truth(read_coco(file, carries, f"--annotations {file}"))


def as_truth(said: CocoFile, sigmas: Sequence[float] = ()) -> Truth:
    """The truth that annotations are.

    Args:
        said: what a file says of them.
        sigmas: OKS sigma of each keypoint.
    """
    order = np.argsort(said.image, kind="stable")  # within an image the order decides between boxes that fit as well
    own = Marks(said.image[order], said.category[order], said.boxes[order], said.area[order], said.crowd[order])
    beside = [said.beside[i] for i in order.tolist()] if said.beside else []
    return Truth(said.ids, said.categories, said.sizes, said.files.__getitem__, own=own, beside=beside, sigmas=sigmas)


def own_truth(file: str, labels: Labels, names: dict[int, str], config: EvalConfig, said: Truth) -> Truth:
    """The part of an annotation file that is about these images and classes; images are matched by file name.

    Args:
        file: its name.
        labels: of the images.
        names: class names by class index.
        config: the classes that count.
        said: what the whole file says.

    Raises:
        InputError: it lacks an image or a class.
    """
    by_name = defaultdict(list)
    for place in range(len(said)):
        by_name[Path(said.file(place)).name].append(place)
    found: list[int] = []
    missing: list[str] = []
    for i in range(len(labels)):
        im_file = labels.file(i)
        same = by_name.get(Path(im_file).name, [])
        if len(same) > 1:  # then the folders must tell them apart
            same = [place for place in same if Path(im_file).as_posix().endswith(f"/{said.file(place)}")]
            same = sorted(same, key=lambda place: -len(said.file(place)))[:1]
        found += same[:1]
        missing += [] if len(same) == 1 else [im_file]
    if missing:
        raise InputError(f"--annotations {file} lacks {len(missing)} of {len(labels)} images, first {missing[0]}.")
    if len(set(found)) < len(found):
        raise InputError(f"--annotations {file}: two images of the split are one in the file by name.")
    places = np.array(found, np.int64)
    if labels.carries == "polygons" and len(other := np.flatnonzero((said.sizes[places] != labels.shapes).any(1))):
        (height, width), (rows, columns) = said.sizes[places[other[0]]].tolist(), labels.shapes[other[0]].tolist()
        raise InputError(
            f"--annotations {file} says {width}x{height} px of {labels.file(int(other[0]))}, which has "
            f"{columns}x{rows}; {len(other)} images differ. Masks must be of the images as they are."
        )
    ids = {name: id_ for id_, name in said.names.items()}
    unknown = [] if config.single_cls else [name for name in names.values() if name not in ids]
    if unknown:
        raise InputError(f"--annotations {file} has no category named {', '.join(unknown)}; it has {', '.join(ids)}.")
    category_ids = {index: 0 if config.single_cls else ids[name] for index, name in names.items()}
    chosen = set(ids.values()) if config.single_cls else set(category_ids.values())
    if config.classes is not None:
        chosen = {ids[name] for name in ids if name in {names[index] for index in config.classes if index in names}}
    marks = said.marks(places)
    keep = np.isin(marks.category, sorted(chosen))
    here = np.repeat(np.arange(len(places)), said.first[places + 1] - said.first[places])
    category = np.zeros_like(marks.category) if config.single_cls else marks.category
    beside = [one for place in found for one in said.outlines(place)]
    beside = [one for one, kept in zip(beside, keep.tolist(), strict=True) if kept] if beside else []
    marks = Marks(here[keep], category[keep], marks.boxes[keep], marks.area[keep], marks.crowd[keep])
    categories = [{"id": category_ids[index], "name": name} for index, name in names.items()]
    return Truth(said.ids[places], categories, said.sizes[places], labels.file, own=marks, beside=beside)


def read_predictions(file: str) -> Detections:
    """A COCO results file, by image id, in the file's order within an image. What its first entry has the others have;
    of a file without an entry the name tells, as a run names its files, and else it is of boxes.

    Raises:
        InputError: it is not a results file.
    """
    masks: list[bytes] | None = None
    keypoints = sizes = None
    try:
        content = read_json(file)
        if not isinstance(content, list):
            raise KeyError("image_id")
        first = content[0] if content else {EMPTY.get(Path(file).name, "bbox"): []}
        boxed = "bbox" in first
        nothing = [0.0] * 4
        rows = np.array(
            [[d["image_id"], *(d["bbox"] if boxed else nothing), d["score"], d["category_id"]] for d in content],
            dtype=np.float64,
        ).reshape(len(content), 7)
        order = np.argsort(rows[:, 0], kind="stable")
        if "segmentation" in first:
            masks = [counts_of(content[i]["segmentation"]) for i in order]
            sizes = np.array([content[i]["segmentation"]["size"] for i in order], np.int64).reshape(-1, 2)
        if "keypoints" in first:
            each = len(first["keypoints"]) // 3
            keypoints = np.array([content[i]["keypoints"] for i in order], np.float64).reshape(len(content), each, 3)
        if not boxed and masks is None and keypoints is None:
            raise KeyError("bbox")
    except UNREADABLE as error:
        raise InputError(
            f"--predictions {file} is not a COCO results file, a list of image_id, category_id, score and bbox, "
            f"segmentation or keypoints: {json_fault(error, 'an entry')}"
        ) from None
    if not np.isfinite(rows).all() or (keypoints is not None and not np.isfinite(keypoints).all()):
        raise InputError(f"--predictions {file} holds a value that is not a finite number.")
    return Detections(rows[order], masks, keypoints, boxed, area_of_box=boxed, mask_sizes=sizes)


def check_predictions(file: str, found: Detections, truth: Truth) -> None:
    """Raise InputError where detections name images or categories that the truth does not have, or are of others."""
    rows = found.rows
    if found.keypoints is not None and len(found) and found.keypoints.shape[1] != len(truth.sigmas):
        raise InputError(
            f"--predictions {file} has {found.keypoints.shape[1]} keypoints an object, the truth {len(truth.sigmas)}."
        )
    for column, what, known in ((0, "image", truth.ids.tolist()), (6, "category", [*truth.names])):
        unknown = np.setdiff1d(rows[:, column], known)
        if len(unknown):
            raise InputError(
                f"--predictions {file} names {what} ids that the data set does not have, {len(unknown)} of them: "
                f"{', '.join(f'{id_:g}' for id_ in unknown[:5])}; known are {_span(known)}."
            )
    if found.mask_sizes is not None:
        place = {id_: i for i, id_ in enumerate(truth.ids.tolist())}
        sizes = truth.sizes[[place[int(id_)] for id_ in rows[:, 0]]].reshape(-1, 2)
        if len(other := np.flatnonzero((sizes != found.mask_sizes).any(1))):
            (height, width), (rows_, columns) = sizes[other[0]].tolist(), found.mask_sizes[other[0]].tolist()
            raise InputError(
                f"--predictions {file} has {len(other)} masks of another size than their images; the first is of "
                f"{columns}x{rows_} px, image {rows[other[0], 0]:g} of {width}x{height}. Scale them to their images."
            )


def with_annotations(config: Configured, data: DataFiles) -> Configured:
    """The configuration with --annotations: where it is not given, the split's own annotation file, if it has one."""
    return replace(config, annotations=config.annotations or data.annotations(config.split))


def read_annotated(config: EvalConfig, accelerator: Accelerator, carries: Carries = "boxes") -> Truth | None:
    """What --annotations says, for `read_truth`; the main process alone reads it and has it (collective).

    Call it before the labels are read: they may take minutes.

    Args:
        config: names the annotation file.
        accelerator: of the run.
        carries: what is needed of the annotations.

    Raises:
        InputError: on all ranks, where it cannot be used.
    """
    said: list[Truth] = []
    if config.annotations:
        on_main(accelerator, lambda: said.append(read_annotations(config.annotations, carries)))
    return said[0] if said else None


def read_truth(
    labels: Labels | None,
    objects: Objects,
    config: EvalConfig,
    accelerator: Accelerator,
    annotated: Truth | None = None,
) -> Truth:
    """The COCO truth of these images, or of all in the annotation file (collective).

    It is what the labels say, or --annotations, whose image ids the labels then take over. The main process alone
    has what is in that file.

    Args:
        labels: of the images; None for all in the annotation file.
        objects: of the data set.
        config: names the annotation file.
        accelerator: of the run.
        annotated: what `read_annotated` has returned.

    Raises:
        InputError: on all ranks, where the annotation file cannot be used.
    """
    sigmas = getattr(config, "sigmas", None) or ()
    if not config.annotations:
        assert labels is not None
        truth = Truth.of_labels(labels, objects.names, sigmas)
        truth.keypoint_names = objects.keypoint_names
        return truth
    whole: list[Truth] = []

    def read() -> tuple[np.ndarray, list[dict[str, Any]]]:
        assert annotated is not None
        said = annotated
        if labels is not None:
            said = own_truth(config.annotations, labels, objects.names, config, annotated)
        said.sigmas, said.keypoint_names = sigmas, objects.keypoint_names
        number = {len(one["keypoints"]) // 3 for one in said.beside[:1] if "keypoints" in one}
        if number and number != {len(sigmas)}:
            raise InputError(
                f"--annotations {config.annotations} has {number.pop()} keypoints an object, where {len(sigmas)} are "
                "expected."
            )
        whole.append(said)
        return said.ids, said.categories

    ids, categories = on_main(accelerator, read)
    if labels is not None:
        labels.own_ids = ids
    return whole[0] if whole else Truth(ids, categories, np.zeros((len(ids), 2), np.int64), str)
