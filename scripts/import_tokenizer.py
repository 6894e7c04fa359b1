"""The tokenizer.json of a GPT-2 or Qwen tokenizer that is there as vocab.json and merges.txt, and perhaps added_tokens.json
and special_tokens_map.json, as Transformers 5 reads these."""

import json

END = "<|endoftext|>"
# tokenizer_class: the special tokens where nothing names others
CLASSES = {"GPT2Tokenizer": {"bos_token": END, "eos_token": END, "unk_token": END},
           "Qwen2Tokenizer": {"eos_token": END, "unk_token": END, "pad_token": END}}
OF_MODEL = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")


class Unsupported(Exception):
    """Files that make no tokenizer; one line."""


def class_of(settings, model_type):
    """A name in CLASSES; None for tokenizers of other kinds."""
    name = settings.get("tokenizer_class") or OF_MODEL.get(model_type, "")
    name = name.removesuffix("Fast") if isinstance(name, str) else ""
    return name if name in CLASSES else None


def content_of(token):
    """Of a token as text, or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise Unsupported(f"{json.dumps(token)} among the special tokens is not a token; correct tokenizer_config.json, "
                          "special_tokens_map.json or added_tokens.json")
    return text


def added_token(token, special):
    from tokenizers import AddedToken
    more = token if isinstance(token, dict) else {}
    flags = {name: bool(more[name]) for name in ("lstrip", "rstrip", "single_word", "normalized") if name in more}
    return AddedToken(content_of(token), special=special, **flags)


def added_tokens(settings, from_file, names, more):
    """[(id or None, AddedToken)]: those with an id in its order, then the named ones, then others that are special."""
    special = {content_of(token) for token in [*names.values(), *more]}
    decoder = settings.get("added_tokens_decoder")
    if decoder:
        if not isinstance(decoder, dict) or not all(i.isdecimal() and isinstance(token, dict) for i, token in decoder.items()):
            raise Unsupported("tokenizer_config.json: added_tokens_decoder does not name a token for each id")
        given = [(int(i), added_token(token, bool(token.get("special")) or content_of(token) in special))
                 for i, token in decoder.items()]
    else:
        if not all(type(i) is int for i in from_file.values()):
            raise Unsupported("added_tokens.json does not name an id for each token")
        given = [(i, added_token({"content": text, "normalized": text not in special}, text in special))
                 for text, i in from_file.items()]
    given.sort(key=lambda entry: entry[0])
    there = {token.content for _, token in given}
    for token in [*names.values(), *more]:
        if content_of(token) not in there:
            there.add(content_of(token))
            given.append((None, added_token(token, True)))
    return given


def convert(folder, settings, special_map, from_file, kind):
    """(the text of a tokenizer.json, the named special tokens). settings, special_map and from_file are tokenizer_config.json,
    special_tokens_map.json and added_tokens.json; kind is of CLASSES."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not merges.exists():
        raise Unsupported(f"{merges} is not there; vocab.json needs it")
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises no other class
        raise Unsupported(f"{vocab} and merges.txt are no tokenizer: {' '.join(str(error).split())}") from None
    tokenizer = Tokenizer(model)
    prefix = settings.get("add_prefix_space") is True
    if kind == "GPT2Tokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()

    # added_tokens_decoder is the newer of the two; without it Transformers takes the older file's tokens.
    named = settings if settings.get("added_tokens_decoder") else settings | special_map
    names = {name: named.get(name, CLASSES[kind].get(name)) for name in NAMES}
    names = {name: token for name, token in names.items() if token is not None}
    more = named.get("extra_special_tokens") or named.get("additional_special_tokens") or []
    more = list(more.values()) if isinstance(more, dict) else more if isinstance(more, list) else [more]
    for wanted, token in added_tokens(settings, from_file, names, more):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        found = tokenizer.token_to_id(token.content)
        if wanted is not None and found != wanted:
            raise Unsupported(f"{folder}: the added token {json.dumps(token.content)} has id {wanted}, and {found} is the next")
    tokens = {name: content_of(token) for name, token in names.items()}
    bos = tokens.get("bos_token") if settings.get("add_bos_token") is True else None
    eos = tokens.get("eos_token") if settings.get("add_eos_token") is True else None
    if bos or eos:
        ends = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([bos, eos]) if token]
        single = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
        pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    return tokenizer.to_str(), tokens
