"""What a data set's labels are about, which data, model and evaluation agree on."""

from dataclasses import dataclass
from typing import Literal

Carries = Literal["boxes", "polygons", "keypoints"]  # what labels consist of, as far as a task needs it


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Classes and keypoints."""

    names: dict[int, str]  # of the classes, by index
    channels: int = 3  # of an image
    keypoints: tuple[int, ...] = ()  # number and dimensions of an object's keypoints, where the labels have them
    flip_idx: tuple[int, ...] = ()  # which keypoint each becomes when an image is flipped; empty where nobody says
    sigmas: tuple[float, ...] = ()  # OKS sigma of each keypoint; empty where nobody says
    keypoint_names: tuple[str, ...] = ()
