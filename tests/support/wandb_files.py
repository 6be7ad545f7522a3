"""Reading what an offline W&B run has written."""

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
