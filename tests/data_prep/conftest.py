"""Fixtures of the data_prep tests: rows, pictures, and commands run as a user runs them."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.converting.command import main

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture
def fixtures() -> Path:
    """The small copies of the data sets' own files."""
    return HERE / "fixtures"


@pytest.fixture
def golden() -> Path:
    """The rows that the converters must give, verified by hand."""
    return HERE / "golden"


@pytest.fixture
def convert() -> Callable[..., int]:
    """Run a converter in this process: convert(name, source, out, *options) -> exit code."""

    def run(name: str, source: Path, out: Path, *options: str) -> int:
        converter = importlib.import_module(f"data_prep.{name}").CONVERTER
        return main(converter, ["--source", str(source), "--out", str(out), *options])

    return run


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess]:
    """Run `python -m data_prep.NAME ...` in a process of its own."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", f"data_prep.{name}", *map(str, arguments)]
        return subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )

    return run


@pytest.fixture
def picture() -> Callable[..., Path]:
    """Write a picture with smooth random structure: picture(path, seed, size) -> path."""

    def write(
        path: Path, seed: int = 0, size: tuple[int, int] = (64, 48), **options: object
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, **options)
        return path

    return write


@pytest.fixture
def mix(tmp_path: Path) -> Callable[..., Path]:
    """Write a source folder with a llava_v1_5_mix665k.json of these records."""

    def write(records: object, name: str = "source") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        text = records if isinstance(records, str) else json.dumps(records)
        (folder / "llava_v1_5_mix665k.json").write_text(text, encoding="utf-8")
        return folder

    return write
