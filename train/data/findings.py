"""What is wrong with a data set, or seldom meant, or worth knowing: the kinds of it, and how it is told."""

import json
from dataclasses import dataclass
from typing import Any

from train.config.words import printable

LEVELS = {
    "error": "the training leaves it out, or does not begin",
    "warning": "it is trained on, and seldom meant",
    "note": "worth knowing",
}
KINDS = {
    "data set that cannot be used": "error",
    "split that cannot be used": "error",
    "image that cannot be read": "error",
    "labels that cannot be read": "error",
    "not UTF-8": "error",
    "class out of range": "error",
    "coordinate outside the image": "error",
    "negative size": "error",
    "boxes and polygons mixed": "error",
    "annotation that cannot be placed": "error",
    "damaged image": "warning",
    "wrong extension": "warning",
    "names that do not match": "warning",
    "box over the edge": "warning",
    "box of no size": "warning",
    "duplicate box": "warning",
    "id that is there twice": "warning",
    "segmentation that is none": "warning",
    "keypoints that are none": "warning",
    "duplicate image": "warning",
    "image in two splits": "warning",
    "label without image": "warning",
    "class without training": "warning",
    "annotations without ids": "note",
    "image without label": "note",
    "image turned by EXIF": "note",
    "class without a box": "note",
    "class in one split only": "note",
    "classes of unequal numbers": "note",
    "tiny box": "note",
}
# What is said of a box over the edge, in every form
OVER = "its box leaves the image by {:.0%} of a side, and is trained on, for its middle is inside"


@dataclass(frozen=True)
class Finding:
    """One of KINDS."""

    kind: str
    split: str
    file: str
    where: str  # in it, such as `line 3`; empty where it is the file
    what: str

    @property
    def level(self) -> str:
        """One of LEVELS."""
        return KINDS[self.kind]

    def __str__(self) -> str:
        place = ":".join(filter(None, (self.file, self.where.removeprefix("line "))))
        return printable(": ".join(filter(None, (place, self.what))))


def as_json(found: list[Finding]) -> list[dict[str, str]]:
    """The findings for another program."""
    return [{"level": one.level} | vars(one) for one in found]


def to_text(found: list[Finding]) -> str:
    """All findings, a line each, the worst first."""
    order = {level: i for i, level in enumerate(LEVELS)}
    rows = sorted(found, key=lambda one: (order[one.level], [*KINDS].index(one.kind)))
    return "".join(f"{one.level}: {one.kind}: {one}\n" for one in rows)


def dumped(report: dict[str, Any]) -> str:
    """A report as JSON."""
    return json.dumps(report, indent=1, ensure_ascii=False)
