"""The tokenizers of prepare.py: bytes, tiktoken's encodings, Mistral's tekken.json, Hugging Face's tokenizer.json; and
each as the tokenizer.json that train_iha reads."""

import base64
import difflib
import functools
import json
import math
import os
import re
from pathlib import Path

import numpy as np

from user_error import UserError

# In the order they are looked for; the same list as end_of_text_names in end_of_text.c.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "<｜end▁of▁sentence｜>", "</s>",
               "<eos>", "<|eos|>", "[EOS]", "<EOS>", "<EOT>")

# Where a text stands that is tokenized apart: at the beginning of the whole, behind a special token, or behind another text,
# as one with it.
BEGINS, FOLLOWS, CONTINUES = "begins", "follows", "continues"

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# tiktoken keeps white space that ends the text in one piece here. Its $ is spelled so that $'s several
# meanings elsewhere (the end of a line, before a last newline) do not matter.
CL100K_PATTERN = LLAMA3_PATTERN.replace(r"|\s*[\r\n]+", r"|\s+(?![\s\S])|\s*[\r\n]+")
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN3_5_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
                   r"|\s*[\r\n]+|\s+(?!\S)|\s+")
UPPER, LOWER, ENDING = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
O200K_PATTERN = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDING}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENDING}"
                 rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}")
TEKKEN_PATTERN = O200K_PATTERN.replace(ENDING, "").replace(r"\p{N}{1,3}", r"\p{N}")
DEEPSEEK_PATTERN = [r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
                    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
                    r"| ?[\p{P}\p{S}]+[\r\n]*|" + SPACES]
LLAMA3_SPECIALS = (["<|begin_of_text|>", "<|end_of_text|>"]
                   + [f"<|reserved_special_token_{i}|>" for i in range(4)]
                   + ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
                   + [f"<|reserved_special_token_{i}|>" for i in range(5, 251)])
LLAMA4_SPECIALS = (["<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
                    "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>"]
                   + [f"<|unnamed_special_token_{i}|>" for i in range(10, 2048)])
QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def parse_json(text):
    """As data/json_file.c reads it: neither NaN nor a key twice in one object, which readers take differently."""
    def unique(pairs):
        members = dict(pairs)
        if len(members) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f'the key "{twice[:40]}" stands twice in one object; remove one of them')
        return members

    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def in_order(names):
    return {name: i for i, name in enumerate(names)}


# --pattern: how text is cut into words, and the special tokens' places after the last rank
PATTERNS = {
    "gpt2": (GPT2_PATTERN, {"<|endoftext|>": 0}),
    "cl100k": (CL100K_PATTERN, {"<|endoftext|>": 1, "<|fim_prefix|>": 2, "<|fim_middle|>": 3, "<|fim_suffix|>": 4,
                                "<|endofprompt|>": 20}),
    "llama3": (LLAMA3_PATTERN, in_order(LLAMA3_SPECIALS)),
    "llama4": (O200K_PATTERN, in_order(LLAMA4_SPECIALS)),
    "o200k": (O200K_PATTERN, {"<|endoftext|>": 1, "<|endofprompt|>": 20}),
    "qwen2": (QWEN2_PATTERN, in_order(QWEN_SPECIALS)),
    "qwen3.5": (QWEN3_5_PATTERN, in_order(QWEN_SPECIALS)),
    "tekken": (TEKKEN_PATTERN, {"<s>": 0, "</s>": 1}),
}
# The same where text is cut several times over.
SEQUENCES = {"deepseek": (DEEPSEEK_PATTERN, {"<｜begin▁of▁sentence｜>": 0, "<｜end▁of▁sentence｜>": 1})}
NAMED = PATTERNS | SEQUENCES
KNOWN_SIZES = {50256: "gpt2", 100256: "cl100k", 128000: "llama3", 199998: "o200k", 200000: "llama4", 151643: "qwen2",
               248044: "qwen3.5"}
NORMALIZERS = {"qwen2": {"type": "NFC"}, "qwen3.5": {"type": "NFC"}}  # as these models are trained


def end_of_text(added, vocab, eos_token=None):
    """The token that ends a document, as data/tokenizer_json.c finds it: the configuration's eos_token, or the first
    known name among the added tokens, or among all. None when there is none."""
    if eos_token is not None:
        return added.get(eos_token, vocab.get(eos_token))
    return next((ids[name] for ids in (added, vocab) for name in END_OF_TEXT if name in ids), None)


