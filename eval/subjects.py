"""What latency and throughput are measured on: a checkpoint or a random LLaVA, and rows for it.

The random ones are transformers' own `LlavaForConditionalGeneration` (a CLIP tower, a Llama) of a
chosen size, built in memory; speed does not depend on what the weights are.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from fmtrain.checkpoint import check_folder, load_plain
from fmtrain.data import noise
from fmtrain.host import unwrap
from fmtrain.tiny import model as tiny_model

PATCH = 14  # pixels along a patch's edge, as in CLIP-L/14
PICTURE = (336, 336)  # pixels of the noise images, before the processor resizes them
WORD = "digit"  # one token for the embedded tokenizer, a few for others


@dataclass(frozen=True)
class Size:
    """Of a random LLaVA: the language model, the tower, and the edge of an image in patches.

    An image has as many tokens as the square of its edge.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    patches: int
    tower_hidden: int
    tower_layers: int
    vocabulary: int = 32064


SIZES = {  # named by the parameters in the language model's layers
    "mini": Size(64, 128, 2, 4, 2, 2, 32, 2, 512),
    "25m": Size(512, 1408, 8, 8, 8, 12, 256, 2),
    "100m": Size(768, 2048, 12, 12, 12, 12, 256, 2),
    "1b": Size(2048, 5632, 22, 32, 4, 24, 1024, 24),
    "7b": Size(4096, 11008, 32, 32, 32, 24, 1024, 24),
}


@dataclass(frozen=True)
class Subject:
    """A model without a policy, its processor, and what it is called in a report."""

    name: str
    model: torch.nn.Module
    processor: object

    def describe(self) -> dict:
        text = unwrap(self.model).config.get_text_config()
        return {
            "model": self.name,
            "class": type(unwrap(self.model)).__name__,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "layers": text.num_hidden_layers,
            "heads": text.num_attention_heads,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }


def random_llava(
    size: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Subject:
    """A random LLaVA of `SIZES` with the embedded tokenizer.

    Raises `ValueError` for an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; known are {', '.join(SIZES)}")
    shape, words = SIZES[size], tiny_model.tokenizer()
    edge = shape.patches * PATCH
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=max(shape.vocabulary, len(words)),
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_heads,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=shape.tower_hidden,
            intermediate_size=4 * shape.tower_hidden,
            num_hidden_layers=shape.tower_layers,
            num_attention_heads=max(1, shape.tower_hidden // 64),
            image_size=edge,
            patch_size=PATCH,
        ),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_seq_length=shape.patches**2,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    processor = tiny_model.llava_processor(config, words)
    return Subject(f"random LLaVA {size}", model.eval(), processor)


def subject(name: str, size: str, device: str | torch.device, dtype: torch.dtype) -> Subject:
    """The model called `name`: "random" (of that size) or a checkpoint folder."""
    if name == "random":
        return random_llava(size, device, dtype)
    check_folder(name)
    model, processor = load_plain(name, dtype)
    return Subject(Path(name).name, model.to(device), processor)


def row(images: int, words: int, answer: int = 0, seed: int = 0) -> dict:
    """A row of one turn: images of noise, a question of so many words and perhaps an answer."""
    pictures = [noise.picture(100 * seed + k, PICTURE) for k in range(images)]
    messages = noise.turn(images, " ".join([WORD] * words), " ".join([WORD] * answer))
    return {"id": f"noise-{seed}", "messages": messages, "images": pictures}


def check_length(subject: Subject, tokens: int) -> None:
    """Raises `ValueError` for rows that the model has no positions for."""
    longest = unwrap(subject.model).config.get_text_config().max_position_embeddings
    if tokens > longest:
        raise ValueError(
            f"{subject.name} has {longest} positions, {tokens} tokens were asked for; "
            "take fewer images or words"
        )
