#!/usr/bin/env python3
"""data/prepare.py --chat fed with hostile lines: shards whose labels are what the roles say and a report that adds up, or
one line and exit code 2.

    python -m unittest tests.cli.test_chat_fuzz                       a fixed number of inputs, the same in every run
    FUZZ_SECONDS=600 python -m unittest tests.cli.test_chat_fuzz      as many as fit into the time, others in every run

A failure names the number of its input; FUZZ_INPUT=123 runs that one alone.
"""

import json
import os
import random
import re
import time
import unittest

from tests.lib.chat_case import HAS_PACKAGES, Case

if HAS_PACKAGES:
    import tokenizers

    import chat_template
    from tests.reference.make_chat_cases import (END_OF_ALL, FOLDED, NAMES, NO_SYSTEM, QWEN_LIKE, TURNS, bpe_tokenizer,
                                                 piece_tokenizer)

INPUTS = 60
WORDS = ["define", "cat", "a", " ", "  ", "\n", "\n\n", "naïve", "🙂", "<|im_end|>", "<|im_start|>assistant\n", "<|assistant|>", "</s>", "<s>",
         "{{ x }}", "{% if %}", "\t", "'", '"', "\\n", "<", "|", "im_end|>", "\x03", "\x01", "\x02", "\u2028", "\xa0", "\ufdd0", "\ufdee",
         "\ufdef", "\0", "e\u0301", "\ud800", "<0x41>", "▁", "[A]", " [A] ", "x" * 300]
KEYS = ["role", "content", "messages", "prompt", "completion", "tools", "tool_calls", "text", "type", "", "x"]
ROLES = ["user", "assistant", "system", "tool", "Assistant", "assistant ", "\x01", "", "<|assistant|>", "assistant\n"]


class Hostile:
    """An input by its number."""

    def __init__(self, number):
        self.rng = random.Random(number)

    def text(self):
        return "".join(self.rng.choices(WORDS, k=self.rng.randrange(6)))

    def value(self, depth=0):
        rng, kind = self.rng, self.rng.randrange(10 if depth < 3 else 6)
        if kind < 4:
            return self.text()
        if kind < 6:
            return rng.choice([None, True, -1, 0, 1e300, float("inf"), 10 ** 30, "\ud800", [], {}])
        if kind < 8:
            return [self.value(depth + 1) for _ in range(rng.randrange(4))]
        return {rng.choice(KEYS): self.value(depth + 1) for _ in range(rng.randrange(4))}

    def message(self):
        rng = self.rng
        made = {"role": rng.choices(ROLES, weights=[8, 8, 2] + [1] * 7)[0], "content": self.text()}
        if rng.random() < 0.1:
            made["content"] = rng.choice([None, 3, [], [{"type": "text", "text": self.text()}], self.value()])
        if rng.random() < 0.05:
            made[rng.choice(KEYS)] = self.value()
        return made

    def row(self):
        kind = self.rng.random()
        if kind < 0.1:
            return self.value()
        if kind < 0.2:
            return {"prompt": self.text(), "completion": self.text()}
        if kind < 0.6:  # a plain conversation
            roles = ["system"][:self.rng.random() < 0.3] + ["user", "assistant"] * self.rng.randrange(1, 4)
            return {"messages": [{"role": role, "content": self.text()} for role in roles]}
        row = {"messages": [self.message() for _ in range(self.rng.randrange(5))]}
        return row | {self.rng.choice(KEYS): self.value()} if self.rng.random() < 0.1 else row

    def line(self):
        rng = self.rng
        text = json.dumps(self.row(), ensure_ascii=rng.random() < 0.5)
        if rng.random() < 0.02:
            text = "[" * rng.choice([5, 5000]) + text + "]" * 5
        if rng.random() < 0.02:
            text = text.replace(":", f": {'9' * rng.choice([20, 5000])}, \"x\":", 1)
        line = bytearray(text.encode(errors=rng.choice(["replace", "surrogatepass"])))
        if rng.random() < 0.03:
            for _ in range(rng.randrange(1, 4)):  # damage
                at = rng.randrange(len(line) + 1)
                line[at:at + rng.randrange(3)] = rng.choice([b"", b"\xff", b'"', b"{", b"\0", b"\xe2\x82", b"\\", b"\xef\xbb\xbf"])
        return bytes(line)

    def file(self):
        rng = self.rng
        damaged = rng.random() < 0.25
        lines = []
        while len(lines) < rng.randrange(1, 30):
            line = self.line()
            try:
                json.loads(line)
            except (ValueError, RecursionError):
                if not damaged:
                    continue
            lines.append(line)
        return rng.choice([b"\n", b"\n", b"\r\n", b"\n\n", b"\n \t\n"]).join(lines) + rng.choice([b"", b"\n", b"\n\n"])

    def options(self):
        rng = self.rng
        options = ["--val-fraction", rng.choice([0, 0, 0.3]), "--seed", rng.randrange(9)]
        if rng.random() < 0.2:
            options += ["--seq-len", rng.choice([2, 40, 200])]
        if rng.random() < 0.2:
            options += ["--shard-tokens", rng.choice([1, 100, 500])]
        return options


