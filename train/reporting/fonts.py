"""Fonts for class names in any script: of the system, or of a wheel that ships some. Nothing is downloaded."""

import functools
import importlib.util
import unicodedata
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from ultralytics.utils import plotting

import train

# Wheels, and in them fonts, for which no code of theirs is run: Chinese and Japanese; Korean.
SHIPPED = {"zhplot": "NotoSansSC-Regular.ttf", "koreanize-matplotlib": "NanumGothic.ttf"}
FAMILIES = list(matplotlib.rcParams["font.family"])


def provide_fonts(*texts: Iterable[str]) -> str:
    """Give matplotlib and Ultralytics' plotting fonts that have the characters; return those that no font here has."""
    return _provide("".join(sorted(set("".join(text for some in texts for text in some)))))


def drawable(names: dict[int, str]) -> dict[int, str]:
    """Class names by index as they can be drawn: a symbol that no font here has, such as an emoji, by its name."""
    lacking = {c for c in provide_fonts(names.values()) if unicodedata.category(c) == "So"}
    spelt = {ord(c): f":{unicodedata.name(c, hex(ord(c))).lower().replace(' ', '_')}:" for c in lacking}
    return {index: name.translate(spelt) for index, name in names.items()}


def _provide(characters: str) -> str:
    families, best, lacking = _chosen(characters)
    matplotlib.rcParams["font.family"] = list(families)  # matplotlib goes on to the next where one lacks a character
    plotting.check_font = lambda *_: str(best)  # which would download one
    return lacking


@functools.lru_cache(maxsize=64)
def _chosen(characters: str) -> tuple[tuple[str, ...], Path, str]:
    """Families for matplotlib, the one font for labels on images, and the characters that no font here has."""
    wanted = {ord(c) for c in characters if c.isprintable() and not c.isspace()}
    own = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    best, covered, families = own, len(wanted & _characters(own)), list(FAMILIES)
    lacking = wanted - _characters(own)
    for font in _others() if lacking else ():
        if not lacking & (has := _characters(font)):
            continue
        lacking -= has
        families.append(_family(font))
        if len(wanted & has) > covered:
            best, covered = font, len(wanted & has)
        if not lacking:
            break
    return tuple(families), best, "".join(map(chr, sorted(lacking)))


def _others() -> Iterable[Path]:
    """Fonts of the wheels, then those of the system."""
    for wheel, name in SHIPPED.items():
        try:
            yield from (Path(str(file.locate())) for file in files(wheel) or () if file.name == name)
        except PackageNotFoundError:
            continue
    if importlib.util.find_spec("pymupdf_fonts"):  # Arabic, Devanagari, Hebrew, Thai
        unpacked = Path(train.scratch.name) / "FiraGO.ttf"
        if not unpacked.exists():
            unpacked.write_bytes(importlib.import_module("pymupdf_fonts.FiraGO_Regular").fontbuffer)
        yield unpacked
    yield from map(Path, sorted(font_manager.findSystemFonts()))


@functools.cache
def _characters(font: Path) -> frozenset[int]:
    try:
        face = FT2Font(str(font))
        return frozenset(face.get_charmap() if face.scalable else ())
    except (OSError, RuntimeError, ValueError):  # what lies among the fonts and is none
        return frozenset()


def _family(font: Path) -> str:
    """Make matplotlib know the font."""
    font_manager.fontManager.addfont(str(font))
    return FT2Font(str(font)).family_name
