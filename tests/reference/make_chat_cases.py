#!/usr/bin/env python3
"""Writes tests/golden/chat_cases.json: chat templates with their chat.json, and conversations with the ids that
data/prepare.py --chat gives them, which tests/unit/test_chat.c expects of the program.

    .venv/bin/python tests/reference/make_chat_cases.py
"""

import itertools
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
# System text folded into the first user's turn, spaces around contents and answers: what Llama 2's does.
FOLDED = """\
{%- if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set before = '<S>\n' + messages[0]['content'] + '\n</S>\n\n' %}
{%- else %}{% set rest = messages %}{% set before = '' %}{% endif %}
{%- for message in rest %}
    {%- set content = before + message['content'] if loop.first else message['content'] %}
    {%- if message['role'] == 'user' %}{{ bos_token + '[Q] ' + content.strip() + ' [A]' }}
    {%- else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
# The system message with the last question, as newer ones of Mistral: it moves from turn to turn.
SYSTEM_LAST = """\
{%- set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}{{ bos_token }}
{%- for message in rest %}{% if message['role'] == 'user' %}{{ '[Q] ' }}
    {%- if loop.last and rest != messages %}{{ messages[0]['content'] + '\n\n' }}{% endif %}{{ message['content'] + '[A]' }}
    {%- else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""
# Text alone between the turns, and no special token before the first: what Vicuna's does.
PLAIN = """\
{%- if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% else %}A talk. {% endif %}
{%- for message in messages %}{% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}
    {%- elif message.role == 'assistant' %}{{ 'ASSISTANT: ' + message.content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
# An end of the whole behind the last turn's, and markers that take spaces: what Phi-3's does.
END_OF_ALL = """\
{{- bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
# An empty thought before the last answer, which goes once others follow: what Qwen3's does.
THOUGHT = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
    {{- message.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
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


def piece_tokenizer(space="prepend", added=("<s>", "</s>"), lstrip=(), rstrip=(), plain=("<0x41>",)):
    """A small tokenizer.json in the manner of SentencePiece: its space is \u2581, and one is put in front of a text by
    "prepend" (Llama 2's, Mistral's), "first" or "always" (both Metaspace). Bytes are there for what else there is."""
    pieces = ["\u2581", *"abcdefghijklmnopqrstuvwxyzABDEHIQSTU[]:.?<>|/_\n", "\u2581a", "\u2581an", "as", "us", "\u2581\u2581",
              "[A", "\n\n", "im", "\u2581s", "\u2581[", "\u2581[A"]
    vocab = {name: i for i, name in enumerate(["<unk>", *added, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces])}
    merges = [["\u2581", "a"], ["\u2581a", "n"], ["a", "s"], ["u", "s"], ["\u2581", "\u2581"], ["[", "A"], ["\n", "\n"], ["i", "m"],
              ["\u2581", "s"], ["\u2581", "["], ["\u2581[", "A"]]
    special = [{"id": vocab[name], "content": name, "single_word": False, "lstrip": name in lstrip, "rstrip": name in rstrip,
                "normalized": False, "special": name not in plain} for name in ("<unk>", *added, *plain)]
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"},
                                                   {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": space, "split": False}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
            "normalizer": prepend if space == "prepend" else None, "pre_tokenizer": None if space == "prepend" else metaspace,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                      "vocab": vocab, "merges": merges}}


def turns(*contents, system=None):
    """user, assistant, user, ... with these contents."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def conversations(pieces):
    """Of one to three rounds. Answers have no spaces around them, which no template changes when it strips; a template that
    strips a system message and a question as one gets no blank questions, which would have it strip the system message."""
    with_system, as_one = pieces["before_system"] is not None, pieces["strip_after_system"] == "right"
    rng = random.Random(1)
    for i in range(24):
        contents = [rng.choice(CONTENTS) for _ in range(2 * (1 + i % 3))]
        contents = [text if k % 2 == 0 else text.strip() for k, text in enumerate(contents)]
        contents = ["a" if as_one and not text.strip() and k % 2 == 0 else text for k, text in enumerate(contents)]
        yield turns(*contents, system=rng.choice(CONTENTS) if with_system and i % 2 else None)


NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TURNS = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]


def case(name, template, tokenizer, names={}):
    """The encoder's chat.json, and the ids of each turn and answer."""
    opened = prepare_tokenizers.Bytes() if tokenizer is None else \
        prepare_tokenizers.HuggingFace("tokenizer.json", json.dumps(tokenizer))
    encoder = prepare_chat.ChatEncoder(opened, chat_template.Template(name, template, names), -1, "uint16", 1 << 30)
    pieces, _ = prepare_chat.chat_pieces(encoder.template, encoder.marks, encoder.dropped, encoder.encode_parts)
    chat = prepare_chat.chat_json(name, None, encoder.dropped, pieces)
    rows = []
    for messages in conversations(pieces):
        parts = chat_template.rendered_parts(encoder.template, encoder.marks, messages)
        ids, counts = encoder.encode_parts(parts[:-1])
        groups = [[id for id, _ in group] for _, group in itertools.groupby(zip(ids, counts), key=lambda pair: pair[1])]
        rows.append({"messages": messages, "ids": groups})
    end = [ids for item in pieces["answer_end"]
           for ids in ([item] if isinstance(item, int) else map(int, opened.encode_at([(item, "continues")])[0]))]
    return {"name": name, "tokenizer": tokenizer, "chat": json.loads(chat), "answer_end": end, "conversations": rows}


def cases():
    built_in = chat_template.BUILT_IN
    return [case("bytes", built_in["bytes"], None),
            case("chatml", built_in["chatml"], bpe_tokenizer()),
            case("llama3", built_in["llama3"], bpe_tokenizer(added=("<|endoftext|>", *chat_template.NEEDED["llama3"]))),
            case("default system", QWEN_LIKE, bpe_tokenizer()), case("generation", GENERATION, bpe_tokenizer()),
            case("no system", NO_SYSTEM, bpe_tokenizer()),
            case("folded, prepend", FOLDED, piece_tokenizer(), NAMES),
            case("folded, first", FOLDED, piece_tokenizer("first"), NAMES),
            case("folded, always", FOLDED, piece_tokenizer("always"), NAMES),
            case("plain, prepend", PLAIN, piece_tokenizer(), NAMES),
            case("plain, first", PLAIN, piece_tokenizer("first"), NAMES),
            case("system last", SYSTEM_LAST, piece_tokenizer("first"), NAMES),
            case("end of all, rstrip", END_OF_ALL, piece_tokenizer("prepend", TURNS, rstrip=TURNS[2:]), NAMES),
            case("end of all, lstrip and rstrip", END_OF_ALL, piece_tokenizer("always", TURNS, TURNS[2:], TURNS[1:4]), NAMES)]


if __name__ == "__main__":
    CASES.write_text(json.dumps(cases(), indent=0) + "\n", encoding="utf-8")
