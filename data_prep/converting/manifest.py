"""`_manifest` (JSON) of a prepared folder: from what and how it was made, so that nothing is made
twice.

A second run with the same options compares sizes and modification times of the source files with
the manifest's and does nothing when they agree. Contents are not read for that.
"""

import argparse
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pyarrow.parquet as pq

from data_prep.converting.writing import write_json
from fmtrain.data.row_format import MANIFEST

ROW_FORMAT = 3  # raised when converters write different rows from the same source
_PLACES = ("source", "out", "reject")  # options that say where, not what


@dataclass
class ConversionCounts:
    """What a conversion wrote and did not write: rows by source, parts of records by reason,
    records rejected."""

    rows: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    rejected: int = 0


@dataclass(frozen=True)
class Fingerprint:
    """What a prepared folder depends on. `sources` has [size in bytes, mtime in ns] by file."""

    converter: str
    row_format: int
    options: dict[str, Any]
    sources: dict[str, list[int]]

    @classmethod
    def of(cls, converter: str, files: list[Path], options: argparse.Namespace) -> Self:
        """Fingerprint of a conversion that is about to run."""
        settings = {
            key: value for key, value in sorted(vars(options).items()) if key not in _PLACES
        }
        settings["image_root"] = str(options.image_root.resolve()) if options.embed_images else None
        settings["reject"] = options.reject is not None
        stats = {str(file.resolve()): file.stat() for file in files}
        return cls(
            converter,
            ROW_FORMAT,
            settings,
            {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()},
        )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared folder, or None where there is none. Raises `ValueError` for one
    that is not JSON."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def is_current(out: Path, fingerprint: Fingerprint) -> bool:
    """Whether `out` was made from just this and its files have the sizes that were written."""
    manifest = read_manifest(out)
    if manifest is None or manifest.get("fingerprint") != json.loads(json.dumps(vars(fingerprint))):
        return False
    if manifest["files"] != file_sizes(out):
        return False
    root = fingerprint.options["image_root"]
    return root is None or manifest["images"] == image_digest(out, Path(root))


def file_sizes(folder: Path) -> dict[str, int]:
    """Sizes in bytes of the row files in `folder`."""
    return {file.name: file.stat().st_size for file in sorted(folder.glob("rows*"))}


def image_digest(folder: Path, root: Path) -> str:
    """Digest of name, size and modification time of every image file that the shards in `folder`
    embed."""
    digest = hashlib.blake2b(digest_size=16)
    for shard in sorted(folder.glob("rows*.parquet")):
        for batch in pq.ParquetFile(shard).iter_batches(columns=["images.list.element.path"]):
            for images in batch.column(0).to_pylist():
                for image in images:
                    path = root / image["path"]
                    stat = path.stat() if path.is_file() else None
                    digest.update(
                        f"{image['path']}\0{stat and (stat.st_size, stat.st_mtime_ns)}\n".encode()
                    )
    return digest.hexdigest()


def write_manifest(
    folder: Path,
    fingerprint: Fingerprint,
    counts: ConversionCounts,
    images: str | None,
    evaluation_only: bool,
    box_frame: str | None,
) -> None:
    """Write the manifest of a folder whose rows are complete; `images` is its `image_digest` if
    they are embedded, `box_frame` what their boxes are relative to if they have any."""
    manifest = {
        "fingerprint": vars(fingerprint),
        "rows": counts.rows.total(),
        "rows_by_source": dict(sorted(counts.rows.items())),
        "rejected": counts.rejected,
        "left_out": dict(sorted(counts.left_out.items())),
        "evaluation_only": evaluation_only,
        "box_frame": box_frame,
        "files": file_sizes(folder),
        "images": images,
    }
    write_json(folder / MANIFEST, manifest)


def refresh_manifest(folder: Path, rows: int) -> None:
    """Bring the manifest up to date after rows were moved out of `folder`, so that a rerun of the
    converter does not bring them back. Does nothing where there is no manifest."""
    manifest = read_manifest(folder)
    if manifest is not None:
        moved = manifest["rows"] - rows
        changed = {
            "rows": rows,
            "moved": manifest.get("moved", 0) + moved,
            "files": file_sizes(folder),
        }
        write_json(folder / MANIFEST, {**manifest, **changed})
