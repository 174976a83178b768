"""A copy of a data set without what is wrong with it, in the same format. Nothing of the original is touched."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from train.config.errors import InputError
from train.data.darknet import OBJ_DATA, write_obj_data
from train.data.findings import Finding
from train.data.formats import label_text, read_label
from train.data.index import Index
from train.data.listing import DataFiles, label_file
from train.data.looks import ENDINGS, FORMATS, Looks
from train.data.mended_annotations import (
    Written,
    copy_image,
    lying_on_earlier,
    place_in,
    write_coco,
    write_parquet,
    write_voc,
)
from train.data.tables import OUTSIDE, over_edge
from train.processes.files import draft_of

LEFT_OUT = ("image that cannot be read", "duplicate image", "image in two splits")
NO_AREA = 1e-9  # of the image: what rounding makes of none
Row = tuple[float, ...]


def check_place(place: Path, data: DataFiles) -> None:
    """Raise InputError where a copy would lie over something, in the data set or around it."""
    here, root = place.absolute().resolve(), data.root.resolve()
    if os.path.lexists(place):
        raise InputError(f"--fix is {str(place)!r}, which is there already; name a folder that is not.")
    if root == here or root in here.parents or here in root.parents:
        raise InputError(f"--fix is {str(place)!r}, in the data set {root} or around it; name a folder beside it.")


def mend(
    data: DataFiles, indexes: dict[str, Index], looks: dict[str, Looks], found: list[Finding], place: Path
) -> Iterable[str]:
    """Write a cleaned copy; lines on what was left out and changed. It is there whole or not at all.

    Left out are images that cannot be read, copies within a split, those that an earlier split has, too, and those
    whose annotations are of another size. Of what is left boxes end at the image, and no object is there twice, without
    a size or of no class. All that is said beside stays.

    Args:
        data: the data set.
        indexes: of its splits.
        looks: of their images.
        found: what is wrong with it.
        place: where the copy goes; see `check_place`.

    Raises:
        InputError: there is no room for it, or no image of a split can be kept.
    """
    draft = draft_of(place.absolute())
    told = []
    try:
        draft.mkdir(parents=True)
        splits: dict[str, Any] = {}
        for split, index in indexes.items():
            gone = {one.file for one in found if one.split == split and one.kind in LEFT_OUT}
            rows = [row for row in range(len(index)) if index.file(row) not in gone]
            entries = data.splits[split]
            if not isinstance(entries, dict):
                written = _write_texts(draft, split, data, index, looks[split], rows)
            elif entries["annotations"].endswith(".json"):
                written = write_coco(draft, split, data, index, rows, found)
            elif entries["annotations"].endswith(".parquet"):
                written = write_parquet(draft, split, data, index, rows)
            else:
                written = write_voc(draft, split, data, index, rows)
            if not written.images:
                raise InputError(
                    f"No image of {split} would be in the copy, so none is written; what is wrong with them is above."
                )
            splits[split] = written.entries
            told.append(f"{split}: {written.images} of {len(index)} images, {written.changed} label files changed")
            if written.other:
                told.append(f"{split}: {written.other} images are left out, for their labels are of another size")
        if _is_darknet(data):
            write_obj_data(draft, splits, data.names)
        elif not os.path.isdir(data.name):
            (draft / "data.yaml").write_text(_as_yaml(data, splits), encoding="utf-8")
        os.rename(draft, place)
    except OSError as error:
        raise InputError(
            f"The copy {place} cannot be written: {error.strerror or error}. --fix names another."
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return [*told, f"a cleaned copy is in {place}"]


def _as_yaml(data: DataFiles, splits: dict[str, Any]) -> str:
    content: dict[str, Any] = {"path": ".", **splits, "names": data.names}
    if data.keypoints:
        content |= {"kpt_shape": [*data.keypoints], "flip_idx": [*data.flip_idx], "kpt_oks_sigmas": [*data.sigmas]}
        content |= {"kpt_names": {k: [*data.keypoint_names] for k in data.names}}
    return yaml.safe_dump({key: value for key, value in content.items() if value}, sort_keys=False, allow_unicode=True)


# Label files ----------------------------------------------------------------------------------------------------------
def _write_texts(draft: Path, split: str, data: DataFiles, index: Index, looks: Looks, rows: list[int]) -> Written:
    """Images and label files of a split."""
    changed, taken, listed = 0, set(), []
    for row in rows:
        file, kind = index.file(row), FORMATS[looks.formats[row]]
        name, ending = os.path.splitext(_place(file, split, data, index))
        endings = ENDINGS.get(kind, ())
        if endings and ending[1:].lower() not in endings:
            ending = f".{endings[0]}"
        while f"{name}.txt" in taken:  # a.jpg beside a.png
            name += "_"
        taken.add(f"{name}.txt")
        listed.append(name + ending)
        copy_image(file, draft, draft / (name + ending))
        if not os.path.exists(label_file(file)):
            continue
        text = _text(label_file(file))
        clean = mended_text(text, len(data.names), data.keypoints)
        changed += clean != text
        label = Path(place_in(draft, Path(f"{draft}{label_file(f'/{name}{ending}')}"), file))
        label.write_text(clean, encoding="utf-8")
    if not _is_darknet(data):
        return Written(len(listed), changed, f"images/{split}")
    (draft / f"{split}.txt").write_text("".join(f"data/{image}\n" for image in listed), encoding="utf-8")
    return Written(len(listed), changed, f"{split}.txt")


def _is_darknet(data: DataFiles) -> bool:
    return os.path.basename(data.name) == OBJ_DATA


def _place(file: str, split: str, data: DataFiles, index: Index) -> str:
    """Where an image goes in the copy: in Darknet's form where it was, otherwise into the folder of its split."""
    if _is_darknet(data):
        inside = os.path.relpath(file, data.root)
        return f"obj_{split}_data/{os.path.basename(file)}" if inside.startswith("../") else inside
    inside = file.rpartition("/images/")[2] if "/images/" in file else os.path.relpath(file, index.base)
    return f"images/{split}/" + inside.removeprefix(f"{split}/")


