"""The chat template as training renders it, which every saved processor carries.

A dialogue that is rendered with it has the ids of training: an answer follows the template's own
generation prompt and has an end token behind it, and images stay where the text puts them. The
templates of the hub differ in one or the other (llava-1.5's has no end token and prints images
first, llava-onevision's puts another space into the header of a finished turn), so a few lines
before a template, and a filter around it, put that right.
"""

import re
from functools import lru_cache

from jinja2 import TemplateError

# What comes before a template: its messages, as training has them.
MESSAGES = """\
{%- set fmtrain = namespace(messages=[]) %}
{%- for message in messages %}
    {%- set content = message['content'] %}
    {%- if content is string %}
        {%- set content = [{'type': 'text', 'text': content}] %}
    {%- endif %}
    {%- set kinds = content | map(attribute='type') | list %}
    {%- if message['role'] == 'assistant' %}
        {%- set texts = content | selectattr('type', 'equalto', 'text') | map(attribute='text') %}
        {%- set content = [{'type': 'text', 'text': ANSWER}] %}
PARTS\
    {%- endif %}
    {%- set fmtrain.messages = fmtrain.messages + [dict(message, content=content)] %}
{%- endfor %}
{%- set messages = fmtrain.messages %}
"""
ANSWER = "texts | join | trim"
# A text before an image: placeholders become part of the text, a line each, as LLaVA's own
# interleaved data has them.
PARTS = """\
    {%- elif kinds != kinds | sort and 'video' not in kinds %}
        {%- set lines = namespace(all=[]) %}
        {%- for part in content %}
            {%- set line = part['text'] if part['type'] == 'text' else PLACEHOLDER %}
            {%- set lines.all = lines.all + [line] %}
        {%- endfor %}
        {%- set content = [{'type': 'text', 'text': lines.all | join('\\n')}] %}
"""
QUESTION, REPLY = "[[question]]", "[[answer]]"


def lawful(processor) -> str:
    """The chat template of `processor` as training renders it: itself, where it does so already.

    Raises `ValueError` for no template, one that does not render an answer as it is, and one
    without an end token where the tokenizer has none either.
    """
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        raise ValueError("the processor has no chat template")
    return _lawful(processor, template)


@lru_cache
def _lawful(processor, template: str) -> str:
    question = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    reply = {"role": "assistant", "content": [{"type": "text", "text": REPLY}]}
    before = rendered(processor, template, question)
    prompt = rendered(processor, template, question, add_generation_prompt=True)
    after = rendered(processor, template, [*question, reply])
    if not (prompt.startswith(before) and after.startswith(before)):
        raise ValueError("the chat template changes earlier turns when a later one is added")
    header, turn = prompt[len(before) :], after[len(before) :]
    opening, tail = _around(turn, header)
    answer = ANSWER
    if not end_token(processor).match(tail):
        if processor.tokenizer.eos_token is None:
            raise ValueError("neither the chat template nor the tokenizer has an end token")
        answer += " ~ eos_token"
    parts = "" if _keeps_order(processor, template) else PARTS
    parts = parts.replace("PLACEHOLDER", repr(processor.image_token))
    ours = MESSAGES.replace("PARTS", parts).replace("ANSWER", answer)
    if opening == header:
        ours += template
    else:
        replaced = f"{{%- filter replace({opening!r}, {header!r}) %}}\n"
        ours += replaced + template.removesuffix("\n") + "{% endfilter %}"
    return template if _same(processor, template, ours) else ours


def rendered(
    processor, template: str, messages: list[dict], add_generation_prompt: bool = False
) -> str:
    """The dialogue as `template` writes it. Raises `ValueError` for one that it refuses."""
    if not messages:
        return ""
    try:
        return processor.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses the roles {roles}: {error}") from error


def special_tokens(processor) -> list[str]:
    """The texts that the tokenizer reads as special tokens."""
    known = processor.tokenizer.added_tokens_decoder.values()
    return [token.content for token in known if token.special and token.content.strip()]


def end_token(processor) -> re.Pattern:
    """What ends an answer: a special token, perhaps with blanks before it."""
    words = "|".join(map(re.escape, special_tokens(processor)))
    return re.compile(rf"\s*(?:{words})" if words else "(?!)")


def _around(turn: str, header: str) -> tuple[str, str]:
    """What opens a finished turn in place of the generation prompt `header`, and what the template
    puts behind its answer."""
    exact = turn.startswith(header)
    start = header if exact else header.rstrip()
    if not turn.startswith(start):
        raise ValueError(
            f"the chat template's generation prompt {header!r} does not open its turn {turn[:80]!r}"
        )
    lead, same, tail = turn[len(start) :].partition(REPLY)
    if not same or lead.strip():
        raise ValueError(f"the chat template does not render the answer as it is: {turn[:80]!r}")
    return header if exact else start + lead, tail


def _keeps_order(processor, template: str) -> bool:
    """Whether the template leaves text and image parts of a user where they stand."""
    text = {"type": "text", "text": QUESTION}
    parts = [text, {"type": "image"}, text]
    out = rendered(processor, template, [{"role": "user", "content": parts}])
    marks = [re.escape(mark) for mark in (QUESTION, processor.image_token, QUESTION)]
    return re.search(".*".join(marks), out, re.DOTALL) is not None


def _same(processor, template: str, ours: str) -> bool:
    """Whether two templates render blanks around an answer, a content that is a text, and an image
    behind a text alike."""
    image, text = {"type": "image"}, {"type": "text", "text": QUESTION}
    dialogue = [
        {"role": "user", "content": [text, image, text]},
        {"role": "assistant", "content": [{"type": "text", "text": f" {REPLY}\n"}]},
        {"role": "user", "content": QUESTION},
    ]
    try:
        theirs = rendered(processor, template, dialogue)
    except ValueError:
        return False
    return theirs == rendered(processor, ours, dialogue)
