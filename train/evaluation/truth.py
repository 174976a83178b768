"""COCO's truth of a split. Ranks know the images' ids; the main process makes the rest, of the images it needs."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from ultralytics.utils.ops import xywh2ltwh

from train.data.labels import Labels, ragged


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
        labels: that the annotations are made from: category ids are class indices, areas are box areas.
        own: the annotations of a file, by image; without labels.
    """

    def __init__(
        self,
        ids: np.ndarray,
        categories: list[dict[str, Any]],
        sizes: np.ndarray,
        file: Callable[[int], str],
        labels: Labels | None = None,
        own: Marks | None = None,
    ):
        self.ids, self.categories, self.sizes, self.file = ids, categories, sizes, file
        self.labels, self.own = labels, own
        if own is not None:
            self.first = np.searchsorted(own.image, np.arange(len(ids) + 1))

    @classmethod
    def of_labels(cls, labels: Labels, names: dict[int, str]) -> "Truth":
        """The truth that the label files say."""
        categories = [{"id": index, "name": name} for index, name in names.items()]
        return cls(labels.ids, categories, labels.shapes, labels.file, labels=labels)

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
        image, category, boxes = self.labels.boxes(places)
        heights, widths = self.sizes[image].T
        boxes = xywh2ltwh(boxes * np.stack((widths, heights, widths, heights), 1))
        return Marks(image, category.astype(np.int64), boxes, boxes[:, 2] * boxes[:, 3], np.zeros(len(image), int))

    def size_of(self, place: int) -> dict[str, Any]:
        """COCO's dict of an image, without its path, which need not be UTF-8."""
        height, width = self.sizes[place].tolist()
        return {"id": int(self.ids[place]), "width": width, "height": height}

    def annotations(self, places: np.ndarray | None = None, first: int = 1) -> list[dict[str, Any]]:
        """COCO's dicts of the annotations of these images, or of all; ids count from `first`: pycocotools takes 0 for
        none.
        """
        marks = self.marks(places)
        columns = (self.ids[marks.image], marks.category, marks.boxes, marks.area, marks.crowd)
        return [
            {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
            for number, (image, category, box, area, crowd) in enumerate(
                zip(*(column.tolist() for column in columns), strict=True), first
            )
        ]

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
            found[i] = number
        return found.view(np.int32), self.file
