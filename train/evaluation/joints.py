"""How far keypoints are off, one by one."""

import numpy as np
from pycocotools import mask as coco_mask

from train.evaluation.detections import Detections
from train.evaluation.truth import Truth

FOUND = 0.5  # IoU of the boxes, from which on an object counts as found


def joint_errors(truth: Truth, detections: Detections) -> np.ndarray:
    """Distance of each keypoint over the root of its object's area, of the objects that were found.

    An object is found by the detection of the highest score of its class whose box overlaps its own, and that has found
    no other.

    Args:
        truth: of the split, with keypoints.
        detections: with keypoints.

    Returns:
        (objects, keypoints); not a number where a keypoint is not labelled.
    """
    assert detections.keypoints is not None
    errors: list[np.ndarray] = []
    for place in range(len(truth)):
        id_ = int(truth.ids[place])
        found, annotations = detections.between(id_, id_), truth.annotations(np.array([place]))
        if not len(found) or not annotations:
            continue
        assert found.keypoints is not None
        boxes = np.array([one["bbox"] for one in annotations])
        overlaps = np.asarray(coco_mask.iou(np.ascontiguousarray(found.rows[:, 1:5]), boxes, [0] * len(boxes)))
        same = found.rows[:, 6:] == np.array([one["category_id"] for one in annotations])
        free = np.array([not one["iscrowd"] for one in annotations])
        for i in np.argsort(-found.rows[:, 5], kind="stable"):
            fits = overlaps[i] * (same[i] & free)
            best = int(fits.argmax())
            if fits[best] >= FOUND:
                free[best] = False
                theirs = np.array(annotations[best]["keypoints"]).reshape(-1, 3)
                distance = np.linalg.norm(found.keypoints[i, :, :2] - theirs[:, :2], axis=1)
                distance /= np.sqrt(max(annotations[best]["area"], 1.0))
                errors.append(np.where(theirs[:, 2] > 0, distance, np.nan))
    return np.array(errors).reshape(len(errors), detections.keypoints.shape[1])
