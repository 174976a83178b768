"""COCO's truth of a dict that a test writes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.data.coco_json import CocoFile
from train.evaluation.cocofiles import as_truth
from train.evaluation.truth import Truth


def truth_of(content: dict[str, Any], sigmas: Sequence[float] = ()) -> Truth:
    """The truth that a COCO annotation dict says.

    Args:
        content: the dict; `beside` of an annotation is what it has beside its box.
        sigmas: OKS sigma of each keypoint.
    """
    images, marks = content["images"], content["annotations"]
    ids = [image["id"] for image in images]
    place = {id_: i for i, id_ in enumerate(ids)}
    said = CocoFile(
        ids=np.array(ids, np.int64),
        files=[image["file_name"] for image in images],
        sizes=np.array([(image["height"], image["width"]) for image in images], np.int64).reshape(-1, 2),
        image=np.array([place[a["image_id"]] for a in marks], np.int64),
        category=np.array([a["category_id"] for a in marks], np.int64),
        boxes=np.array([a["bbox"] for a in marks], np.float64).reshape(-1, 4),
        area=np.array([a["area"] for a in marks], np.float64),
        crowd=np.array([a["iscrowd"] for a in marks], np.int64),
        beside=[a["beside"] for a in marks if "beside" in a],
        categories=content["categories"],
    )
    return as_truth(said, sigmas)
