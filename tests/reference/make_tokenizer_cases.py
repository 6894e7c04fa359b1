#!/usr/bin/env python3
"""Makes tests/golden/tokenizer_*.json: small tokenizers and what the tokenizers library encodes and decodes with them.

    pip install tokenizers && python tests/reference/make_tokenizer_cases.py

Run once; its results are committed, so the tests need neither Python nor a network. Each tokenizer stands for
a family:
  gpt2    the ByteLevel pre-tokenizer with its own pattern, merges written "a b"
  llama3  a Split pattern before ByteLevel, ignore_merges, special tokens, merges written ["a", "b"]
  odd     all the rest: Digits, a Split at a string, a space put in front, bytes without a token (unk), and
          added tokens that eat spaces or must stand alone
The cases file lists, for each, texts and their ids, and whether decoding gives the text back; and, under
"splits", the gpt2 tokenizer with other pre-tokenizers, which put a space in front of each piece, so that the
ids show where the text was cut.

kinds.json has a tokenizer of each other kind (see KINDS), with texts, their ids and what the ids decode to.
"""
import json
import pathlib
import random
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "data"))
import prepare_tokenizers  # noqa: E402
from check_tokenizers import random_text  # noqa: E402

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")

CORPUS = """
The quick brown fox jumps over the lazy dog. It's what they've always done, and we'll see if they're done.
Once upon a time there was a little girl who liked to read the same book again and again; she'd read it
in the morning, she'd read it at night, and when the book was lost she wasn't sad: "I'm sure," she said,
"that I know every word of it." In 1984 there were 12,345 copies; in 2024 there were 1,000,000.

def softmax(x):
    m = max(x)
    e = [exp(v - m) for v in x]
    return [v / sum(e) for v in e]

Attention heads mix: every head reads what other heads have written, and the mixture is learned.
Die Straße führt über die Brücke, naïve Café-Gäste grüßen. Ночь, улица, фонарь, аптека. 東京都は日本の首都です。
""".strip().splitlines(keepends=True)

TEXTS = [
    "", " ", "a", "\n", "\t", "\r\n", "  ", "   a", "a   ", "a   b", " \n \n", "a\n\n\nb", "\n\n  indented\n",
    "x \n y", "a \r\n\r\n b", "tab\tseparated\t\ttext", "trailing spaces   \n",
    "The quick brown fox jumps over the lazy dog.",
    "Hello, world! Hello again, hello wonderful world; wonderful.",
    "It's they've we'll I'm you're she'd don't 'tis 'S 'LL IT'S THEY'VE o'clock ''s",
    "I\u2019m not an ASCII apostrophe",
    "In 1984 there were 12345678 copies, 3.14159, 0xFF, 1e-8, ½ ² Ⅷ ٣٤٥ 100%",
    "def f(x):\n    return x ** 2  # squared\n\n\nclass A: pass\n",
    "!!! ??? ... --- ___ === <<>> {[()]} @#$%^&*~`|\\/",
    "naïve café, Straße, Ångström, cafe\u0301 (combining)",
    "Ночь, улица, фонарь, аптека. Ελληνικά עברית العربية हिन्दी ไทย 한국어",
    "東京都は日本の首都です。中文，标点！",
    "emoji: 🙂 👩‍👩‍👧‍👦 🇩🇪 👍🏽 done",
    "spaces: \u00a0 \u2003 \u3000 \u200b \u180e \u2028 \u0085 \x0b \x0c end",
    "controls: \x01\x02\x1b[0m \x7f",
    "ſ 's 'ſ K \u0130 ß ﬁ",
    "supplementary: 𝒜𝓫𝕔 𐍈 𠀀 \U0010fffd",
    "a" * 200, " " * 100 + "x", "ab" * 60 + "!" * 50, "\n" * 40, "aA1 " * 50,
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "well-known state-of-the-art - -- --- e-mail-",
    "<|endoftext|>", "one<|endoftext|>two", " <|endoftext|> <|endoftext|><|endoftext|>\n",
    "<|endoftext", "|endoftext|>", "<<|endoftext|>>", "<|endoftext|",
    "<|begin_of_text|>Hi there<|eot_id|><|end_of_text|>", "<|begin_of_text|><|begin_of_text|>",
    "<pad><pad>  <pad>", "a  <left>  b", "a  <right>  b", "<left>  <right>   <left>  x", "  <right>  <left>  ",
    "word words sword word, word", "word", "éword wordé _word word_", "long longer longest longe",
    "caf\u00e9<tag>caf\u00e9", "<tag><tag >",
]


