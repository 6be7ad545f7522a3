"""How questions are put: the response-formatting prompts of LLaVA-1.5 (arXiv 2310.03744, table 7),
or the bare question."""

from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence

FORMS = ("llava", "plain")

SHORT_ANSWER = "Answer the question using a single word or phrase."
CHOICE = "Answer with the option's letter from the given choices directly."
LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: {}."
DESCRIBE = "Please provide a short description for this region: {}."


def add_prompt_option(parser: ArgumentParser) -> None:
    """`--prompt`, for data sets with short or multiple-choice answers."""
    parser.add_argument(
        "--prompt",
        choices=FORMS,
        default="llava",
        help="llava: LLaVA-1.5's answer prompts; plain: the question alone",
    )


def short_answer(question: str, form: str) -> str:
    """A question that asks for a word or phrase."""
    return f"{question}\n{SHORT_ANSWER}" if form == "llava" else question


def multiple_choice(question: str, choices: Sequence[str], form: str) -> str:
    """A question with lettered choices, one a line. Raises `ValueError` for fewer than one or more
    than 26."""
    if not choices:
        raise ValueError("a multiple-choice question has no choices")
    listed = "\n".join(lettered(choices))
    return f"{question}\n{listed}\n{CHOICE}" if form == "llava" else f"{question}\n{listed}"


def lettered(choices: Sequence[str]) -> list[str]:
    """Each choice behind its letter. Raises `ValueError` for more than 26."""
    return [f"{letter(index, len(choices))}. {choice}" for index, choice in enumerate(choices)]


def letter(index: int, choices: int) -> str:
    """The letter of choice `index` (from 0) out of `choices`. Raises `ValueError` when there is no
    such choice."""
    if not 0 <= index < choices:
        raise ValueError(f"choice {index} of {choices}: there is no such choice")
    if index >= 26:
        raise ValueError(f"{choices} choices, but only 26 letters")
    return chr(ord("A") + index)


def most_common(answers: Sequence[str]) -> str:
    """The answer that most annotators gave; of equally frequent ones the first. Raises `ValueError`
    for no answers."""
    if not answers:
        raise ValueError("a question has no answers")
    return Counter(answers).most_common(1)[0][0]
