"""What every command does about arguments and errors."""

import argparse
import contextlib
import difflib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# The exit code of a run that was stopped by a signal and has saved: EX_TEMPFAIL of sysexits.h, "try
# again later". Python, shells and launchers use it for nothing else.
TRY_AGAIN = 75


class Help(argparse.RawTextHelpFormatter):
    """The texts of `--help` as they are written, each with its default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        said = "default" in text or "%(default)s" in text
        unset = default is None or default is False or default in (argparse.SUPPRESS, "", [])
        if said or unset:
            return text
        if isinstance(default, list):
            return f"{text} (default: {' '.join(map(str, default))})".strip()
        return f"{text} (default: %(default)s)".strip()


def asks_for_help(words: Iterable[str]) -> bool:
    """Whether `--help` is among the words of a command that has no parser of its own."""
    return bool({"-h", "--help"} & {*words})


class Parser(argparse.ArgumentParser):
    """argparse with our `Help`, and options that may be spelt with dashes or underscores."""

    def __init__(self, command: str, description: str | None):
        super().__init__(prog=command, description=description, formatter_class=Help)

    def add_argument(self, *names, **settings):
        if "default" in settings:
            settings.setdefault("help", "%(default)s by default")
        return super().add_argument(*names, **settings)

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(
            [_underscored(word) for word in (sys.argv[1:] if args is None else args)], namespace
        )


def _underscored(word: str) -> str:
    """--image-root and --image-root=DIR as --image_root and --image_root=DIR."""
    if not word.startswith("--"):
        return word
    option, equals, value = word.partition("=")
    return "--" + option[2:].replace("-", "_") + equals + value


def printable(text: str) -> str:
    """Text that comes from a file, fit for a terminal: what would control it is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: Exception) -> str:
    """What an error says, on one line; of the system's errors the file and the reason."""
    if isinstance(error, OSError) and error.filename:
        return printable(f"{error.filename}: {error.strerror}")
    return printable(folded(error))


def folded(error: BaseException) -> str:
    """The message of an error without its line breaks, for use within another message."""
    return " ".join(str(error).split())


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is most like this one, for an error about an unknown one."""
    return difflib.get_close_matches(word, known, n=1, cutoff=0)[0]


def guarded(command: Callable[[], int | None]) -> int:
    """Run `command` and return its exit code, 0 for None; bad input (`ValueError`) and disk or
    permissions (`OSError`) become one line `error: ...` on stderr and 2."""
    try:
        return command() or 0
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def quiet() -> None:
    """Without transformers' warnings about names of its own that TRL still sets."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when the block ends and is removed when
    the block raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield staged
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8), all or nothing."""
    with replacing(path) as staged:
        staged.write_text(text, encoding="utf-8")
