"""A tiny LLaVA that can answer the questions of `fmtrain.tiny.digits`: classes and conventions of
LLaVA-1.5."""

import string

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

from fmtrain.tiny.digits import CELL, CELLS, SIDE

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


TEXT_SIZES = dict(
    hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4
)
VISION_SIZES = dict(
    hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4
)
# Of the language model's random weights; with Llama's own 0.02 these few layers learn much later
SPREAD = 0.08


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
    seed: int = 0, layers: int = TEXT_SIZES["num_hidden_layers"]
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A tiny LLaVA that has learnt nothing, and its processor, in the classes and conventions of
    LLaVA-1.5. layers: of the language model."""
    words, size = tokenizer(), SIDE * CELL
    ids = dict(
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    text = LlamaConfig(
        **TEXT_SIZES | {"num_hidden_layers": layers},
        **ids,
        vocab_size=len(words),
        max_position_embeddings=512,
        initializer_range=SPREAD,
    )
    vision = CLIPVisionConfig(**VISION_SIZES, image_size=size, patch_size=CELL)
    image = dict(image_token_id=words.convert_tokens_to_ids("<image>"), image_seq_length=CELLS)
    config = LlavaConfig(vision_config=vision, text_config=text, **image)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # a digit read and a digit written start out alike
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
    model.generation_config = GenerationConfig(**ids, do_sample=False)
    return model, llava_processor(config, words)
