"""What was found on the images of a split, in the forms that COCO's tools take."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# What COCO measures by: the beginning of its metrics' names, and of these in words, and the results file
KINDS = {
    "bbox": ("", "", "predictions.json"),
    "segm": ("mask/", "mask ", "predictions_segm.json"),
    "keypoints": ("pose/", "pose ", "predictions_keypoints.json"),
}
BLOCK = 4096  # detections that are made into dicts at a time


def prefix(iou_type: str) -> str:
    """What the names of metrics by this measure of overlap begin with."""
    return KINDS[iou_type][0]


@dataclass
class Detections:
    """Detections by image id, in the order of NMS within an image."""

    # (n, 7) float64 image id, x, y, width, height, score, category id; x, y is the top left corner, in pixels of the
    # original image
    rows: np.ndarray
    masks: list[bytes] | None = None  # of each COCO's run-length counts, compressed
    keypoints: np.ndarray | None = None  # (n, keypoints, 3) float: x, y in pixels of the original image, score
    boxed: bool = True  # whether they have boxes; a results file may have masks or keypoints alone
    area_of_box: bool = (
        False  # whether their area is their box's in any case, as COCO's tools take it of a results file
    )
    mask_sizes: np.ndarray | None = None  # (n, 2) height and width that a results file gives its masks

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def iou_types(self) -> tuple[str, ...]:
        """What they can be measured by."""
        has = {"bbox": self.boxed, "segm": self.masks is not None, "keypoints": self.keypoints is not None}
        return tuple(iou_type for iou_type, there in has.items() if there)

    def between(self, first: int, last: int) -> "Detections":
        """Those of the images with ids from `first` to `last`."""
        start, end = np.searchsorted(self.rows[:, 0], (first, last + 1))
        return self._those(slice(start, end))

    def surest(self, count: int) -> "Detections":
        """As many of each image and category as COCO's tools measure; of equal scores the first."""
        order = np.lexsort((-self.rows[:, 5], self.rows[:, 6], self.rows[:, 0]))
        groups = self.rows[order][:, [0, 6]]
        begins = np.append(True, (groups[1:] != groups[:-1]).any(1))[: len(order)]
        place = np.arange(len(order)) - np.flatnonzero(begins)[np.cumsum(begins) - 1]
        return self._those(np.sort(order[place < count]))

    def sure(self, confidence: float) -> "Detections":
        """Those from this confidence on."""
        return self._those(np.flatnonzero(self.rows[:, 5] >= confidence))

    def _those(self, which: Any) -> "Detections":
        masks = self.masks
        if masks is not None:
            masks = masks[which] if isinstance(which, slice) else [masks[i] for i in which]
        keypoints = None if self.keypoints is None else self.keypoints[which]
        return replace(self, rows=self.rows[which], masks=masks, keypoints=keypoints, mask_sizes=None)

    def outlines(self, sizes: dict[int, tuple[int, int]]) -> list[Any]:
        """COCO's dicts of the masks.

        Args:
            sizes: height and width of the images by id.
        """
        assert self.masks is not None
        of = {id_: [*size] for id_, size in sizes.items()}  # one list an image
        images = self.rows[:, 0].astype(int).tolist()
        return [{"size": of[id_], "counts": counts} for id_, counts in zip(images, self.masks, strict=True)]

    def results(self, iou_type: str, sizes: dict[int, tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """COCO's results, one by one. Those of masks and keypoints have no box: COCO's tools would take that for the
        area.

        Args:
            iou_type: which of their forms.
            sizes: height and width of the images by id.
        """
        for start in range(0, len(self), BLOCK):
            part = self._those(slice(start, start + BLOCK))
            if iou_type == "bbox":
                name, values = "bbox", part.rows[:, 1:5].tolist()
            elif iou_type == "segm":
                masks = part.outlines(sizes)
                name, values = "segmentation", [mask | {"counts": mask["counts"].decode()} for mask in masks]
            else:
                assert part.keypoints is not None
                name, values = "keypoints", part.keypoints.reshape(len(part), -1).tolist()
            for (image, *_, score, category), value in zip(part.rows.tolist(), values, strict=True):
                yield {"image_id": int(image), "category_id": int(category), name: value, "score": score}
