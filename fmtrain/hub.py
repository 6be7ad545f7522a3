"""Names of the hub, told from those of files and folders here; and folders that go there."""

import re
from pathlib import Path

from fmtrain.command_line import folded

NAME = r"[\w.-]+/[\w.-]+"


def names_hub(name: str) -> bool:
    """Whether a name that is no folder can be one of the hub: `owner/name`, where the owner is no
    folder here and the whole nothing of this package (`fmtrain/tiny`)."""
    ours = (Path(__file__).parents[1] / name).exists()
    if ours or Path(name).parent.is_dir():
        return False
    return re.fullmatch(NAME, name) is not None


def check_push(repository: str) -> None:
    """Raises `ValueError` where nothing could be pushed: the name is not `owner/name`, there is no
    token, or the hub does not take it."""
    from huggingface_hub import HfApi, get_token

    if re.fullmatch(NAME, repository) is None:
        raise ValueError(f"push_to_hub {repository!r}: a name on the hub is OWNER/NAME")
    if get_token() is None:
        raise ValueError(
            f"push_to_hub {repository}: no token here; `hf auth login`, or HF_TOKEN, gives one"
        )
    _asked(lambda: HfApi().whoami(), f"push_to_hub {repository}")


def push(folder: Path, repository: str) -> str:
    """Put all files of a folder into a repository of models, which is made if there is none.
    Returns the address of the commit. Raises `ValueError` where the hub refuses."""
    from huggingface_hub import HfApi

    api = HfApi()

    def upload() -> str:
        api.create_repo(repository, exist_ok=True)
        message = f"Export of {folder.name} by fmtrain"
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
        return done.commit_url

    again = f"`hf upload {repository} {folder}` tries again"
    return _asked(upload, f"{folder} is written, but not pushed to {repository} ({again})")


def _asked(call, what: str):
    """The answer of the hub, its errors as one line without the token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HTTPError  # of its HTTP library, whichever it is

    try:
        return call()
    except (HTTPError, OSError, ValueError) as error:
        message = folded(error).replace(str(get_token()), "TOKEN")
        raise ValueError(f"{what}: {message[:400]}") from None
