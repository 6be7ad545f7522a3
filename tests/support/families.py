# ruff: noqa: E501 (the chat templates are those of the hub's checkpoints, line by line)
"""Tiny random models of the real classes, with real processors and the families' own chat
templates.

The templates are those of llava-hf/llava-1.5-7b-hf, llava-hf/llava-v1.6-mistral-7b-hf (its literal
`<\\s>` included), llava-hf/llava-onevision-qwen2-0.5b-ov-hf and OpenGVLab/InternVL3-1B-hf.
Tokenizers are byte-level BPE or SentencePiece-like BPE trained here on a few sentences, so that no
file is downloaded.
"""

import json

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLProcessor,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    MistralConfig,
    Qwen2Config,
    Qwen2Tokenizer,
    SiglipVisionConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

from fmtrain.data import render

FAMILIES = ("llava", "llava_next", "llava_onevision", "internvl")

TEMPLATES = {
    "llava": (
        "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
        "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>\\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
        "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "llava_next": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<<SYS>>\\n' + message['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' }}{# Render all images first #}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
        "{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'][0]['text'] + '<\\\\s> '}}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "llava_onevision": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{# Render all images first #}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
        "{# Render all video then #}{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
        "{{ '<video>' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + content['text'] }}"
        "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "internvl": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
        "{% elif content['type'] == 'video' %}{{ '<video>\\n' }}{% elif content['type'] == 'text' %}"
        "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n' }}{% endif %}"
    ),
}

CORPUS = [
    "USER: which digit changed? ASSISTANT: from 3 to 7",
    "[INST] what is in the picture [/INST] a red cube and two blue spheres",
    "system user assistant The quick brown fox jumps over the lazy dog, twice; 0123456789 \n\n",
]


def _llama_tokenizer(**special) -> LlamaTokenizer:
    """LlamaTokenizer as llava-1.5 has it: BPE over ▁-words with byte fallback."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        show_progress=False, vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *bytes_]
    )
    bpe.train_from_iterator(CORPUS, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learnt["merges"]]
    return LlamaTokenizer(vocab=learnt["vocab"], merges=merges, add_bos_token=True, **special)


def _qwen_tokenizer(**special) -> Qwen2Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        show_progress=False,
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"], merges=merges, eos_token="<|im_end|>", **special
    )
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    return tokenizer


class ImagesOnly:
    """transformers cannot build a video processor without torchvision, which has no CPU build here;
    images need none."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return (
            None
            if argument_name == "video_processor"
            else super().check_argument_for_proper_class(argument_name, argument)
        )


class ImagesOnlyLlavaOnevisionProcessor(ImagesOnly, LlavaOnevisionProcessor):
    pass


class ImagesOnlyInternVLProcessor(ImagesOnly, InternVLProcessor):
    pass


TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
CLIP = dict(
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)


def restore_templates() -> None:
    """What a trainer has set of the processors that all tests share is undone."""
    for family, built in BUILT.items():
        built.chat_template = TEMPLATES[family]


BUILT: dict = {}


def processor(family: str):
    """The same one whenever it is asked for."""
    if family not in BUILT:
        BUILT[family] = _processor(family)
    return BUILT[family]


def _processor(family: str):
    template = TEMPLATES[family]
    size = {"shortest_edge": 16}
    crop = {"height": 16, "width": 16}
    if family == "llava":
        tokenizer = _llama_tokenizer(
            extra_special_tokens={"image_token": "<image>"}, pad_token="<pad>", padding_side="left"
        )
        return LlavaProcessor(
            CLIPImageProcessorPil(size=size, crop_size=crop),
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if family == "llava_next":
        tokenizer = _llama_tokenizer(
            extra_special_tokens={"image_token": "<image>"}, pad_token="<pad>", padding_side="left"
        )
        return LlavaNextProcessor(
            LlavaNextImageProcessorPil(
                size=size, crop_size=crop, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]]
            ),
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if family == "llava_onevision":
        tokenizer = _qwen_tokenizer(
            extra_special_tokens={"image_token": "<image>", "video_token": "<video>"}
        )
        return ImagesOnlyLlavaOnevisionProcessor(
            LlavaOnevisionImageProcessorPil(
                size={"height": 16, "width": 16},
                image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
            ),
            tokenizer,
            None,
            num_image_tokens=4,
            vision_feature_select_strategy="full",
            chat_template=template,
        )
    tokens = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return ImagesOnlyInternVLProcessor(
        GotOcr2ImageProcessorPil(
            size={"height": 16, "width": 16}, min_patches=1, max_patches=2, crop_to_patches=True
        ),
        _qwen_tokenizer(extra_special_tokens=tokens),
        None,
        image_seq_length=4,
        chat_template=template,
    )


def config(family: str, layers: int = TEXT["num_hidden_layers"]):
    tokenizer = processor(family).tokenizer
    ids = dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    text = {**TEXT, "num_hidden_layers": layers, **ids}
    vision = {**CLIP, "num_hidden_layers": layers - 1}
    if family == "llava":
        return LlavaConfig(
            text_config=LlamaConfig(**text),
            vision_config=CLIPVisionConfig(**vision),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=4,
        )
    if family == "llava_next":
        return LlavaNextConfig(
            text_config=MistralConfig(**text, sliding_window=None),
            vision_config=CLIPVisionConfig(**vision),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
            image_seq_length=4,
        )
    if family == "llava_onevision":
        return LlavaOnevisionConfig(
            text_config=Qwen2Config(**text),
            vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        )
    return InternVLConfig(
        text_config=Qwen2Config(**text),
        vision_config=InternVLVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=(16, 16),
            patch_size=(4, 4),
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )


def model(family: str, seed: int = 0, **changes):
    """A fresh random model in evaluation mode, float32, weights large enough that attention is far
    from uniform. changes: `layers` of its language model; a tower has one less."""
    torch.manual_seed(seed)
    fresh = AutoModelForImageTextToText.from_config(config(family, **changes)).eval()
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(20.0 if "q_proj" in name or "k_proj" in name else 8.0)
            if name.endswith("image_newline"):
                parameter.normal_()
    return fresh


def markers(model):
    """What `fmtrain.load` would attach with: the markers of the family's chat template; None for
    other models."""
    family = model.config.model_type
    return render.markers(processor(family)) if family in FAMILIES else None


IMAGE = {"type": "image"}


def photo(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    """Noise of one's own: no two seeds share a pixel, so that every image is told from every
    other."""
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def user(*parts) -> dict:
    """A user's turn of texts and `IMAGE` parts, in this order."""
    return {
        "role": "user",
        "content": [
            part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts
        ],
    }


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def dialogues() -> dict[str, tuple[list[dict], list[Image.Image]]]:
    """Single- and multi-turn rows with 0, 1, 2 and 3 images; wide and tall ones make several tiles
    in the families that tile."""
    return {
        "text": ([user("which digit changed?"), assistant("7")], []),
        "single": ([user(IMAGE, "which digit?"), assistant("from 3 to 7")], [photo(1, 32, 16)]),
        "two_turns": (
            [
                user(IMAGE, "what is it?"),
                assistant("a red cube"),
                user(IMAGE, "and now?"),
                assistant("3"),
            ],
            [photo(2), photo(3, 16, 32)],
        ),
        "three": (
            [
                user(IMAGE, "first", IMAGE, IMAGE, "which?"),
                assistant("the 2"),
                user("sure?"),
                assistant("no"),
            ],
            [photo(4), photo(5, 32, 16), photo(6)],
        ),
    }