SPLITS = [
    (Regex(r"\s+"), "isolated", False), (Regex(r"\s+"), "isolated", True), (Regex(r"\s+"), "removed", False),
    (Regex(r"\s+"), "removed", True), (Regex(r"\s+"), "contiguous", False),
    (Regex(r"\d"), "contiguous", False), (Regex(r"\d"), "contiguous", True),
    (Regex(r"[aeiou]"), "merged_with_previous", False), (Regex(r"[aeiou]"), "merged_with_previous", True),
    (Regex(r"[aeiou]"), "merged_with_next", False), (Regex(r"[aeiou]"), "merged_with_next", True),
    (".", "isolated", False), ("--", "merged_with_next", False),
    (Regex(r"(?=(\d{3})+(?!\d))"), "isolated", False),  # empty matches
    (Regex(r"o?"), "merged_with_previous", False), (Regex(r"^|$"), "isolated", False),
    (Regex(r"(?i:k|\p{Lu}+\p{Ll}*)"), "isolated", False), (Regex(r"(?<=e)r|.$"), "isolated", False),
]

SPLIT_TEXTS = [
    "One  2 three 4567", "aeb  ioux\n\n12.. 1234567", "Boo--hoo...K k \u212a ÀÉßé", "a\u180eb \u180e c\u1680\u0085d\u00a0",
    "over her\nether\r\n\n", "東e京1２٣ 🙂🙂", "e",
]


def save(tokenizer, name, edit=None):
    data = json.loads(tokenizer.to_str())
    if edit:
        edit(data)
    path = GOLDEN / f"tokenizer_{name}.json"
    path.write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    return Tokenizer.from_file(str(path))


def train(tokenizer, size, alphabet=(), special=()):
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=list(alphabet), special_tokens=list(special),
                                  show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)


def make_gpt2():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, 500, pre_tokenizers.ByteLevel.alphabet())
    tokenizer.add_special_tokens(["<|endoftext|>"])

    def as_strings(data):
        data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]

    return save(tokenizer, "gpt2", as_strings)


def make_llama3():
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, 480, pre_tokenizers.ByteLevel.alphabet())

    def add_words(data):  # tokens that no merge leads to: what ignore_merges is for
        vocab = data["model"]["vocab"]
        for word in ["Ġwonderful", "antidisestablishmentarianism", "Ġworld"]:
            vocab.setdefault(word, len(vocab))

    tokenizer = save(tokenizer, "llama3", add_words)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    return save(tokenizer, "llama3")


def make_odd():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Split("-", "merged_with_previous"),
        pre_tokenizers.Split(Regex(r"[,;]+"), "removed"),
        pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, 300, special=["<unk>"])
    tokenizer.add_tokens([
        AddedToken("word", single_word=True), "long", "longer", AddedToken("<tag>", normalized=True),
        AddedToken("<tag >", normalized=False)])
    tokenizer.add_special_tokens([
        "<pad>", AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True), "</s>"])
    return save(tokenizer, "odd")


def cases(tokenizer):
    result = []
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        exact = tokenizer.decode(ids, skip_special_tokens=False) == text
        result.append({"text": text, "ids": ids, "exact": exact})
    return result


