"""Conversations as prepare.py --chat prepares them: tokens, and labels of which only the answers count.

A conversation is rendered by a chat template (chat_template.py), and ends with a separator, a token that stands nowhere
inside, so that data.segments = documents keeps conversations apart. Label i is token i + 1 where that belongs to an
assistant's turn, end marker included, and -1 elsewhere. The last separator of a shard is the token that a sequence's
last target takes, so none is appended.
"""

import collections
import functools
import json
import os
from pathlib import Path

import numpy as np

from chat_pieces import CONTENTS, NoPieces, assistant, chat_pieces, system, user
from chat_tokens import PartsEncoder, check_library_agrees, special_tokens
from chat_template import BUILT_IN, BYTE_SPECIALS, NEEDED, Marks, Template, TemplateFailed, rendered_parts, without_tags
from prepare_inputs import json_layout
from prepare_output import LabelledWriter, Progress, file_range
from prepare_readers import BATCH, json_rows, jsonl_rows
from prepare_text import Preparation, score
from prepare_tokenizers import END_OF_TEXT, HuggingFace, parse_json
from prepare_workers import ordered_map
from user_error import UserError, one_line

IGNORED = -1
ROUGH = 64  # bytes that a conversation takes beside its text, when batches are filled
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# -------------------------------------------------------------------------------------- which template


def read_beside(tokenizer, name):
    """The text of a file beside the tokenizer's, or None."""
    path = Path(getattr(tokenizer, "path", "") or "").parent / name
    if not getattr(tokenizer, "path", "") or not path.is_file():
        return None
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None


def tokenizer_config(tokenizer):
    text = read_beside(tokenizer, "tokenizer_config.json")
    try:
        config = parse_json(text) if text is not None else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{Path(tokenizer.path).parent / 'tokenizer_config.json'}: not a tokenizer_config.json: {error}") from None
    return config if isinstance(config, dict) else {}


def special_names(config):
    """{"bos_token": "<s>", ..., "additional_special_tokens": [...]} of a tokenizer_config.json."""
    names = {name: config[name]["content"] if isinstance(config[name], dict) and "content" in config[name] else config[name]
             for name in NAMES if config.get(name)}
    names = {name: text for name, text in names.items() if isinstance(text, str)}
    others = config.get("additional_special_tokens")
    return names | ({"additional_special_tokens": others} if isinstance(others, list) else {})


def brought_template(tokenizer, config):
    """(name, source) of the template that comes with a tokenizer, or None."""
    text = read_beside(tokenizer, "chat_template.jinja")
    if text is not None:
        return str(Path(tokenizer.path).parent / "chat_template.jinja"), text
    given = config.get("chat_template")
    if isinstance(given, list):  # several, by name
        given = next((item.get("template") for item in given if isinstance(item, dict) and item.get("name") == "default"), None)
    if not given:
        return None
    path = Path(tokenizer.path).parent / "tokenizer_config.json"
    if not isinstance(given, str):
        raise UserError(f"{path}: its chat_template is no text; give --chat-template")
    return str(path), given


def template_source(asked, tokenizer, config):
    """(name, source, whether it is a built-in one)."""
    if asked in BUILT_IN:
        return asked, BUILT_IN[asked], True
    if asked is not None:
        if not os.path.isfile(asked):
            raise UserError(f"--chat-template {asked}: no such file, and none of {', '.join(BUILT_IN)}")
        try:
            return asked, Path(asked).read_bytes().decode("utf-8-sig"), False
        except UnicodeDecodeError:
            raise UserError(f"{asked}: not a chat template: not UTF-8") from None
    if tokenizer.json is None:
        return "bytes", BUILT_IN["bytes"], True
    brought = brought_template(tokenizer, config)
    if brought is None:
        raise UserError("--chat: the tokenizer brings no chat template; give --chat-template chatml, llama3 or FILE")
    return *brought, False


