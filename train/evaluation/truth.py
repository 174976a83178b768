"""COCO's truth of a split. Ranks know the images' ids; the main process makes the rest, of the images it needs."""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from train.data.formats import with_visibility
from train.data.labels import Labels, ragged
from train.data.runlengths import encoded

OF_BOX = 0.53  # share of a box that its object takes up, where that is not known


@dataclass
class Marks:
    """COCO's annotations of some images, image by image."""

    image: np.ndarray  # (m,) int64: place of its image in the truth
    category: np.ndarray  # (m,) int64 category id
    boxes: np.ndarray  # (m, 4) float64: left, top, width, height in pixels of the original image
    area: np.ndarray  # (m,) float64
    crowd: np.ndarray  # (m,) int64: 1 where it is a crowd


class Truth:
    """Images, annotations and categories, which stand in the order of the class indices.

    Args:
        ids: COCO image ids.
        categories: id and name of each.
        sizes: (n, 2) height and width of the images in pixels.
        file: gives an image's path by its place.
        labels: that the annotations are made from: category ids are class indices. Areas are those of the boxes, of
            the polygons' pixels, or 0.53 of the boxes where there are keypoints, as in Ultralytics and xtcocotools.
        own: the annotations of a file, by image; without labels.
        beside: of each of these its `segmentation`, or its `keypoints` and their number, as COCO has them; empty of
            boxes.
        sigmas: OKS sigma of each keypoint.
    """

    def __init__(
        self,
        ids: np.ndarray,
        categories: list[dict[str, Any]],
        sizes: np.ndarray,
        file: Callable[[int], str],
        labels: Labels | None = None,
        own: Marks | None = None,
        beside: list[dict[str, Any]] | None = None,
        sigmas: Sequence[float] = (),
    ):
        self.ids, self.categories, self.sizes, self.file = ids, categories, sizes, file
        self.labels, self.own, self.beside, self.sigmas = labels, own, beside or [], sigmas
        self.keypoint_names: tuple[str, ...] = ()
        if own is not None:
            self.first = np.searchsorted(own.image, np.arange(len(ids) + 1))
        self.encoded: dict[int, list[dict[str, Any]]] = {}  # masks by place, which take long to make

    @classmethod
    def of_labels(cls, labels: Labels, names: dict[int, str], sigmas: Sequence[float] = ()) -> "Truth":
        """The truth that the label files say."""
        categories = [{"id": index, "name": name} for index, name in names.items()]
        return cls(labels.ids, categories, labels.shapes, labels.file, labels=labels, sigmas=sigmas)

    @property
    def names(self) -> dict[int, str]:
        """Category names by id."""
        return {category["id"]: category["name"] for category in self.categories}

    def __len__(self) -> int:
        return len(self.ids)

    def marks(self, places: np.ndarray | None = None) -> Marks:
        """The annotations of these images, or of all. Call it on the main process."""
        places = np.arange(len(self)) if places is None else places
        if self.own is not None:
            each = ragged(self.first[places], self.first[places + 1] - self.first[places])
            own = self.own
            return Marks(own.image[each], own.category[each], own.boxes[each], own.area[each], own.crowd[each])
        assert self.labels is not None  # truth that another process has
        image, category, boxes = self.labels.boxes_in_pixels(places)
        area = boxes[:, 2] * boxes[:, 3]
        if self.labels.carries == "keypoints":
            area = OF_BOX * area
        if self.labels.carries == "polygons":
            area = np.array([coco_mask.area(mask) for place in places.tolist() for mask in self.masks(place)], float)
        return Marks(image, category.astype(np.int64), boxes, area, np.zeros(len(image), int))

    def outlines(self, place: int) -> list[dict[str, Any]]:
        """What the annotations of an image have beside boxes, as COCO has it; nothing where that is all they have."""
        if self.own is not None:
            return self.beside[self.first[place] : self.first[place + 1]]
        assert self.labels is not None
        if self.labels.carries == "boxes":
            return []
        entry, (height, width) = self.labels[place], self.sizes[place].tolist()
        if self.labels.carries == "polygons":
            return [{"segmentation": [(polygon * (width, height)).ravel().tolist()]} for polygon in entry.segments]
        return [_as_keypoints(points, height, width) for points in entry.keypoints]

    def masks(self, place: int) -> list[dict[str, Any]]:
        """The masks of an image's annotations: COCO's run-length encoding, compressed, of their polygons."""
        if place not in self.encoded:
            size = self.sizes[place].tolist()
            self.encoded[place] = [encoded(one["segmentation"], *size) for one in self.outlines(place)]
        return self.encoded[place]

    def size_of(self, place: int) -> dict[str, Any]:
        """COCO's dict of an image, without its path, which need not be UTF-8."""
        height, width = self.sizes[place].tolist()
        return {"id": int(self.ids[place]), "width": width, "height": height}

    def sizes_by_id(self, places: np.ndarray) -> dict[int, tuple[int, int]]:
        """Height and width of the images at these places, by id."""
        return dict(zip(self.ids[places].tolist(), map(tuple, self.sizes[places].tolist()), strict=True))

    def annotations(self, places: np.ndarray | None = None, first: int = 1, iou_type: str = "") -> list[dict[str, Any]]:
        """COCO's dicts of annotations.

        Args:
            places: of the images; unset takes all.
            first: id of the first annotation; pycocotools takes 0 for none.
            iou_type: what they are needed for: boxes alone, or masks, which are encoded then; unset gives all that
                there is, as it was given.
        """
        places = np.arange(len(self)) if places is None else places
        marks = self.marks(places)
        columns = (self.ids[marks.image], marks.category, marks.boxes, marks.area, marks.crowd)
        found = [
            {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
            for number, (image, category, box, area, crowd) in enumerate(
                zip(*(column.tolist() for column in columns), strict=True), first
            )
        ]
        if iou_type == "segm":
            beside = [{"segmentation": mask} for place in places.tolist() for mask in self.masks(place)]
        else:
            beside = [one for place in places.tolist() for one in self.outlines(place)] if iou_type != "bbox" else []
        return [one | more for one, more in zip(found, beside, strict=True)] if beside else found

    def dataset(self) -> dict[str, Any]:
        """COCO's annotation dict; `file_name` is a path."""
        images = [self.size_of(i) | {"file_name": self.file(i)} for i in range(len(self))]
        return {"images": images, "annotations": self.annotations(), "categories": self.categories}

    @property
    def own_numbers(self) -> tuple[np.ndarray, Callable[[int], str]] | None:
        """Of a file's own truth (n,) int32, a hash of each image's size and annotations, and the images' paths."""
        if self.own is None:
            return None
        found = np.zeros(len(self), np.uint32)
        for i in range(len(self)):
            marks = self.marks(np.array([i]))
            number = zlib.crc32(f"{self.sizes[i].tolist()}".encode())
            for column in (marks.category, marks.boxes, marks.area, marks.crowd):
                number = zlib.crc32(np.ascontiguousarray(column).data, number)
            if outlines := self.outlines(i):
                number = zlib.crc32(json.dumps(outlines).encode(), number)
            found[i] = number
        return found.view(np.int32), self.file


def _as_keypoints(points: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """COCO's `keypoints` and their number, of keypoints (k, 2 or 3) normalised."""
    found = with_visibility(points[None])[0] * (width, height, 1 if points.shape[1] == 3 else 2)
    return {"keypoints": found.ravel().tolist(), "num_keypoints": int((found[:, 2] > 0).sum())}
