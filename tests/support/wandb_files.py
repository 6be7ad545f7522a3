"""Reading what an offline W&B run has written."""

import json
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER = 32768, 7  # bytes


def wandb_records(file: Path) -> Iterator:
    """The records of an offline run.

    The file is a LevelDB log: a header of 7 bytes, then blocks of 32 KiB that hold chunks (checksum
    4 bytes, length 2, type 1: full, first, middle, last).
    """
    from wandb.proto import wandb_internal_pb2

    data, position, parts = file.read_bytes(), HEADER, b""
    while position < len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        begin, end = position + HEADER, position + HEADER + length
        if end > len(data):
            return  # still being written
        parts += data[begin:end]
        position = end
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history_and_config(file: Path) -> tuple[list[dict], dict]:
    """What an offline run has logged, and its config, with their values."""
    logged, config = [], {}
    for record in wandb_records(file):
        for update in (*record.config.update, *record.run.config.update):
            key = update.key or "/".join(update.nested_key)
            config[key] = json.loads(update.value_json)
        if record.WhichOneof("record_type") == "history":
            entry = {}
            for item in record.history.item:
                entry[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            logged.append(entry)
    return logged, config


def tables(file: Path) -> Iterator[tuple[dict, dict[str, Path]]]:
    """The increments of an offline run's tables, with the files that they name."""
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "artifact" and "table" in record.artifact.type:
            contents = record.artifact.manifest.contents
            files = {entry.path: Path(entry.local_path) for entry in contents}
            [name] = [path for path in files if path.endswith(".table.json")]
            yield json.loads(files[name].read_text()), files