def added_tokens(tokenizer, names):
    """(the tokenizer with these special tokens, those that were added behind its vocabulary)."""
    data = parse_json(tokenizer.json)
    known = {token["content"] for token in data.get("added_tokens") or []}
    missing = [name for name in names if name not in known]
    if not missing:
        return tokenizer, []
    id = tokenizer.vocab_size
    data["added_tokens"] = (data.get("added_tokens") or []) + [
        {"id": id + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for i, name in enumerate(missing)]
    made = HuggingFace(tokenizer.path, json.dumps(data, ensure_ascii=False, indent=1))
    made.end_of_text = tokenizer.end_of_text
    return made, missing


# -------------------------------------------------------------------------------------------- encoding


def special_ids(tokenizer):
    """{name: id} of what a template's text may contain as special tokens."""
    if tokenizer.json is None:
        return dict(BYTE_SPECIALS)
    return {token.content: id for id, token in special_tokens(tokenizer).items()}


class Malformed(Exception):
    """A row that is no conversation; the message says why."""


def conversation(row):
    """(messages, what else the template is given) of a JSON object."""
    if not isinstance(row, dict):
        raise Malformed("not a JSON object")
    if "messages" not in row and isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}], {}
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Malformed('neither a list "messages" nor the texts "prompt" and "completion"')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Malformed('a message without a "role"')
        content = message.get("content")
        if not isinstance(content, (str, list)) and not (content is None and message.get("tool_calls")):
            raise Malformed('a message whose "content" is no text')
    return messages, {"tools": row["tools"]} if row.get("tools") else {}


class ChatEncoder:
    """Batches of conversations to tokens and labels, in a worker process."""

    def __init__(self, tokenizer, template, separator, dtype, longest):
        self.tokenizer, self.template, self.separator = tokenizer, template, separator
        self.dtype, self.longest = dtype, longest
        self.dropped = "".join(BYTE_SPECIALS) if tokenizer.json is None else ""

    @functools.cached_property
    def marks(self):
        return Marks(special_ids(self.tokenizer), self.dropped)

    @functools.cached_property
    def encode_parts(self):
        """[(items, counts)] to (ids, whether each counts)."""
        return PartsEncoder(self.tokenizer)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in ("marks", "encode_parts")}

    def render(self, row):
        """The parts of a row, or (kind of failure, why)."""
        try:
            messages, others = conversation(row)
        except Malformed as error:
            return "no conversation", str(error)
        if not any(message["role"] == "assistant" for message in messages):
            return "no assistant turn", ""
        try:
            return rendered_parts(self.template, self.marks, messages, **others)
        except TemplateFailed as error:
            return "the template fails", str(error)

    def encode(self, row):
        """(tokens, labels, how many count) of a row, or (kind, why)."""
        parts = self.render(row)
        if isinstance(parts, tuple):
            return parts
        ids, counted = self.encode_parts(parts)
        if self.separator in ids:
            return "the separator stands inside", f"id {self.separator}, which ends a conversation"
        if len(ids) + 1 > self.longest:
            return "longer than a sequence", f"{len(ids) + 1:,} tokens"
        if not any(counted):
            return "no assistant turn", "its answers are empty"
        tokens = np.array(ids + [self.separator], dtype=self.dtype)
        labels = np.full(len(tokens), IGNORED, dtype=np.int32)
        counted = np.array(counted)
        labels[:-2][counted[1:]] = tokens[1:-1][counted[1:]]
        return tokens, labels, int((labels >= 0).sum())

    def __call__(self, batch):
        """[(row, where, bytes, split, index)] to the same with tokens and labels in place of the row."""
        return [(self.encode(row), where, size, split, index) for row, where, size, split, index in batch]


# ---------------------------------------------------------------------------------------- preparation


def content_bytes(value):
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="replace"))
    if isinstance(value, dict):
        return sum(map(content_bytes, value.values()))
    return sum(map(content_bytes, value)) if isinstance(value, list) else 0