def split_cases(tokenizer):
    result = []
    for pattern, behavior, invert in SPLITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(pattern, behavior, invert),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)])
        result.append({"pre_tokenizer": json.loads(tokenizer.to_str())["pre_tokenizer"],
                       "cases": [{"text": text, "ids": tokenizer.encode(text).ids} for text in SPLIT_TEXTS]})
    return result


# ------------------------------------------------------------------------------------------- other kinds


def byte_level(regexes=None, prefix=False):
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes or []]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(prefix, use_regex=not regexes)])


def fallback_decoder(strips):
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strips else []))


ALPHABET = pre_tokenizers.ByteLevel.alphabet()
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
PATTERN = lambda name: [regex] if isinstance(regex := prepare_tokenizers.NAMED[name][0], str) else regex
CLIP = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# name: model's options, normalizer, pre-tokenizer, decoder, what the vocabulary begins with, alphabet
KINDS = {
    "qwen2": ({}, normalizers.NFC(), byte_level(PATTERN("qwen2")), decoders.ByteLevel(), [], ALPHABET),
    "deepseek": ({}, None, byte_level(PATTERN("deepseek")), decoders.ByteLevel(), [], ALPHABET),
    "o200k": ({"ignore_merges": True}, None, byte_level(PATTERN("o200k")), decoders.ByteLevel(), [], ALPHABET),
    "tekken": ({}, None, byte_level(PATTERN("tekken")), decoders.ByteLevel(), ["<unk>", "<s>", "</s>"], ALPHABET),
    "claude": ({}, normalizers.NFKC(), byte_level(), decoders.ByteLevel(), [], ALPHABET),
    "nfd": ({}, normalizers.Sequence([normalizers.NFD(), normalizers.Strip(), normalizers.Lowercase()]), byte_level(prefix=True),
            None, [], ALPHABET),
    "nfkd": ({}, normalizers.Sequence([normalizers.NFKD(), normalizers.Replace(Regex(r"\s+"), " ")]), byte_level(),
             decoders.ByteLevel(), [], ALPHABET),
    "llama2": ({"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}, LLAMA, None, fallback_decoder(True),
               ["<unk>", "<s>", "</s>", *FALLBACK], ["▁"]),
    "gemma": ({"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}, normalizers.Replace(" ", "▁"),
              pre_tokenizers.Split(" ", "merged_with_previous"), fallback_decoder(False),
              ["<unk>", "<eos>", *FALLBACK], ["▁"]),
    "some_fallback": ({"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}, LLAMA, None, fallback_decoder(True),
                      ["<unk>", *FALLBACK[0xA0:0xE4]], ["▁"]),
    "metaspace_first": ({"unk_token": "<unk>"}, None, pre_tokenizers.Metaspace(prepend_scheme="first"),
                        decoders.Metaspace(prepend_scheme="first"), ["<unk>"], ["▁"]),
    "metaspace_always": ({"unk_token": "<unk>", "fuse_unk": True}, normalizers.NFKC(),
                         pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.Metaspace()]), decoders.Metaspace(),
                         ["<unk>"], ["▁"]),
    "metaspace_never": ({}, None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False),
                        decoders.Metaspace(prepend_scheme="never"), [], ["▁"]),
    "clip": ({"end_of_word_suffix": "</w>", "unk_token": "<unk>"},
             normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]),
             pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CLIP), "removed", True), pre_tokenizers.ByteLevel(False, use_regex=False)]),
             decoders.ByteLevel(), ["<unk>", *(character + "</w>" for character in sorted(ALPHABET))], ALPHABET),
    "gpt1": ({"end_of_word_suffix": "</w>", "unk_token": "<unk>"}, normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit(),
             decoders.BPEDecoder("</w>"), ["<unk>"], []),
    "whitespace": ({"unk_token": "<unk>", "dropout": 0.5}, normalizers.NFC(), pre_tokenizers.Whitespace(), None, ["<unk>"], []),
    "delimiter": ({"unk_token": "<unk>"}, None, pre_tokenizers.CharDelimiterSplit("e"),
                  decoders.Sequence([decoders.Strip("t", 1, 0), decoders.Replace(Regex("[aeiou]"), "*"),
                                     decoders.WordPiece("o", cleanup=True)]), ["<unk>"], []),
}


