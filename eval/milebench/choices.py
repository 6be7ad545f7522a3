"""Which option of a multiple-choice question did the model pick?

`extract_original` is MileBench's rule with all its oddities, `extract` the repaired one (Q1-Q3, Q7,
Q14 in README.md).
"""

import re
from collections.abc import Sequence

from eval.milebench.normalize import WORD_END, WORD_START, normalize, normalize_original

_EMPTY_ANSWER = "C"  # what MileBench takes an empty prediction for (Q1)
# An option with one of these is compared in its regex-escaped form (Q3).
_NEVER_EQUAL = set(".^$*|\\+?{}[]()")

_CUE = re.compile(r"\b(?:answer|option|choice)(?:\s+is)?[\s:*\"'(\[]*$", re.IGNORECASE)
_SENTENCE_START = re.compile(r"(?:^|[.!?:\n])\s*$")


def label(index: int) -> str:
    """Label of option `index` (from 0), in prompts and in scoring.

    A..Z, AA..AZ, BA.. as columns of a spreadsheet.
    """
    text = ""
    index += 1
    while index:
        index, digit = divmod(index - 1, 26)
        text = chr(65 + digit) + text
    return text


def label_original(index: int) -> str:
    """Label in MileBench's scorer: A..Z, AA..AZ, then "B" and whatever follows in ASCII (Q14)."""
    if index < 26:
        return chr(65 + index)
    return "A" + chr(65 + index - 26) if index < 52 else "B" + chr(65 + index - 52)


def extract_original(text: str, choices: Sequence[str]) -> str:
    """What MileBench reads from a normalised prediction; `choices` are normalised too.

    May be no label at all.
    """
    if not text:
        return _EMPTY_ANSWER
    labels = [label_original(i) for i in range(len(choices))]
    labelled = [normalize_original(f"{name} {choice}") for name, choice in zip(labels, choices)]
    match = re.search("|".join(map(re.escape, labelled)), text)
    if match:
        return match.group()[0].upper()
    glued = [normalize_original(choice).replace(" ", "") for choice in choices]
    match = re.search("|".join(map(re.escape, glued)), text.replace(" ", ""))
    if match and not _NEVER_EQUAL & set(match.group()) and match.group().strip() in glued:
        return labels[glued.index(match.group().strip())].upper()
    if len(text) <= 2 and text.upper() in labels:
        return text.upper()
    return "".join(char.upper() for char in text if char.upper() in labels)


def extract(answer: str, choices: Sequence[str], labelled: bool = True) -> int | None:
    """Index of the option that a raw answer names, or None.

    `choices` are raw; `labelled`: the prompt printed labels.

    In turn: the answer is an option as it stands; it is one after normalisation; it is a label; an
    option's text stands in it as whole words (leftmost, the longest option first; options that
    normalise to nothing are left out); it names one label (see `_named_label`).
    """
    text, raw = normalize(answer), [choice.strip() for choice in choices]
    if answer.strip() and answer.strip() in raw:
        return raw.index(answer.strip())
    if not text:
        return None
    options = [normalize(choice) for choice in choices]
    glued = [option.replace(" ", "") for option in options]
    if text.replace(" ", "") in glued:
        return glued.index(text.replace(" ", ""))
    labels = {label(i): i for i in range(len(choices))} if labelled else {}
    if text.upper() in labels:
        return labels[text.upper()]
    longest_first = "|".join(map(re.escape, sorted(filter(None, options), key=len, reverse=True)))
    match = re.search(f"{WORD_START}(?:{longest_first}){WORD_END}", text)
    if match and match.group():
        return options.index(match.group())
    return _named_label(answer, labels)


def _named_label(answer: str, labels: dict[str, int]) -> int | None:
    """Index of the one label that stands alone in a raw answer.

    None without one, or with several different ones.

    A label right after "answer", "answer is", "option" or "choice" decides by itself. The words "a"
    and "I" are no labels, and labels of two letters ("IS", "AT") count in capitals only.
    """
    if not labels:
        return None
    one_of = "|".join(sorted(labels, key=len, reverse=True))
    a_label = rf"(?<!\w['’]){WORD_START}({one_of}){WORD_END}(?!['’]\w)"
    matches = []
    for match in re.finditer(a_label, answer, re.IGNORECASE):
        name = match.group(1)
        if not _is_word(answer, match) and (len(name) == 1 or name.isupper()):
            matches.append(match)
    cued = [match for match in matches if _CUE.search(answer[: match.start()])]
    named = {match.group(1).upper() for match in (cued[:1] or matches)}
    return labels[named.pop()] if len(named) == 1 else None


def _is_word(answer: str, match: re.Match[str]) -> bool:
    """Is a lone "a" or "I" the word?

    Only before a word (not "and", "or"); a capital A only where a sentence begins.
    """
    name, before = match.group(1), answer[: match.start()]
    if name.upper() not in ("A", "I") or not re.match(
        r"\s+(?!(?:and|or)\b)\w", answer[match.end() :]
    ):
        return False
    return name != "A" or (not _CUE.search(before) and _SENTENCE_START.search(before) is not None)
