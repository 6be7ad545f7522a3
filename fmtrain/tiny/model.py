"""A LLaVA that can learn to answer the questions of `fmtrain.tiny.digits`: classes and conventions
of LLaVA-1.5, tiny or larger."""

import string
from dataclasses import dataclass

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from fmtrain.tiny.digits import CELL, SIDE

# that of llava-hf/llava-1.5-7b-hf
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WORDS = (
    "▁USER ▁ASSISTANT ▁digit ▁digits ▁is ▁in ▁cell ▁often ▁do ▁you ▁see ▁change ▁changed ▁from "
    "▁to ▁same ▁what ▁order ▁the ▁appear ▁0 ▁1 ▁2 ▁3 ▁4 ▁5 ▁6 ▁7 ▁8 ▁9 Which How In What"
).split()


def tokenizer() -> LlamaTokenizer:
    """A LlamaTokenizer with one token for each of our words; any other text is letters and bytes.

    A merge adds one letter to the beginning of a word, so the merges of different words do not
    meet.
    """
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *string.printable[:94],
    ]
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        for end in range(2, len(word) + 1):
            merges[word[: end - 1], word[end - 1]] = None
    tokens += ["".join(merge) for merge in merges]
    return LlamaTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=list(merges),
        add_bos_token=True,
        extra_special_tokens={"image_token": "<image>"},
        pad_token="<pad>",
        padding_side="left",
    )


@dataclass(frozen=True)
class Size:
    """Of a random LLaVA: its language model, its tower, and the pixels along a patch's edge.

    spread: standard deviation of the language model's random weights. With Llama's own 0.02 the
    few layers of `tiny` learn much later; it falls with the square root of the width.
    """

    text: dict
    vision: dict
    patch: int
    positions: int
    spread: float


SIZES = {
    "tiny": Size(  # 1.3 million weights; a patch is a digit
        text=dict(
            hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4
        ),
        vision=dict(
            hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4
        ),
        patch=CELL,
        positions=512,
        spread=0.08,
    ),
    "100m": Size(  # 16 patches a digit, 144 a picture
        text=dict(
            hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12
        ),
        vision=dict(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6
        ),
        patch=CELL // 4,
        positions=2048,
        spread=0.03,
    ),
}


def llava_processor(config: LlavaConfig, words: LlamaTokenizer) -> LlavaProcessor:
    """The processor of a LLaVA with this configuration, in the conventions of LLaVA-1.5."""
    edge = config.vision_config.image_size
    crop = {"height": edge, "width": edge}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=crop),
        words,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=TEMPLATE,
    )


def random_model(
    seed: int = 0, layers: int | None = None, size: str = "tiny"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA that has learnt nothing, and its processor, in the classes and conventions of
    LLaVA-1.5. layers: of the language model, if not those of the size."""
    words, shape, edge = tokenizer(), SIZES[size], SIDE * CELL
    ids = dict(
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    text = LlamaConfig(
        **shape.text | ({} if layers is None else {"num_hidden_layers": layers}),
        **ids,
        vocab_size=len(words),
        max_position_embeddings=shape.positions,
        initializer_range=shape.spread,
    )
    vision = CLIPVisionConfig(**shape.vision, image_size=edge, patch_size=shape.patch)
    image = dict(
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(edge // shape.patch) ** 2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, **image)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # a digit read and a digit written start out alike
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
    model.generation_config = GenerationConfig(**ids, do_sample=False)
    return model, llava_processor(config, words)