class Bytes:
    """Ids 0-255 are bytes, 256 ends a document."""
    vocab_size, end_of_text, wants_str, json, whole_documents = 257, 256, False, None, False

    def encode(self, texts, continued=None):
        return [np.frombuffer(text if isinstance(text, bytes) else text.encode(errors="replace"), dtype=np.uint8)
                for text in texts]

    def encode_at(self, requests):
        return self.encode([text for text, _ in requests])


class Tiktoken:
    """A tiktoken.Encoding. Special tokens written out in a text stay ordinary text."""
    wants_str, whole_documents, path = True, False, ""

    def __init__(self, encoding, pattern):
        self.encoding, self.pattern = encoding, pattern
        self.vocab_size = encoding.n_vocab
        self.end_of_text = end_of_text(encoding._special_tokens, {})

    @functools.cached_property
    def json(self):
        return json.dumps(tokenizer_json(self.encoding._mergeable_ranks, self.encoding._special_tokens, self.pattern),
                          ensure_ascii=False, indent=1)

    def encode(self, texts, continued=None):
        return [self.encoding.encode_ordinary(text) for text in texts]


def members(node, inner):
    """A normalizer's or pre-tokenizer's steps, Sequences opened."""
    if node is None:
        return []
    return [step for item in node[inner] for step in members(item, inner)] if node["type"] == "Sequence" else [node]