def _text(file: str) -> str:
    """A label file, in UTF-8 or as Windows saves it."""
    try:
        return label_text(file)
    except UnicodeDecodeError as error:
        kind = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1"
        return error.object.decode(kind, errors="replace")
    except ValueError:  # it cannot be read at all
        return ""


def mended_text(text: str, classes: int, keypoints: tuple[int, ...] = ()) -> str:
    """A label file without the lines that cannot be used, as it is where all can.

    Args:
        text: of the file.
        classes, keypoints: see `read_label`.
    """
    kept: dict[Row, str] = {}
    for line in text.splitlines():
        fields = line.split()
        if not fields:
            continue
        box = _box_of(line, classes, keypoints)
        if box is None or over_edge(box)[0] > OUTSIDE:
            line = _ending_at_the_image(fields, keypoints)
            box = _box_of(line, classes, keypoints) if line else None
        if box is None or not box[0, 2:].all():  # a box or polygon without a size
            continue
        kept.setdefault(tuple(map(float, line.split())), line)
    if not keypoints and len({len(row) == 5 for row in kept}) == 2:
        kept = {row: line if len(row) > 5 else _as_polygon(row) for row, line in kept.items()}
    elif len(boxes := [row for row in kept if len(row) == 5]) == len(kept):
        gone = lying_on_earlier(np.array([row[1:] for row in boxes]), [row[0] for row in boxes], centred=True)
        kept = {row: line for i, (row, line) in enumerate(kept.items()) if i not in gone}
    lines = [*kept.values()]
    return text if lines == text.splitlines() else "".join(f"{line}\n" for line in lines)


def _box_of(line: str, classes: int, keypoints: tuple[int, ...]) -> np.ndarray | None:
    """The box (1, 4) of a label, xywh normalised; None where the line is none."""
    try:
        return read_label(line, classes, keypoints)[1]
    except ValueError:
        return None


def _ending_at_the_image(fields: list[str], keypoints: tuple[int, ...]) -> str:
    """A box, with its keypoints as they are, or a polygon as far as it lies on its image; nothing where it does not, or
    is no such line.
    """
    try:
        row = [*map(float, fields)]
    except ValueError:
        return ""
    if not np.isfinite(row).all() or len(row) < 5:
        return ""
    if len(row) == 5 or keypoints:
        x, y, w, h = row[1:5]
        (left, right), (top, bottom) = (np.clip((c - s / 2, c + s / 2), 0, 1) for c, s in ((x, w), (y, h)))
        if min(w, h) <= 0 or right <= left or bottom <= top:
            return ""
        numbers = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
        return " ".join([fields[0], *(f"{number:.6g}" for number in numbers), *fields[5:]])
    numbers = np.clip(row[1:], 0, 1).tolist()
    if len(numbers) % 2 or cv2.contourArea(np.array(numbers, np.float32).reshape(-1, 2)) < NO_AREA:
        return ""  # it lies beside the image, and is a line along its edge now
    return " ".join([fields[0], *(f"{number:.6g}" for number in numbers)])


def _as_polygon(row: Row) -> str:
    """A box as its corners, for a file of polygons."""
    x, y, w, h = row[1:]
    corners = [x - w / 2, y - h / 2, x + w / 2, y - h / 2, x + w / 2, y + h / 2, x - w / 2, y + h / 2]
    return " ".join([f"{row[0]:g}", *(f"{value:.6g}" for value in np.clip(corners, 0, 1))])