def chat_json(name, sha256, dropped, pieces):
    """The text of chat.json: what data/chat.h describes, of this template and tokenizer."""
    content = {"format_version": 1, "template": name, "tokenizer_sha256": sha256,
               "drop": [ord(character) for character in dropped], **pieces}
    lines = (f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in content.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


class ChatPreparation(Preparation):
    """One run of prepare.py --chat."""

    def __init__(self, options, tokenizer):
        config = tokenizer_config(tokenizer)
        name, source, built_in = template_source(options.chat_template, tokenizer, config)
        self.added = []
        if tokenizer.json is not None:
            if not isinstance(tokenizer, HuggingFace):  # tiktoken's, which encodes identically
                tokenizer = HuggingFace(tokenizer.path, tokenizer.json)
            if built_in:
                tokenizer, self.added = added_tokens(tokenizer, NEEDED[name])
        elif built_in and name != "bytes":
            raise UserError(f"--chat-template {name}: its special tokens are no bytes; use --chat-template bytes")
        names = special_names(config)
        self.template = Template(name, source, names)
        self.separator_given = options.separator is not None
        options.separator = self.choose_separator(options, tokenizer, names)
        super().__init__(options, tokenizer)
        longest = min(options.seq_len or options.shard_tokens, options.shard_tokens)
        self.encoder = ChatEncoder(tokenizer, self.template, self.separator, self.dtype, longest)
        check_library_agrees(tokenizer, self.encoder.marks, list(self.plain_texts()))
        self.pieces, self.no_pieces, self.no_system = None, "", ""
        try:
            self.pieces, self.no_system = chat_pieces(self.template, self.encoder.marks, self.encoder.dropped, self.encoder.encode_parts)
        except NoPieces as error:
            self.no_pieces = str(error)

    def plain_texts(self):
        """A few conversations without special tokens in them, as far as the template renders them."""
        talks = [[user(content), assistant("An answer."), user("a"), assistant("b")] for content in CONTENTS if "<" not in content]
        for messages in [*talks, [system("Be brief."), user("a")], [user("a"), assistant("b")]]:
            try:
                yield without_tags(self.template.render(messages))
            except TemplateFailed:
                pass

    def choose_separator(self, options, tokenizer, names):
        """A token that the template does not write: segments end after each one."""
        if options.separator is not None:
            return options.separator
        if tokenizer.json is None:
            return tokenizer.end_of_text
        ids = special_ids(tokenizer)
        vocab = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
        wanted = [tokenizer.end_of_text, *(ids.get(name) for name in END_OF_TEXT),
                  *(vocab.get(names.get(name)) for name in ("pad_token", "unk_token")), *ids.values()]
        used = {ids[found[0]] for text in self.plain_texts() for found in Marks(ids).find(text, None)}
        free = next((id for id in wanted if id is not None and id not in used), None)
        if free is None:
            raise UserError("--chat: every special token of this tokenizer stands inside conversations; say which id is to "
                            "end them: --separator ID")
        return free

    # ---- reading

    def conversations(self, source):
        """(row, where) of each conversation."""
        source.keep = source.keep and not self.is_split
        with source.open() as stream:
            kind = source.format(self.options.format)
            if kind != "jsonl":
                raise UserError(f"{source.name}: --chat reads JSON lines, and this is {kind}")
            if json_layout(source.head) == "lines":
                yield from ((row, where) for where, row in jsonl_rows(stream, source))
            else:
                yield from ((row, where) for where, row, _ in json_rows(stream, source))

    def batches(self, progress, forced):
        batch, size, index, before = [], 0, 0, 0
        for source in self.inputs:
            for row, where in self.conversations(source):
                progress.show(before + source.consumed)
                length = content_bytes(row)
                batch.append((row, where, length, self.split_of(index, forced), index))
                size, index = size + length + ROUGH, index + 1
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
            before += source.consumed if source.size is None else source.size
        if batch:
            yield batch
        progress.show(before, last=True)

    def run(self, writers, forced={}):
        progress = Progress(self.total)
        self.documents, self.bytes, self.counted = (collections.Counter() for _ in range(3))
        self.left_out, self.first, self.longest, self.kept = collections.Counter(), {}, 0, []
        for results in ordered_map(self.batches(progress, forced), self.useful_workers(), self.encoder):
            for made, where, size, split, index in results:
                if len(made) == 2:
                    kind, why = made
                    self.left_out[kind] += 1
                    self.first.setdefault(kind, f"{where}: {why}" if why else where)
                    continue
                tokens, labels, counted = made
                writers[split].write(tokens, labels, size)
                self.documents[split] += 1
                self.bytes[split] += size
                self.counted[split] += counted
                self.longest = max(self.longest, len(tokens))
                self.kept.append(index)
        self.check_conversations(writers, forced)

    def check_conversations(self, writers, forced):
        if not self.kept:
            if not self.left_out:
                raise UserError(f"{self.inputs[0].name}: no conversation" + (" in any input" if len(self.inputs) > 1 else ""))
            kind, count = self.left_out.most_common(1)[0]
            total = sum(self.left_out.values())
            many = f" (so are {count:,} of {total:,})" if total > 1 else ""
            raise UserError(f"--chat: no conversation is left: {kind}: {self.first[kind]}{many}")
        if self.options.val_fraction == 0 or len(self.documents) == 2:
            return
        if len(self.kept) == 1 or forced:
            raise UserError("only one conversation is left, so none is left to validate on; use --val-fraction 0")
        missing = "train" if "val" in self.documents else "val"
        by_score = sorted(self.kept, key=lambda index: score(self.options.seed, index))
        for writer in writers.values():
            writer.discard()
        self.run(writers, {by_score[-1 if missing == "train" else 0]: missing})

    # ---- what goes beside the shards, and onto the terminal

    def chat_json(self, sha256):
        """The text of chat.json."""
        pieces = {"refused": one_line(self.no_pieces)} if self.pieces is None else self.pieces
        return chat_json(self.template.name, sha256, self.encoder.dropped, pieces)

    def report(self, writers):
        folder = self.options.out
        counts = {split: sum(writer.counts) for split, writer in writers.items()}
        splits = [split for split in writers if counts[split]]

        def row(label, values):
            print(f"{label:<16}" + "   ".join(f"{split} {values[split]}" for split in splits))

        row("conversations", {split: f"{self.documents[split]:,}" for split in splits})
        for i, (kind, count) in enumerate(self.left_out.most_common()):
            print(f"{'' if i else 'left out':<16}{count:,}: {kind} (first: {one_line(self.first[kind])})")
        row("tokens", {split: f"{counts[split]:,}" for split in splits})
        row("that count", {split: f"{self.counted[split]:,} ({self.counted[split] / counts[split]:.1%})" for split in splits})
        print(f"{'longest':<16}{self.longest:,} tokens")
        if self.added:
            print(f"{'new tokens':<16}{', '.join(self.added)}: {self.tokenizer.vocab_size - len(self.added)} and on")
        print(f"{'template':<16}{self.template.name}" + ("" if self.pieces else
              f"; `generate --chat` cannot use it: {self.no_pieces}"))
        if self.no_system:
            print(f"{'':<16}`generate --chat` cannot use its system message: {self.no_system}")
        print(f"{'files':<16}{folder}/: " + ", ".join(file_range(split, len(writers[split].counts)) for split in splits)
              + f" ({np.dtype(self.dtype).name}) with .labels, dataset.json, chat.json"
              + (", tokenizer.json" if self.tokenizer.json_path else ""))
        self.print_configuration(splits)
        print("segments = documents\npacking = fit")
        if self.added:
            print("\n[train]                    # with init_from, since its checkpoint lacks the new tokens:\nresize_vocab = true")

    def warn(self):
        pass
