"""Rouge-L as MileBench takes it from the PyPI package `rouge` 1.0.1.

At summary level, on sets of words.
"""

from collections.abc import Sequence

# `rouge` walks the table back by recursion. Under Python's limit of 1000 frames, less those of the
# callers, a walk of more steps than this ends MileBench's evaluate.py with RecursionError (Q9).
ORIGINAL_MAX_STEPS = 990


def rouge_l(prediction: str, reference: str, max_steps: int | None = None) -> float:
    """F of Rouge-L for two normalised texts: f = 2PR / (P + R + 1e-8), P = |U| / n, R = |U| / m.

    n and m are the numbers of distinct words of prediction and reference, U the union over all
    pairs of sentences (cut at periods) of the words on a longest common subsequence. Raises
    ValueError when a text has no sentence, and when a walk takes more than `max_steps` steps.
    """
    predicted, expected = _sentences(prediction), _sentences(reference)
    if not predicted or not expected:
        raise ValueError(
            f"Rouge-L: the {'reference' if predicted else 'prediction'} holds periods only"
        )
    union = set()
    for reference_words in expected:
        for words in predicted:
            union |= _common(reference_words, words, max_steps)
    n, m = len(set().union(*predicted)), len(set().union(*expected))
    precision, recall = len(union) / n, len(union) / m
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; a sentence of blanks is one empty word."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common(reference: Sequence[str], prediction: Sequence[str], max_steps: int | None) -> set[str]:
    """Words on one longest common subsequence: of several, the one found by going left on ties."""
    columns = len(prediction)
    table = [[0] * (columns + 1)]
    for word in reference:
        above, row = table[-1], [0]
        for j, other in enumerate(prediction, 1):
            row.append(above[j - 1] + 1 if word == other else max(above[j], row[-1]))
        table.append(row)
    common, i, j, steps = set(), len(reference), columns, 0
    while i and j:
        steps += 1
        if max_steps is not None and steps > max_steps:
            raise ValueError(
                f"Rouge-L: {len(reference)} reference words against {columns} take more than "
                f"{max_steps} steps, where MileBench fails with RecursionError"
            )
        if reference[i - 1] == prediction[j - 1]:
            common.add(reference[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return common
