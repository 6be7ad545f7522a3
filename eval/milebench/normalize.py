"""Text normalisation before every comparison: MileBench's own, and the repaired one.

Quirks Q4-Q6 in README.md.
"""

import re

# MileBench deletes these or turns them into blanks; all other marks (: ' * # % & $ ^ | ~,
# non-ASCII) survive.
MARKS = ';/[]"{}()=+\\_-><@`,?!'

# Borders of a word in a search: no letter, digit or underscore may touch it, and no period of a
# number. Chinese, Japanese and Korean script, written without blanks, may.
_LETTER = r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
WORD_START, WORD_END = rf"(?<!{_LETTER})(?<!\.)", rf"(?!{_LETTER}|\.\d)"

# re.UNICODE passed where `count` belongs: only so many periods are deleted (Q4).
_ORIGINAL_PERIODS = 32
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_MARK = re.compile("[" + re.escape(MARKS) + "]")
_PERIOD = re.compile(r"\.(?!\d)")


def normalize_original(text: str) -> str:
    """MileBench's normalisation, oddities included.

    How a mark is treated depends on the whole string (Q4, Q5, Q6).
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    start = text
    thousands = _DIGIT_COMMA_DIGIT.search(start) is not None
    for mark in MARKS:
        glue = thousands or f"{mark} " in start or f" {mark}" in start
        text = text.replace(mark, "" if glue else " ")
    text = _PERIOD.sub("", text, count=_ORIGINAL_PERIODS)
    return text.strip("'").strip('"').strip().lower()


def normalize(text: str) -> str:
    """Repaired normalisation: one rule for every string, and a second pass changes nothing.

    A comma that groups thousands is deleted ("1,000" -> "1000"), any other mark of `MARKS` is a
    blank, a period counts only before a digit ("3.5", ".5"), white space collapses, outer quotes
    go, letters are lower case.
    """
    text = _MARK.sub(" ", _THOUSANDS.sub("", text))
    text = _PERIOD.sub("", text).lower()
    return " ".join(text.split()).strip("' ")