class Fuzz(Case):
    def setting(self, kind):
        """(arguments, decoding, the id of an answer's marker, how its header ends, the id of its end marker); None: not known."""
        if kind == "bytes":
            return ["--tokenizer", "bytes"], lambda ids: bytes(ids).decode(errors="replace"), 1, "assistant\x02", 3
        template, tokenizer = {
            "qwen": (QWEN_LIKE, bpe_tokenizer()), "alternating": (NO_SYSTEM, bpe_tokenizer()),
            "chatml": (chat_template.BUILT_IN["chatml"], bpe_tokenizer()), "folded": (FOLDED, piece_tokenizer("prepend", TURNS)),
            "turns": (END_OF_ALL, piece_tokenizer("first", TURNS)),
            "spaces": (END_OF_ALL, piece_tokenizer("prepend", TURNS, lstrip=TURNS[3:], rstrip=TURNS[2:]))}[kind]
        folder = f"tokenizer_{kind}"
        names = NAMES if "<s>" in tokenizer["model"]["vocab"] else {"eos_token": "<|endoftext|>"}
        self.write(f"{folder}/tokenizer_config.json", names | {"chat_template": template})
        path = self.write(f"{folder}/tokenizer.json", tokenizer)
        library = tokenizers.Tokenizer.from_file(str(path))
        decode = lambda ids: library.decode(ids, skip_special_tokens=False)
        if kind == "folded":
            return ["--tokenizer", path], decode, None, None, library.token_to_id("</s>")
        if kind in ("turns", "spaces"):
            header = "\n" if kind == "turns" else ""
            return ["--tokenizer", path], decode, library.token_to_id("<|assistant|>"), header, library.token_to_id("<|end|>")
        role = "model" if kind == "alternating" else "assistant"
        return ["--tokenizer", path], decode, library.token_to_id("<|im_start|>"), role + "\n", library.token_to_id("<|im_end|>")

    def expected(self, tokens, decode, marker, header, end):
        """Which of these tokens are an answer: behind each marker with this header, up to the end marker."""
        counts = [False] * len(tokens)
        for i, token in enumerate(tokens):
            if token != marker:
                continue
            begin = i + 1
            while begin < len(tokens) and len(decode(tokens[i + 1:begin])) < len(header):
                begin += 1
            if decode(tokens[i + 1:begin]) == header:
                last = tokens.index(end, begin)
                counts[begin:last + 1] = [True] * (last + 1 - begin)
        return counts

    def numbers(self, printed, label):
        """{"train": 1, "val": 2} of a line of the report."""
        line = re.search(rf"^{label}  +(.*)$", printed, re.M)[1]
        return {name: int(number.replace(",", "")) for name, number in re.findall(r"(train|val) ([\d,]+)", line)}

    def check_shards(self, printed, decode, marker, header, end):
        separator = json.loads((self.out / "dataset.json").read_text())["separator"]
        kept, tokens_written, counted = {}, {}, {}
        for path in sorted(self.out.glob("*.bin")):
            tokens, labels = self.read(path, "<u2")[1], self.read(path.with_suffix(".labels"), "<i4")[1]
            split = path.name.split("_")[0]
            self.assertEqual(len(tokens), len(labels))
            self.assertEqual(tokens[-1], separator)
            for name, value in ((kept, tokens.count(separator)), (tokens_written, len(tokens)),
                                (counted, sum(label >= 0 for label in labels))):
                name[split] = name.get(split, 0) + value
            begin = 0
            for i in (i for i, token in enumerate(tokens) if token == separator):
                talk, its_labels = tokens[begin:i], labels[begin:i]
                begin = i + 1
                self.assertEqual(labels[i], -1)
                self.assertTrue(all(label == -1 or label == talk[k + 1] for k, label in enumerate(its_labels)
                                    if k + 1 < len(talk)) and (not its_labels or its_labels[-1] == -1))
                self.assertTrue(any(label >= 0 for label in its_labels))
                got = [False] + [label >= 0 for label in its_labels[:-1]]
                if marker is not None:
                    self.assertEqual(got, self.expected(talk, decode, marker, header, end), decode(talk))
                for k, counts in enumerate(got):  # runs end with the end marker
                    if counts and (k + 1 == len(got) or not got[k + 1]):
                        self.assertEqual(talk[k], end)
        self.assertEqual(self.numbers(printed, "conversations"), kept)
        self.assertEqual(self.numbers(printed, "tokens"), tokens_written)
        self.assertEqual(self.numbers(printed, "that count"), counted)
        return sum(kept.values())

    def check_input(self, number):
        hostile = Hostile(number)
        kind = hostile.rng.choice(["bytes", "qwen", "alternating", "chatml", "folded", "turns", "spaces"])
        arguments, decode, marker, header, end = self.setting(kind)
        file = self.folder / "rows.jsonl"
        file.write_bytes(b'{"messages": []}\n' + hostile.file())
        code, printed, err = self.run_prepare(*arguments, *hostile.options(), "--workers", 1, "--overwrite", "--format", "jsonl", file)
        self.assertIn(code, (0, 2), err)
        if code == 2:
            self.assertRegex(err, r"\Aprepare\.py: [^\n]*\n\Z")
            self.assertEqual(printed, "")
            return 0
        self.assertEqual(err, "")
        kept = self.check_shards(printed, decode, marker, header, end)
        left_out = sum(int(count.replace(",", "")) for count in re.findall(r"^(?:left out)? {8,}([\d,]+): ", printed, re.M))
        rows = sum(1 for line in file.read_bytes().split(b"\n") if line.strip())
        self.assertEqual(kept + left_out, rows, printed)
        return kept

    def test_hostile_lines(self):
        seconds, only = float(os.environ.get("FUZZ_SECONDS", 0)), os.environ.get("FUZZ_INPUT")
        first = random.SystemRandom().randrange(1 << 40) if seconds else 0
        numbers = iter([int(only)] if only else range(first, first + (1 << 40 if seconds else INPUTS)))
        until, inputs, kept = time.monotonic() + seconds, 0, 0
        for number in numbers:
            if inputs and seconds and time.monotonic() > until:
                break
            try:
                kept += self.check_input(number)
            except Exception as error:
                raise AssertionError(f"input {number} (FUZZ_INPUT={number}): {error}") from error
            inputs += 1
        if not only:
            self.assertGreater(2 * kept, inputs)  # it is not all refused
        if seconds:
            print(f"{inputs:,} inputs, {kept:,} conversations kept")


if __name__ == "__main__":
    unittest.main()