def make_kind(name):
    options, normalizer, pre_tokenizer, decoder, first, alphabet = KINDS[name]
    tokenizer = Tokenizer(models.BPE(**{key: value for key, value in options.items() if key != "dropout"}))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if decoder:
        tokenizer.decoder = decoder
    trainer = trainers.BpeTrainer(vocab_size=len(set(first) | set(alphabet)) + 200, initial_alphabet=list(alphabet),
                                  special_tokens=list(first), show_progress=False, max_token_length=16,
                                  **{key: value for key, value in options.items() if key == "end_of_word_suffix"})
    # In words, or a SentencePiece-like model has tokens of several.
    corpus = CORPUS if pre_tokenizer else [" " * (i > 0) + word for line in CORPUS for i, word in enumerate(line.split(" "))]
    tokenizer.train_from_iterator(corpus, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")
                            and not token["content"].endswith("</w>")]
    data["model"] |= options
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.add_tokens([AddedToken("Straße", normalized=True), AddedToken("<tag>", normalized=False), "quick fox"])
    tokenizer.add_special_tokens([AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True)])
    return json.loads(tokenizer.to_str())


KIND_TEXTS = [text for text in TEXTS if len(text) < 100] + [
    "  two  leading", "caf\u00e9 cafe\u0301 A\u030a \u212b \u1e9b\u0323 \ufb01 \u00bd \u2167 \uac00\u11a8 \u1100\u1161",
    "a\u0315\u0300\u05ae\u0300b \u0344 \u0958", "quick fox Straße STRASSE <tag>Straße<tag> <left> x <right> y", "<right> <left>",
    "\u0130stanbul \u1c89 \u10d50 \u03a3\u03a3", "▁a ▁ b▁", "it'\u017f (\u212a)", "<0x0A><0xZZ>", "e\u0301" * 40,
    "1e8f \U0001e08f\U0001e030 \U0002ebf0\u0897 \u180e x\u1c8a", "don't stop  believing!  ", "\u200b\u200d \u2028z",
]


def kind(name):
    data = make_kind(name)
    encoder = json.loads(json.dumps(data))
    encoder["model"]["dropout"] = None
    tokenizer = Tokenizer.from_str(json.dumps(encoder))
    rng = random.Random(name)
    size = tokenizer.get_vocab_size()
    texts = KIND_TEXTS + [text for text in (random_text(rng) for _ in range(25)) if "\0" not in text and len(text) < 60]
    rows = [(text, tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    rows += [(None, [rng.randrange(size) for _ in range(rng.randrange(1, 9))]) for _ in range(25)]
    cases = [{"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=False) if ids else ""}
             for text, ids in rows]
    cases = [case for case in cases if "\0" not in case["decoded"]]  # which cJSON takes for the end
    return {"name": name, "tokenizer": data, "cases": cases}


def main():
    made = {"gpt2": make_gpt2(), "llama3": make_llama3(), "odd": make_odd()}
    lines = ["{"]
    for name, tokenizer in made.items():
        rows = [json.dumps(case) for case in cases(tokenizer)]
        lines.append(f' "{name}": [\n  ' + ",\n  ".join(rows) + "\n ],")
    rows = [json.dumps(case) for case in split_cases(made["gpt2"])]
    lines.append(' "splits": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n")
    (GOLDEN / "tokenizer_cases.json").write_text("\n".join(lines))
    lines = [json.dumps(kind(name), ensure_ascii=False, separators=(",", ":")) for name in KINDS]
    (GOLDEN / "tokenizer_kinds.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    for name, tokenizer in made.items():
        print(name, tokenizer.get_vocab_size())


if __name__ == "__main__":
    main()
