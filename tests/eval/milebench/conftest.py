"""Golden material (outputs of MileBench's own scripts) and small data folders."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers


class GoldenTokenizer:
    """A `tokenizers` file with the two calls of a transformers tokenizer that prompts need."""

    def __init__(self, path: Path):
        self.inner = tokenizers.Tokenizer.from_file(str(path))

    def __call__(self, text: str, *, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(
            input_ids=self.inner.encode(text, add_special_tokens=add_special_tokens).ids
        )

    def decode(self, token_ids: list[int]) -> str:
        return self.inner.decode(list(token_ids), skip_special_tokens=False)


class WordTokenizer:
    """One token a word with the blanks after it: lengths can be counted by eye."""

    def __init__(self):
        self.words: list[str] = []

    def __call__(self, text: str, *, add_special_tokens: bool) -> SimpleNamespace:
        pieces = [piece + " " for piece in text.split(" ")] if text else []
        if pieces:
            pieces[-1] = pieces[-1][:-1]
        pieces = [piece for piece in pieces if piece]
        for piece in pieces:
            if piece not in self.words:
                self.words.append(piece)
        return SimpleNamespace(input_ids=[self.words.index(piece) for piece in pieces])

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.words[i] for i in token_ids)


@pytest.fixture(scope="session")
def golden() -> Path:
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_tokenizers(golden: Path) -> dict[str, GoldenTokenizer]:
    return {
        path.stem: GoldenTokenizer(path)
        for path in sorted((golden / "prompt" / "tokenizers").glob("*.json"))
    }


@pytest.fixture
def words() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., Path]:
    """make_data(name, [(response, choices or None, number of images)], question_type): a folder.

    Ids count from 0.
    """

    def make(name: str, samples: list[tuple], question_type: str) -> Path:
        entries = []
        for i, (response, choices, n_images) in enumerate(samples):
            instance = {
                "context": "{image#1} what?",
                "images_path": [f"{k}.jpg" for k in range(n_images)],
            }
            if choices is not None:
                instance["choice_list"] = choices
            entries.append(
                {
                    "sample_id": i,
                    "task_instruction_id": 0,
                    "task_instance": instance,
                    "response": response,
                }
                | {"image_quantity_level": "Few"}
            )
        document = {
            "meta_data": {"task_instruction": ["Look."], "question_type": question_type},
            "data": entries,
        }
        path = tmp_path / "data" / name / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
        return tmp_path / "data"

    return make


@pytest.fixture
def make_predictions(tmp_path: Path) -> Callable[..., Path]:
    """make_predictions(name, [(sample id, right answer, answer)]) -> a model's folder."""

    def make(name: str, answers: list[tuple]) -> Path:
        records = [
            {"sample_id": i, "image": [], "question": "?", "gt_response": gold, "gen_model_id": "m"}
            | {"pred_response": answer, "gen_kwargs": {}}
            for i, gold, answer in answers
        ]
        path = tmp_path / "model" / name / "pred.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records))
        return tmp_path / "model"

    return make
