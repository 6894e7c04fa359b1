#!/usr/bin/env python3
"""Conversations: templates of the shapes that published ones have, with tokenizers in the manner of SentencePiece.

    make && python -m unittest tests.cli.test_chat_templates
"""

import json
import random
import unittest
import unittest.mock

from tests.lib.chat_case import HAS_PACKAGES, Case, reference_template

if HAS_PACKAGES:
    import tokenizers

    import chat_pieces
    from tests.reference.make_chat_cases import (CONTENTS, END_OF_ALL, FOLDED, NAMES, PLAIN, SYSTEM_LAST, THOUGHT, TURNS,
                                                 bpe_tokenizer, piece_tokenizer, turns)

# What follows an answer differs in the end: <|return|>, as gpt-oss writes it.
RETURN = """\
{%- for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}
    {{- '<|message|>' + m.content }}{% if loop.last and not add_generation_prompt and m.role == 'assistant' %}{{ '<|return|>' }}
    {%- else %}{{ '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
# The next answer's beginning is always there, as in the first one of Llama 3.
ALWAYS = """\
{%- for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content | trim + '<|end|>' }}{% endfor %}<|start|>assistant<|message|>"""
# Nothing ends an answer, and the next answer's beginning is always there.
ENDLESS = """{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}<|assistant|>"""
# The model begins with a thought, which no answer has: as DeepSeek R1's.
OPEN_THOUGHT = """\
{%- for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|message|><think>' }}{% endif %}"""
TOOLS = """\
{%- set ns = namespace(day='?') %}
{%- if strftime_now is defined %}{% set ns.day = strftime_now('%d %b %Y') %}{% endif %}
{{- '<|start|>system<|message|>Today: ' + ns.day }}{% if tools is not none %}{{ ' Tools: ' + tools | tojson }}{% endif %}{{ '<|end|>' }}
{%- for m in messages %}{% if m.role not in ['user', 'assistant', 'tool'] %}{{ raise_exception('no such role: ' + m.role) }}{% endif %}
    {{- '<|start|>' + m.role + '<|message|>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}
    {%- for call in m.tool_calls %}{{ '<|call|>' + call | tojson }}{% endfor %}{{ '<|end|>\\n' }}{% endgeneration %}
    {%- else %}{{ m.content + '<|end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"""
MARKERS = ["<s>", "</s>", "<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|channel|>", "<|call|>", "<|user|>", "<|assistant|>"]


class Templates(Case):
    def tokenizer_of(self, template, tokenizer, names):
        self.write("tokenizer/tokenizer_config.json", names | {"chat_template": template})
        return self.write("tokenizer/tokenizer.json", tokenizer)

    def encoded(self, template, tokenizer, talks, names):
        """[(ids, texts that count)] of each conversation, and what was printed."""
        path = self.tokenizer_of(template, tokenizer, names)
        rows = self.rows([talk if isinstance(talk, dict) else {"messages": talk} for talk in talks])
        printed, _ = self.prepare("--tokenizer", path, "--val-fraction", 0, "--overwrite", rows)
        library = tokenizers.Tokenizer.from_file(str(path))
        separator = json.loads((self.out / "dataset.json").read_text())["separator"]
        return [(tokens, [library.decode(run, skip_special_tokens=False) for run in self.counted(tokens, labels)])
                for tokens, labels in self.conversations(separator)], printed

    def chat_json(self):
        return json.loads((self.out / "chat.json").read_text(encoding="utf-8"))

    def test_ids_of_the_library(self):
        """Also where it puts a space in front, and where special tokens take spaces: with every kind of tokenizer the ids
        are those of the whole rendering, in which no special token is spelled out by a message."""
        contents = [text for text in CONTENTS if "<" not in text]
        rng = random.Random(1)
        for template, specials in ((FOLDED, []), (PLAIN, []), (SYSTEM_LAST, []), (END_OF_ALL, TURNS[2:])):
            for space in ("prepend", "first", "always"):
                for lstrip, rstrip in (([], []), (specials, []), ([], specials), (specials, specials))[:4 if specials else 1]:
                    tokenizer = piece_tokenizer(space, TURNS, lstrip=lstrip, rstrip=rstrip)
                    talks = [turns(*(rng.choice(contents) for _ in range(2 * (1 + i % 3))), system="Be brief." if i % 4 == 3
                                   and template is not SYSTEM_LAST else None) for i in range(20)]
                    for message in (m for talk in talks for m in talk if m["role"] == "assistant"):
                        text = message["content"]  # not one whose first token would reach over the cut, see below
                        message["content"] = (text if rstrip else text.strip()) if text.strip() else "b"
                    with self.subTest(template=template[:40], space=space, lstrip=lstrip, rstrip=rstrip):
                        found, _ = self.encoded(template, tokenizer, talks, NAMES)
                        render = reference_template(template, **NAMES)
                        library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer))
                        self.assertEqual(len(found), len(talks))
                        for talk, (ids, _) in zip(talks, found):
                            self.assertEqual(ids, library.encode(render(talk), add_special_tokens=False).ids, talk)

    def test_tokens_over_the_cut(self):
        """Where a token would reach from the prompt into the answer, the prompt's tokens are those that generation feeds."""
        tokenizer = piece_tokenizer("prepend", TURNS)
        for answer in ("\nasus", "asus"):  # two line ends are a token
            (ids, counted), = self.encoded(END_OF_ALL, tokenizer, [turns("a", answer)], NAMES)[0]
            library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer))
            prompt = library.encode("<s><|user|>\na<|end|>\n<|assistant|>\n", add_special_tokens=False).ids
            self.assertEqual(ids[:len(prompt)], prompt)
            self.assertEqual(counted, [answer + "<|end|>"])

    def test_where_answers_end(self):
        tokenizer = bpe_tokenizer(added=[*MARKERS, "<|pad|>"])
        talk = turns("a", "b", "c", "d e")
        for template, expected in (
                (RETURN, ["<|channel|>final<|message|>b<|end|>", "<|channel|>final<|message|>d e<|return|>"]),
                (ALWAYS, ["b<|end|>", "d e<|end|>"]), (END_OF_ALL, ["b<|end|>", "d e<|end|>"]),
                (FOLDED, [" b </s>", " d e </s>"])):
            with self.subTest(template[:60]):
                self.assertEqual(self.encoded(template, tokenizer, [talk], NAMES)[0][0][1], expected)
        thoughts = self.encoded(THOUGHT, bpe_tokenizer(), [talk], {"eos_token": "<|endoftext|>"})[0][0][1]
        self.assertEqual(thoughts, ["b<|im_end|>", "<think>\n\n</think>\n\nd e<|im_end|>"])
        for template, why in ((ENDLESS, "no special token follows message 4"), (OPEN_THOUGHT, "renders what precedes message 2 in")):
            path = self.tokenizer_of(template, tokenizer, NAMES)
            _, err = self.prepare("--tokenizer", path, "--val-fraction", 0, "--overwrite", self.rows([{"messages": talk}]), code=2)
            self.assertIn(why, err)
            self.assertEqual(err.count("\n"), 1)

    def test_tools_dates_and_generation_tags(self):
        call = {"name": "f", "arguments": {"x": 1}}
        talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]},
                             {"role": "tool", "content": "1"}, {"role": "assistant", "content": "b"}], "tools": [{"name": "f"}]}
        with unittest.mock.patch.dict("os.environ", SOURCE_DATE_EPOCH="0"):
            found, printed = self.encoded(TOOLS, bpe_tokenizer(added=[*MARKERS, "<|pad|>"]),
                                          [talk, turns("a", "b"), turns("a", "b", system="s")], NAMES)
        self.assertEqual([counted for _, counted in found], [['<|call|>{"name": "f", "arguments": {"x": 1}}<|end|>', "b<|end|>"],
                                                             ["b<|end|>"]])
        self.assertIn("1: the template fails (first: ", printed)
        self.assertIn("no such role: system", printed)
        self.assertIn("Today: 01 Jan 1970", json.dumps(self.chat_json()["before_user"]))
        self.assertIn("`generate --chat` cannot use its system message: it fails to render", printed)

    def test_chat_json(self):
        """What the program needs is there, or the reason why not."""
        cases = ((FOLDED, {"before_system": [1, "[Q] <S>\n"], "after_system": ["\n</S>\n\n"], "strip_first": True,
                           "strip_after_system": "right", "strip_user": True, "strip_system": False, "answer_end": [" ", 2]}),
                 (SYSTEM_LAST, {"before_system": None, "before_user": [1, "[Q] "], "after_answer": ["[Q] "]}),
                 (PLAIN, {"before_user": ["A talk. USER: "], "before_system": [], "after_system": [" USER: "]}),
                 (END_OF_ALL, {"answer_end": [6], "after_answer": ["\n", 3, "\n"]}))
        for template, members in cases:
            with self.subTest(template[:60]):
                self.encoded(template, piece_tokenizer("first", TURNS), [turns("a", "b")], NAMES)
                self.assertEqual(members, {name: self.chat_json()[name] for name in members})
        _, printed = self.encoded(THOUGHT, bpe_tokenizer(), [turns("a", "b")], {"eos_token": "<|endoftext|>"})
        self.assertEqual(self.chat_json()["refused"], "it renders an answer differently once others follow")
        self.assertIn("`generate --chat` cannot use it: it renders an answer differently", printed)

    def test_stripping_that_is_not_of_both_sides(self):
        for strip, expected in (("strip()", True), ("lstrip()", "left"), ("rstrip()", "right"), ("title()", None)):
            template = "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content." + strip + " + '<|end|>' }}" \
                       "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
            self.encoded(template, bpe_tokenizer(added=[*MARKERS, "<|pad|>"]), [turns("a", "b")], NAMES)
            self.assertEqual(self.chat_json().get("strip_user"), expected)
        for text in (" a b\n", "\u2003x\u2003", ""):
            self.assertEqual([chat_pieces.stripped(text, how) for how in (False, True, "left", "right")],
                             [text, text.strip(), text.lstrip(), text.rstrip()])

    def test_tags_of_generation_in_a_message(self):
        """The characters that stand for them would make other turns count."""
        for text in ("\ufdee", "\ufdef", "a\ufdeeb\ufdefc"):
            printed = self.encoded(END_OF_ALL, piece_tokenizer("first", TURNS), [turns("a", "b"), turns(text, "b")], NAMES)[1]
            self.assertIn("1: the template fails", printed)

    def test_tokenizers_that_are_refused(self):
        rows = self.rows([{"messages": turns("a", "b")}])

        def refused(text, tokenizer):
            self.refused(text, "--tokenizer", self.tokenizer_of(END_OF_ALL, tokenizer, NAMES), rows)

        made = piece_tokenizer("prepend", TURNS)
        for token in made["added_tokens"]:
            token["normalized"] = token["content"] == "<|end|>"
        refused('whose special token <|end|> is "normalized" or "single_word"; set both to false', made)
        made = piece_tokenizer("prepend", TURNS, rstrip=TURNS[2:], plain=["\n"])
        refused("takes spaces beside it, and others of its added tokens are spaces", made)


if __name__ == "__main__":
    unittest.main()
