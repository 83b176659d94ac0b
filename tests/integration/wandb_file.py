"""Reads an offline W&B run back: LevelDB's log framing around protocol-buffer records."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32 * 1024
_FILE_HEADER = 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def payloads(data: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file; one may be cut into parts at the ends of 32 KiB blocks."""
    assert data[:4] == b":W&B"
    position, parts = _FILE_HEADER, b""
    while position + 7 <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        part = data[position + 7 : position + 7 + length]
        if len(part) < length:
            return  # still being written
        position += 7 + length
        if kind in (_FULL, _FIRST):
            parts = b""
        parts += part
        if kind in (_FULL, _LAST):
            yield parts


def read_history(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the history rows and the configuration of an offline run."""
    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    for payload in payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append({_name(item): json.loads(item.value_json) for item in record.history.item})
        elif kind in ("run", "config"):
            update = record.run.config.update if kind == "run" else record.config.update
            config |= {_name(item): json.loads(item.value_json) for item in update}
    return rows, config


def read_summary(path: Path) -> dict[str, Any]:
    """Return the summary of an offline run, as far as it is written."""
    summary: dict[str, Any] = {}
    for payload in payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        if record.WhichOneof("record_type") == "summary":
            summary |= {_name(item): json.loads(item.value_json) for item in record.summary.update}
    return summary


def record_kinds(path: Path) -> set[str]:
    """Return what kinds of records an offline run holds."""
    kinds = set()
    for payload in payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        kinds.add(str(record.WhichOneof("record_type")))
    return kinds


def _name(item: Any) -> str:
    return ".".join(item.nested_key) if item.nested_key else str(item.key)