def without_prefix(data):
    """(whether this tokenizer.json puts a space in front of a text, the same one that does not). A text is cut into
    pieces before it is tokenized, and only the first may get that space."""
    data = json.loads(json.dumps(data))
    adds, changed = False, False
    for step in members(data.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend":
            adds, step["prepend"] = True, ""
        elif step["type"] == "Strip":
            changed, step["strip_left"] = True, False
    for step in members(data.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            adds, step["prepend_scheme"] = True, "never"
            step.pop("add_prefix_space", None)
        elif step["type"] == "ByteLevel" and step.get("add_prefix_space", True):
            adds, step["add_prefix_space"] = True, False
    return adds, data if adds or changed else None


def behind_a_token(data):
    """This tokenizer.json for a text that follows a special token: a space that only the whole text gets in front is not
    put there."""
    data = json.loads(json.dumps(data))
    for step in members(data.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace" and step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
    return data


def prefixes_parts(data):
    """Is a space put in front of every part of a text, where it has parts: between added tokens, or cut out by a step
    before? Then all of it depends on where it begins."""
    steps = members(data.get("pre_tokenizer"), "pretokenizers")
    places = [i for i, step in enumerate(steps)
              if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") == "always"
              or step["type"] == "ByteLevel" and step.get("add_prefix_space", True)]
    prepends = any(step["type"] == "Prepend" for step in members(data.get("normalizer"), "normalizers"))
    parts = any(not token.get("special") for token in data.get("added_tokens") or [])
    return max(places, default=0) > 0 or parts and (prepends or bool(places))


def joins_words(tokenizer, vocab):
    """May a token reach over a word's end into the next one? Then a text can only be tokenized whole."""
    text = tokenizer.normalizer.normalize_str("ab cd") if tokenizer.normalizer else "ab cd"
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(text) if tokenizer.pre_tokenizer else [(text, None)]
    return any("b" in piece and "c" in piece for piece, _ in pieces) and any(re.search("[a-z][▁Ġ ]", token) for token in vocab)


class HuggingFace:
    """A tokenizer.json. Special tokens written out in a text stay ordinary text; none are added, and merges are never
    dropped at random."""
    wants_str = True

    def __init__(self, name, text, eos_token=None):
        self.json, self.path = text, name
        try:
            data = parse_json(text)
            if data.get("model", {}).get("dropout"):
                data["model"]["dropout"] = None
            self.tokenizer = self.open(data)
            self.adds_space, continuation = without_prefix(data)
            self.continuation = self.open(continuation) if continuation else self.tokenizer
            behind = behind_a_token(data)
            self.behind = self.open(behind) if behind != data else self.tokenizer
        except ImportError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{name}: not a tokenizer.json: {error}") from None
        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        self.whole_documents = joins_words(self.tokenizer, vocab) or prefixes_parts(data)
        self.vocab_size = max(vocab.values(), default=-1) + 1  # ids may have holes
        added = {token.content: id for id, token in self.tokenizer.get_added_tokens_decoder().items()}
        self.end_of_text = end_of_text(added, vocab, eos_token)
        if eos_token is not None and self.end_of_text is None:
            raise UserError(f"{name}: the tokenizer_config.json beside it names '{eos_token}' as its eos_token, and there "
                            "is no such token; the files do not belong together")

    @staticmethod
    def open(data):
        import tokenizers
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def encode(self, texts, continued=None):
        """continued[i]: texts[i] goes on where the one before it ended."""
        rows = [None] * len(texts)
        first, later = [], []
        for i, text in enumerate(texts):
            if not (continued and continued[i]):
                first.append((i, text))
            elif self.adds_space and text[:1] == " " and text[1:2].strip():
                first.append((i, text[1:]))  # the tokenizer puts the space back
            else:
                later.append((i, text))
        for tokenizer, pieces in ((self.tokenizer, first), (self.continuation, later)):
            self.encode_pieces(tokenizer, pieces, rows)
        return rows

    @staticmethod
    def encode_pieces(tokenizer, pieces, rows):
        """rows[i] of each (i, text)."""
        tokenizer.encode_special_tokens = True  # not kept by pickle, so set here
        encoded = tokenizer.encode_batch_fast([text for _, text in pieces], add_special_tokens=False)
        for (i, _), row in zip(pieces, encoded):
            rows[i] = row.ids

    def encode_at(self, requests):
        """Of each (text, place)."""
        rows = [None] * len(requests)
        for tokenizer, place in ((self.tokenizer, BEGINS), (self.behind, FOLLOWS), (self.continuation, CONTINUES)):
            self.encode_pieces(tokenizer, [(i, text) for i, (text, at) in enumerate(requests) if at == place], rows)
        return rows

    def encode_whole(self, text):
        """With special tokens where the text spells them."""
        self.tokenizer.encode_special_tokens = False
        return self.tokenizer.encode(text, add_special_tokens=False).ids


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


def pre_tokenizer(pattern):
    """The pre-tokenizer of a known name, or of a regular expression."""
    if pattern == "gpt2":
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    regexes = NAMED[pattern][0] if pattern in NAMED else pattern
    splits = [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
              for regex in (regexes if isinstance(regexes, list) else [regexes])]
    return {"type": "Sequence", "pretokenizers": splits + [
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}


def tokenizer_json(ranks, specials, pattern, first_id=0):
    """A tiktoken encoding as a byte-level BPE tokenizer.json that encodes identically.

    tiktoken keeps no merges: any pair whose union is a token may merge, lowest rank first. But of all pairs
    that spell a token only one is ever reached, the last step of building that token alone, so these pairs
    in rank order are the merges. A token that cannot be built is only ever found as a whole word, which
    ignore_merges does. Ids between the ranks and the specials are filled in, since the tokenizers library
    numbers added tokens without gaps. first_id: the ranks count from there, and special tokens stand before them;
    the library takes such ids from the vocabulary alone.
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
    first, last = (0, first_id - 1) if first_id else (len(ranks), max(names, default=len(ranks) - 1))
    added = [{"id": id, "content": names.get(id, f"<|unused_{id}|>"), "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False, "special": True} for id in range(first, last + 1)]
    vocab = {token["content"]: token["id"] for token in added} if first_id else {}
    vocab |= {spell(token): first_id + rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": NORMALIZERS.get(pattern), "pre_tokenizer": pre_tokenizer(pattern), "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": unreachable, "vocab": vocab, "merges": merges},
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


def check_ranks(path, ranks):
    whole = all(type(rank) is int for rank in ranks.values())
    if not whole or sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path}: ranks must count from 0 without gaps and include all 256 bytes")


def converted(path, ranks, specials, pattern, first_id=0):
    text = json.dumps(tokenizer_json(ranks, specials, pattern, first_id), ensure_ascii=False, indent=1)
    return HuggingFace(path, text)


def load_ranks(path, pattern):
    """A rank file: lines of base64 token and rank."""
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank)
                 for token, rank in (line.split() for line in Path(path).read_bytes().splitlines() if line)}
    except ValueError:
        raise UserError(f"{path}: neither a tokenizer.json nor a tiktoken rank file (a SentencePiece model "
                        "must be converted to tokenizer.json)") from None
    check_ranks(path, ranks)
    pattern = pattern or KNOWN_SIZES.get(len(ranks))
    if pattern is None:
        raise UserError(f"{path}: {len(ranks)} ranks, no encoding known; say --pattern {'|'.join(NAMED)}, or the "
                        "encoding's regular expression")
    if pattern not in NAMED:  # the user's own, read as the tokenizers library reads it
        return converted(path, ranks, {"<|endoftext|>": len(ranks)}, pattern)
    regex, places = NAMED[pattern]
    specials = {name: len(ranks) + place for name, place in places.items()}
    if pattern in SEQUENCES or pattern in NORMALIZERS:
        return converted(path, ranks, specials, pattern)
    import tiktoken
    return Tiktoken(tiktoken.Encoding(Path(path).stem, pat_str=regex, mergeable_ranks=ranks, special_tokens=specials),
                    pattern)


TEKKEN_SPECIALS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                   "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
                   "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]


def load_tekken(path, data):
    """Mistral's tekken.json: ranks as in a rank file, numbered after its special tokens."""
    try:
        config = data["config"]
        count = range(config["default_num_special_tokens"]).stop  # a whole number
        ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"]
                 for entry in data["vocab"][:config["default_vocab_size"] - count]}
        listed = data.get("special_tokens") or [{"rank": i, "token_str": name} for i, name in enumerate(TEKKEN_SPECIALS)]
        names = {entry["rank"]: entry["token_str"] for entry in listed}
        pattern = config["pattern"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a tekken.json: {error!r}") from None
    check_ranks(path, ranks)
    specials = {names.get(id, f"<SPECIAL_{id}>"): id for id in range(count)}
    return converted(path, ranks, specials, pattern, first_id=count)


def eos_token(path):
    """The name of the eos_token in a tokenizer_config.json beside `path`, or None."""
    path = Path(path).parent / "tokenizer_config.json"
    if not path.exists():
        return None
    try:
        token = parse_json(path.read_bytes().decode("utf-8-sig")).get("eos_token")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a tokenizer_config.json: {error}") from None
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise UserError(f"{path}: its eos_token is neither text nor an added token; correct it or remove it")
    return token


def file_of_folder(folder):
    """The file of a Hugging Face folder that holds its tokenizer."""
    for name in ("tokenizer.json", "tekken.json"):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise UserError(f"--tokenizer {folder}: a folder without tokenizer.json" + (
        "; it has a tokenizer.model: give that, if it is a rank file" if os.path.isfile(os.path.join(folder, "tokenizer.model"))
        else ""))


def load_json(path):
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        data = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a tokenizer.json: {error}") from None
    if "vocab" in data and "config" in data:
        return load_tekken(path, data)
    return HuggingFace(path, text, eos_token(path))


def check_pattern(pattern):
    """A known name, or a regular expression that the tokenizers library takes."""
    if pattern is None or pattern in NAMED:
        return
    if re.fullmatch(r"[\w.-]+", pattern):
        near = difflib.get_close_matches(pattern, NAMED, 1)
        raise UserError(f"--pattern {pattern}: not known" + (f"; did you mean {near[0]}?" if near else
                                                           f"; give {'|'.join(NAMED)} or a regular expression"))
    import tokenizers
    try:
        tokenizers.Regex(pattern)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"--pattern {pattern}: {error}") from None


def load_tokenizer(name, pattern):
    if pattern and name in ("bytes", "gpt2"):
        raise UserError(f"--pattern belongs to a rank file, not to {name}")
    if name == "bytes":
        return Bytes()
    try:
        check_pattern(pattern)
        if name == "gpt2" and not os.path.exists(name):
            return load_gpt2()
        if name == "llama3" and not os.path.exists(name):
            raise UserError("llama3: its licence asks you to fetch it yourself: get original/tokenizer.model from "
                            "huggingface.co/meta-llama/Meta-Llama-3-8B and pass --tokenizer tokenizer.model --pattern llama3")
        path = file_of_folder(name) if os.path.isdir(name) else name
        if not os.path.isfile(path):
            near = difflib.get_close_matches(name, ["bytes", "gpt2", "llama3"], 1)
            raise UserError(f"--tokenizer {name}: no such file" + (f"; did you mean {near[0]}?" if near else
                                                                  "; give bytes, gpt2, llama3, a file or a folder"))
        with open(path, "rb") as file:
            is_json = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
        if is_json and pattern:
            raise UserError(f"--pattern belongs to a rank file; {path} is a tokenizer.json")
        return load_json(path) if is_json else load_ranks(path, pattern)
    except ImportError as error:
        raise UserError(f"--tokenizer {name} needs {error.name}: pip install {error.name}") from None
