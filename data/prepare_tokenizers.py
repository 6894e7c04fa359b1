"""The tokenizers of prepare.py: bytes, tiktoken's encodings, Hugging Face's tokenizer.json; and each as the
tokenizer.json that train_iha reads."""

import base64
import difflib
import json
import math
import os
from pathlib import Path

import numpy as np

from user_error import UserError

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# tiktoken keeps white space that ends the text in one piece here. Its $ is spelled so that $'s several
# meanings elsewhere (the end of a line, before a last newline) do not matter.
CL100K_PATTERN = LLAMA3_PATTERN.replace(r"|\s*[\r\n]+", r"|\s+(?![\s\S])|\s*[\r\n]+")
LLAMA3_SPECIALS = (["<|begin_of_text|>", "<|end_of_text|>"]
                   + [f"<|reserved_special_token_{i}|>" for i in range(4)]
                   + ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
                   + [f"<|reserved_special_token_{i}|>" for i in range(5, 251)])

# --pattern: how text is cut into words, and the special tokens' places after the last rank
PATTERNS = {
    "gpt2": (GPT2_PATTERN, {"<|endoftext|>": 0}),
    "cl100k": (CL100K_PATTERN, {"<|endoftext|>": 1, "<|fim_prefix|>": 2, "<|fim_middle|>": 3, "<|fim_suffix|>": 4,
                                "<|endofprompt|>": 20}),
    "llama3": (LLAMA3_PATTERN, {name: i for i, name in enumerate(LLAMA3_SPECIALS)}),
}
KNOWN_SIZES = {50256: "gpt2", 100256: "cl100k", 128000: "llama3"}


class Bytes:
    """Ids 0-255 are bytes, 256 ends a document."""
    vocab_size, end_of_text, wants_str, json = 257, 256, False, None

    def encode(self, texts):
        return [np.frombuffer(text if isinstance(text, bytes) else text.encode(errors="replace"), dtype=np.uint8)
                for text in texts]


class Tiktoken:
    """A tiktoken.Encoding. Special tokens written out in a text stay ordinary text."""
    wants_str = True

    def __init__(self, encoding, pattern):
        self.encoding, self.pattern = encoding, pattern
        self.vocab_size = encoding.n_vocab
        self.end_of_text = next((encoding._special_tokens[name] for name in END_OF_TEXT
                                 if name in encoding._special_tokens), None)

    @property
    def json(self):
        return json.dumps(tokenizer_json(self.encoding._mergeable_ranks, self.encoding._special_tokens, self.pattern),
                          ensure_ascii=False, indent=1)

    def encode(self, texts):
        return [self.encoding.encode_ordinary(text) for text in texts]


class HuggingFace:
    """A tokenizer.json. Special tokens written out in a text stay ordinary text; none are added."""
    wants_str = True

    def __init__(self, path):
        import tokenizers
        self.json = Path(path).read_text(encoding="utf-8")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(self.json)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path}: not a tokenizer.json: {error}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1  # ids may have holes
        self.end_of_text = next((vocab[name] for name in END_OF_TEXT if name in vocab), None)

    def encode(self, texts):
        self.tokenizer.encode_special_tokens = True  # not kept by pickle, so set here
        return [row.ids for row in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def greedy_parts(ranks, token):
    """The token as tiktoken would build it: merge the leftmost of the pairs whose union has the lowest rank,
    again and again; stop at two parts, or where nothing merges."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [(ranks.get(parts[i] + parts[i + 1], math.inf), i) for i in range(len(parts) - 1)]
        rank, i = min(pairs)
        if rank == math.inf:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def byte_alphabet():
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def tokenizer_json(ranks, specials, pattern):
    """A tiktoken encoding as a byte-level BPE tokenizer.json that encodes identically.

    tiktoken keeps no merges: any pair whose union is a token may merge, lowest rank first. But of all pairs
    that spell a token only one is ever reached, the last step of building that token alone, so these pairs
    in rank order are the merges. A token that cannot be built is only ever found as a whole word, which
    ignore_merges does. Ids between the ranks and the specials are filled in, since the tokenizers library
    numbers added tokens without gaps.
    """
    alphabet = byte_alphabet()
    spell = lambda token: "".join(alphabet[byte] for byte in token)
    merges, unreachable = [], False
    for token in sorted(ranks, key=ranks.get):
        if len(token) > 1:
            parts = greedy_parts(ranks, token)
            unreachable |= len(parts) != 2
            if len(parts) == 2:
                merges.append([spell(part) for part in parts])
    names = {id: name for name, id in specials.items()}
    first, last = len(ranks), max(names, default=len(ranks) - 1)
    added = [{"id": id, "content": names.get(id, f"<|unused_{id}|>"), "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False, "special": True} for id in range(first, last + 1)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern == "gpt2"}
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[pattern][0]}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level if pattern == "gpt2" else {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": unreachable,
                  "vocab": {spell(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])},
                  "merges": merges},
    }


def load_gpt2():
    import tiktoken
    try:
        return Tiktoken(tiktoken.get_encoding("gpt2"), "gpt2")
    except Exception as error:  # requests' errors, and whatever stands between
        raise UserError(
            f"gpt2: cannot download its vocabulary ({type(error).__name__}); fetch "
            "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken elsewhere and pass "
            "--tokenizer r50k_base.tiktoken --pattern gpt2") from None


def load_ranks(path, pattern):
    """A rank file: lines of base64 token and rank."""
    import tiktoken
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank)
                 for token, rank in (line.split() for line in Path(path).read_bytes().splitlines() if line)}
    except ValueError:
        raise UserError(f"{path}: neither a tokenizer.json nor a tiktoken rank file (a SentencePiece model "
                        "must be converted to tokenizer.json)") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path}: ranks must count from 0 without gaps and include all 256 bytes")
    pattern = pattern or KNOWN_SIZES.get(len(ranks))
    if pattern is None:
        raise UserError(f"{path}: {len(ranks)} ranks, no encoding known; say --pattern {'|'.join(PATTERNS)}")
    regex, places = PATTERNS[pattern]
    specials = {name: len(ranks) + place for name, place in places.items()}
    return Tiktoken(tiktoken.Encoding(Path(path).stem, pat_str=regex, mergeable_ranks=ranks, special_tokens=specials),
                    pattern)


def load_tokenizer(name, pattern):
    if pattern and name in ("bytes", "gpt2"):
        raise UserError(f"--pattern belongs to a rank file, not to {name}")
    if name == "bytes":
        return Bytes()
    try:
        if name == "gpt2":
            return load_gpt2()
        if name == "llama3" and not os.path.exists(name):
            raise UserError("llama3: its licence asks you to fetch it yourself: get original/tokenizer.model from "
                            "huggingface.co/meta-llama/Meta-Llama-3-8B and pass --tokenizer tokenizer.model --pattern llama3")
        if not os.path.isfile(name):
            near = difflib.get_close_matches(name, ["bytes", "gpt2", "llama3"], 1)
            raise UserError(f"--tokenizer {name}: no such file" + (f"; did you mean {near[0]}?" if near else
                                                                  "; give bytes, gpt2, llama3 or a file"))
        with open(name, "rb") as file:
            is_json = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
        if is_json and pattern:
            raise UserError(f"--pattern belongs to a rank file; {name} is a tokenizer.json")
        return HuggingFace(name) if is_json else load_ranks(name, pattern)
    except ImportError as error:
        raise UserError(f"--tokenizer {name} needs {error.name}: pip install {error.name}") from None
