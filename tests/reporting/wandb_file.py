"""Reads the records of an offline W&B run: LevelDB's log format around protobuf messages."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


def _chunks(data: bytes) -> Iterator[bytes]:
    offset, whole = 7, b""  # behind the file's own header
    while offset + HEADER <= len(data):
        left = BLOCK - offset % BLOCK
        if left < HEADER:
            offset += left
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + HEADER])
        if not length and not kind:
            offset += left
            continue
        part = data[offset + HEADER : offset + HEADER + length]
        offset += HEADER + length
        if len(part) < length:  # a killed run's last record
            return
        whole = part if kind in (1, 2) else whole + part  # 1 whole, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            yield whole


def _values(items: Any) -> dict[str, Any]:
    """Items as a dict; those of media are nested."""
    values: dict[str, Any] = {}
    for item in items:
        *outer, last = list(item.nested_key) or [item.key]
        place = values
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return values


def read(folder: Path) -> dict[str, list[Any]]:
    """The run's records by kind; history rows, the summary and the configuration as dicts."""
    records: dict[str, list[Any]] = {"history": [], "metric": [], "artifact": [], "run": [], "summary": []}
    (file,) = folder.glob("*.wandb")
    for chunk in _chunks(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(chunk)
        kind = record.WhichOneof("record_type")
        content: Any = getattr(record, kind)
        if kind in ("history", "summary", "config"):
            content = _values(content.item if kind == "history" else content.update)
        records.setdefault(kind, []).append(content)
    return records
