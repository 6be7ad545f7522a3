"""Names of the hub, told from those of files and folders here."""

import re
from pathlib import Path


def names_hub(name: str) -> bool:
    """Whether a name that is no folder can be one of the hub: `owner/name`, where the owner is no
    folder here and the whole nothing of this package (`fmtrain/tiny`)."""
    ours = (Path(__file__).parents[1] / name).exists()
    if ours or Path(name).parent.is_dir():
        return False
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
