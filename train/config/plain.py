"""Text files that people write, read with bounds and in words: their bytes, their keys."""

import contextlib
import unicodedata
from typing import Any

import yaml

from train.config.errors import InputError

LONGEST = 200  # characters of a class name


def text_of(file: str, source: str, largest: int) -> str:
    """What a file says, without a byte order mark.

    Args:
        file: its path.
        source: how it is called in a message.
        largest: bytes that it may have.

    Raises:
        InputError: it cannot be read, is larger, or is no UTF-8.
    """
    try:
        with open(file, "rb") as opened:
            data = opened.read(largest + 1)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror or error}.") from None
    if len(data) > largest:
        raise InputError(f"{source} is larger than {largest // 1_000_000} MB, which no such file is.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"not UTF-8 (byte {error.start})"
        raise InputError(f"{source} is no text that can be read: it is {kind}. Save it as UTF-8.") from None


def keys_of(mapping: yaml.MappingNode, source: str) -> dict[str, yaml.Node]:
    """A mapping's values by key; a key that stands twice is an error, since YAML takes the last one silently."""
    found: dict[str, yaml.Node] = {}
    lines: dict[str, int] = {}
    for key, value in mapping.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in found:
            raise InputError(f"{source} says `{name[:200]}` twice, in line {lines[name]} and in line {line}.")
        found[name], lines[name] = value, line
    return found


def mapping_of(text: str, source: str) -> tuple[Any, dict[str, yaml.Node]]:
    """A YAML text as values, and its keys as they are written; without keys where it is no mapping.

    Raises:
        InputError: it is no YAML, or a key stands twice.
    """
    try:
        content, root = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{source} is not YAML that can be read: {' '.join(str(error).split())}") from None
    return content, keys_of(root, source) if isinstance(root, yaml.MappingNode) else {}


def shown(value: Any) -> str:
    """A value for a message. What is no scalar is not written out: through aliases 400 bytes may mean gigabytes."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple | set):
        return f"a list of {len(value)}"
    return (repr(value) if isinstance(value, str) else str(value))[:60]


def checked_name(name: str, source: str) -> str:
    """A class name that fits on one line of a terminal and does nothing there; InputError where it does not."""
    with contextlib.suppress(UnicodeDecodeError):  # a character that JSON writes as two, which YAML does not join
        name = name.encode("utf-16", "surrogatepass").decode("utf-16")
    # control characters, lone surrogates, line and paragraph separators, and marks that turn the writing around
    bad = [
        c
        for c in name
        if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068"
    ]
    if bad:
        raise InputError(f"{source} is {name[:60]!r}, which holds {bad[0]!r}; a name is one line of printable text.")
    if not any(c.isprintable() and not c.isspace() for c in name):
        raise InputError(f"{source} is empty; write a name, in quotes if need be.")
    if len(name) > LONGEST:
        raise InputError(f"{source} has {len(name)} characters; {LONGEST} is the most.")
    return name
