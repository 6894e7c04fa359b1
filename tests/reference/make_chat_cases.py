#!/usr/bin/env python3
"""Writes tests/golden/chat_cases.json: chat templates with their chat.json, and conversations with the ids that
data/prepare.py --chat gives them, which tests/unit/test_chat.c expects of the program.

    .venv/bin/python tests/reference/make_chat_cases.py
"""

import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "data"))

import chat_template  # noqa: E402
import prepare_chat  # noqa: E402
import prepare_tokenizers  # noqa: E402

CASES = ROOT / "tests/golden/chat_cases.json"

CHATML = ["<|im_start|>", "<|im_end|>"]
# A default system message, stripped contents, an end of the whole that is not the end of a turn: what published ones do.
QWEN_LIKE = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
NO_SYSTEM = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<|im_start|>' + role + '
' + message['content'] | trim + '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model
' }}{% endif %}"""
GENERATION = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' -%}
{% generation %}{{ message.content }}{% endgeneration %}{{ '<|im_end|>\\n' }}{% else %}{{ message.content + '<|im_end|>\\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
CONTENTS = ["define cat", "An animal.", "", "  around ", "\n\nlines\n\n\nbetween\n", "na\u00efve \U0001f642 \u4f60\u597d", "say <|im_end|> \x03\x01",
            "<|im_start|>assistant\n<|endoftext|>", "{{ x }} {% if %}", "\u2028\u3000\x1c\x85asus\xa0\u1680", "\xad\u200bx\u200b", "\r\n\t\x0b\x0c"]


def bpe_tokenizer(added=("<|endoftext|>", *CHATML), merges=(("a", "s"), ("e", "r"), ("u", "s"), ("i", "n"), ("Ċ", "Ċ"))):
    """A small byte-level tokenizer.json with merges, one of them of two line ends."""
    characters = "".join(sorted(prepare_tokenizers.byte_alphabet().values()))
    vocab = {character: i for i, character in enumerate(characters)}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    special = [{"id": len(vocab) + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True} for i, name in enumerate(added)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
            "pre_tokenizer": level, "post_processor": None, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": vocab, "merges": [list(pair) for pair in merges]}}


def turns(*contents, system=None):
    """user, assistant, user, ... with these contents."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def conversations(with_system):
    """Of one to three rounds. Answers have no spaces around them, which no template changes when it strips."""
    rng = random.Random(1)
    for i in range(24):
        contents = [rng.choice(CONTENTS) for _ in range(2 * (1 + i % 3))]
        contents = [text if k % 2 == 0 else text.strip() for k, text in enumerate(contents)]
        yield turns(*contents, system=rng.choice(CONTENTS) if with_system and i % 2 else None)


def case(name, template, tokenizer):
    """The encoder's chat.json and ids."""
    opened = prepare_tokenizers.Bytes() if tokenizer is None else \
        prepare_tokenizers.HuggingFace("tokenizer.json", json.dumps(tokenizer))
    encoder = prepare_chat.ChatEncoder(opened, chat_template.Template(name, template, {}), -1, "uint16", 1 << 30)
    pieces = prepare_chat.chat_pieces(encoder.template, encoder.marks, encoder.dropped, encoder.encode_parts)
    chat = prepare_chat.chat_json(name, None, encoder.dropped, pieces)
    rows = []
    for messages in conversations(pieces["before_system"] is not None):
        parts = chat_template.rendered_parts(encoder.template, encoder.marks, messages)
        rows.append({"messages": messages, "ids": encoder.encode_parts(parts[:-1])[0]})
    return {"name": name, "tokenizer": tokenizer, "chat": json.loads(chat), "conversations": rows}


def cases():
    return [case("bytes", chat_template.BUILT_IN["bytes"], None),
            case("chatml", chat_template.BUILT_IN["chatml"], bpe_tokenizer()),
            case("llama3", chat_template.BUILT_IN["llama3"],
                 bpe_tokenizer(added=("<|endoftext|>", *chat_template.NEEDED["llama3"]))),
            case("default system", QWEN_LIKE, bpe_tokenizer()), case("generation", GENERATION, bpe_tokenizer()),
            case("no system", NO_SYSTEM, bpe_tokenizer())]


if __name__ == "__main__":
    CASES.write_text(json.dumps(cases(), indent=0) + "\n", encoding="utf-8")
