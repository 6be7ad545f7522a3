"""Training images that are also in an evaluation folder."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_prep.checking.image_checks import SIMILAR, ImageFacts, examine_all
from data_prep.converting.rows import Problem

_ENDINGS = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}


class EvaluationImages:
    """The images below a folder, by content and by look. Files that cannot be read are named in
    `unreadable`.

    Raises `ValueError` for a folder without images, since a check against nothing would find
    nothing.
    """

    def __init__(self, folder: Path, pool: ThreadPoolExecutor, advance: Callable[[], None]) -> None:
        names = sorted(
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.suffix.lower() in _ENDINGS and path.is_file()
        )
        if not names:
            raise ValueError(f"{folder} holds no images to check against")
        self.by_content: dict[bytes, str] = {}
        self.names: list[str] = []
        self.unreadable: list[str] = []
        looks = []
        for name, facts in zip(names, examine_all(names, folder, pool), strict=True):
            advance()
            if facts.problem is not None:
                self.unreadable.append(name)
                continue
            self.by_content.setdefault(facts.content, name)
            if facts.look is not None:
                looks.append(facts.look)
                self.names.append(name)
        self.looks_N2 = np.array(looks, dtype=np.uint64).reshape(-1, 2)

    def matches(self, images: list[ImageFacts]) -> list[Problem | None]:
        """For each image, the evaluation image that it is, or None."""
        matches = [self._same(facts) for facts in images]
        others = []
        for k, facts in enumerate(images):
            if matches[k] is None and facts.look is not None:
                others.append(k)
        if others and len(self.names):
            looks_M2 = np.array([images[k].look for k in others], dtype=np.uint64)
            for k, look_2 in zip(others, looks_M2, strict=True):
                bits_N = np.bitwise_count(self.looks_N2 ^ look_2).sum(axis=1)
                nearest = int(bits_N.argmin())
                if bits_N[nearest] <= SIMILAR:
                    bits = f"{bits_N[nearest]} of 128 bits differ"
                    detail = f"looks like {self.names[nearest]} ({bits})"
                    matches[k] = Problem("contamination", detail)
        return matches

    def _same(self, facts: ImageFacts) -> Problem | None:
        name = self.by_content.get(facts.content)
        return None if name is None else Problem("contamination", f"same file as {name}")
