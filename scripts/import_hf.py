#!/usr/bin/env python3
"""Make a checkpoint of a model of Hugging Face Transformers (GPT-2, Llama, Mistral, Qwen2, Qwen3), or of llm.c's GPT-2 (a
.bin file).

The checkpoint computes the same function, in fp32. What it cannot represent is refused by name. Nothing is written unless
all of it can be.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

import import_tokenizer
from errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CODE = ROOT / "model" / "checkpoint" / "hf"
EXAMPLES = """\
examples:
  scripts/import_hf.py models/gpt2 runs/gpt2            # then: ./train_iha eval runs/gpt2 data.val='data/NAME/val_*.bin'
  scripts/import_hf.py gpt2_124M.bin runs/gpt2          # llm.c
"""
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "F64": np.dtype("<f8")}


def read_json(path):
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is not there") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


# ---- tensors ----

class Tensors:
    """Tensors of safetensors files by name, read when they are wanted, as fp32."""

    def __init__(self, folder):
        self.where, self.taken = {}, set()
        index = folder / "model.safetensors.index.json"
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise UserError(f"{index} has no weight_map")
            files = [folder / name for name in sorted(set(names.values()))]
        else:
            files = [folder / "model.safetensors"]
        for path in files:
            if not path.exists():
                other = next(iter(folder.glob("*.bin")), None)
                hint = f"; {other.name} is not read: save the model with safetensors" if other else ""
                raise UserError(f"{path} is not there{hint}")
            self.read_header(path)
        if index.exists() and (lacking := sorted(names.keys() - self.where.keys())):
            raise UserError(f"{index}: tensor {lacking[0]} is in none of the files")

    def read_header(self, path):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise UserError(f"{path} is damaged: it is no safetensors file")
            try:
                header = json.loads(file.read(length))
                entries = {name: (t["dtype"], tuple(t["shape"]), *t["data_offsets"]) for name, t in header.items()
                           if name != "__metadata__"}
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(f"{path} is damaged: its header cannot be read") from None
        for name, (dtype, shape, begin, end) in entries.items():
            if name in self.where:
                raise UserError(f"{path}: tensor {name} is there twice")
            if dtype not in DTYPES:
                raise UserError(f"{path}: tensor {name} is {dtype}; fp32, bf16 and fp16 are read")
            if not 0 <= begin <= end <= size - 8 - length or end - begin != DTYPES[dtype].itemsize * np.prod(shape, dtype=int):
                raise UserError(f"{path} is damaged: tensor {name} does not fit in it")
            self.where[name] = path, dtype, shape, 8 + length + begin

    def has(self, name):
        return name in self.where

    def take(self, name, *shape):
        if name not in self.where:
            raise UserError(f"tensor {name} is missing")
        path, dtype, found, offset = self.where[name]
        if found != shape:
            raise UserError(f"{path}: tensor {name} is {list(found)}, and config.json means {list(shape)}")
        self.taken.add(name)
        raw = np.memmap(path, DTYPES[dtype], "r", offset, shape) if np.prod(shape) else np.zeros(shape, DTYPES[dtype])
        x = (raw.astype("<u4") << 16).view("<f4") if dtype == "BF16" else np.asarray(raw, "<f4")
        if not np.isfinite(x).all():
            raise UserError(f"{path}: tensor {name} has values that are not finite")
        return x

    def check_all_taken(self, ignored):
        left = sorted(name for name in self.where if name not in self.taken and not name.endswith(ignored))
        if left:
            raise UserError(f"tensor {left[0]} has no place in this model" + (f", nor have {len(left) - 1} more" if left[1:] else ""))


# ---- configurations ----

class Config:
    """config.json; every key that is asked for has a type."""

    def __init__(self, values, where):
        self.values, self.where = values, where

    def get(self, name, kind, default=None):
        x = self.values.get(name)
        if x is None:
            x = default
        if kind is float and isinstance(x, int) and not isinstance(x, bool):
            x = float(x)
        if not isinstance(x, kind) or (isinstance(x, bool) and kind is not bool):
            raise UserError(f"{self.where}: {name} is {json.dumps(x)}; it must be " + {
                int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}[kind])
        if kind is int and x < 1:
            raise UserError(f"{self.where}: {name} is {x}; it must be 1 or more")
        return x

    def refuse_unless(self, name, allowed, default):
        """For what the model here has only in one way."""
        x = self.values.get(name)
        x = default if x is None else x
        if x not in allowed:
            raise UserError(f"{self.where}: {name} = {json.dumps(x)} is not supported; "
                            + " or ".join(json.dumps(value) for value in allowed) + " is")


def model_config(**keys):
    """A checkpoint's config.json; keys that nothing reads in a model of MHA layers have their defaults."""
    defaults = dict(num_key_value_heads=keys["num_attention_heads"], qk_norm="none", qkv_bias=False, rope_scaling="none",
                    rope_factor=8.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0, rope_original_positions=8192)
    return dict(model_type="iha") | defaults | keys | dict(causal=True, num_pseudo_heads=2, iha_window=2, iha_mask="flat",
                                                iha_rope="virtual", iha_collapse="full", alpha_on="qkv") | dict(
        architectures=["IhaForCausalLM"], dtype="float32",
        auto_map={"AutoConfig": "configuration_iha.IhaConfig", "AutoModelForCausalLM": "modeling_iha.IhaForCausalLM"})


def gpt2_config(c):
    C, T = c.get("n_embd", int, 768), c.get("n_positions", int, 1024)
    H = c.get("n_head", int, 12)
    if C % H:
        raise UserError(f"{c.where}: n_embd = {C} is not a multiple of n_head = {H}")
    c.refuse_unless("activation_function", ["gelu_new", "gelu_pytorch_tanh"], "gelu_new")
    c.refuse_unless("scale_attn_weights", [True], True)
    c.refuse_unless("scale_attn_by_inverse_layer_idx", [False], False)
    c.refuse_unless("add_cross_attention", [False], False)
    L = c.get("n_layer", int, 12)
    return model_config(
        vocab_size=c.get("vocab_size", int, 50257), hidden_size=C, num_hidden_layers=L, num_attention_heads=H,
        head_dim=C // H, intermediate_size=c.get("n_inner", int, 4 * C), max_position_embeddings=T,
        position_embedding="learned", rope_theta=10000.0, norm="layernorm",
        norm_eps=c.get("layer_norm_epsilon", float, 1e-5), activation="gelu_tanh", bias=True,
        tie_word_embeddings=c.get("tie_word_embeddings", bool, True), layer_types=["mha_global"] * L, local_window=512)


def gpt2_tensors(t, m):
    """Names and values of a checkpoint's tensors. GPT-2's matrices are [in, out]."""
    C, F, V = m["hidden_size"], m["intermediate_size"], m["vocab_size"]
    root = "transformer." if t.has("transformer.wte.weight") else ""
    yield "embed.weight", t.take(root + "wte.weight", V, C)
    yield "pos_embed.weight", t.take(root + "wpe.weight", m["max_position_embeddings"], C)
    parts = (("attn_norm", "ln_1", C, None), ("attn.qkv", "attn.c_attn", 3 * C, C), ("attn.out", "attn.c_proj", C, C),
             ("mlp_norm", "ln_2", C, None), ("mlp.up", "mlp.c_fc", F, C), ("mlp.down", "mlp.c_proj", C, F))
    for n in range(m["num_hidden_layers"]):
        for ours, theirs, out, into in parts:
            theirs, ours = f"{root}h.{n}.{theirs}", f"layers.{n}.{ours}"
            yield ours + ".weight", t.take(theirs + ".weight", into, out).T if into else t.take(theirs + ".weight", out)
            yield ours + ".bias", t.take(theirs + ".bias", out)
    yield "final_norm.weight", t.take(root + "ln_f.weight", C)
    yield "final_norm.bias", t.take(root + "ln_f.bias", C)
    if not m["tie_word_embeddings"]:
        yield "lm_head.weight", t.take("lm_head.weight", V, C)


def rope_keys(c):
    """Of configurations of Transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""
    found = {"rope_theta": c.values.get("rope_theta")}
    for name in ("rope_scaling", "rope_parameters"):
        more = c.values.get(name) or {}
        if not isinstance(more, dict):
            raise UserError(f"{c.where}: {name} is not an object")
        found |= {key: value for key, value in more.items() if value is not None}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{c.where}: RoPE scaled by {json.dumps(kind)} is not supported; llama3 is")
    found = Config(found, c.where)
    found.refuse_unless("partial_rotary_factor", [1, 1.0], 1)
    keys = dict(rope_theta=found.get("rope_theta", float, 10000.0))
    if kind == "llama3":
        keys |= dict(rope_scaling="llama3", rope_factor=found.get("factor", float),
                     rope_low_freq_factor=found.get("low_freq_factor", float),
                     rope_high_freq_factor=found.get("high_freq_factor", float),
                     rope_original_positions=found.get("original_max_position_embeddings", int))
        if not 0 < keys["rope_low_freq_factor"] < keys["rope_high_freq_factor"] or keys["rope_factor"] < 1:
            raise UserError(f"{c.where}: the factors of RoPE's llama3 scaling do not fit: factor is at least 1, and "
                            "low_freq_factor below high_freq_factor")
    return keys


def llama_layer_types(c, L):
    """layer_types and the window. Mistral's sliding_window is 4096 where it is missing, and none where it is null. Qwen's
    counts with use_sliding_window, for layers from max_window_layers on."""
    kind = c.values["model_type"]
    window, first = None, 0
    if kind == "mistral":
        window = c.values.get("sliding_window", 4096)
    elif kind.startswith("qwen") and c.get("use_sliding_window", bool, False):
        window, first = c.values.get("sliding_window", 4096), c.values.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise UserError(f"{c.where}: max_window_layers is {json.dumps(first)}; it must be a whole number")
    names = {"full_attention": "mha_global", "sliding_attention": "mha_local"}
    usual = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(L)]
    types = c.values.get("layer_types") or usual
    if not isinstance(types, list) or len(types) != L or not all(kind in names for kind in types):
        raise UserError(f"{c.where}: layer_types must name {L} layers, each full_attention or sliding_attention")
    if "sliding_attention" in types:
        window = c.get("sliding_window", int, 4096)
    return [names[kind] for kind in types], window or 512


def llama_config(c):
    kind = c.values["model_type"]
    C, H, L = c.get("hidden_size", int), c.get("num_attention_heads", int), c.get("num_hidden_layers", int)
    usual = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(kind, H)  # where it is missing; null is H
    G = c.get("num_key_value_heads", int, H if "num_key_value_heads" in c.values else usual)
    if H % G:
        raise UserError(f"{c.where}: num_key_value_heads = {G} does not divide num_attention_heads = {H}")
    c.refuse_unless("hidden_act", ["silu"], "silu")
    for name in ("mlp_bias", "use_qk_norm"):
        c.refuse_unless(name, [False], False)
    c.refuse_unless("partial_rotary_factor", [1, 1.0], 1)
    # Llama's and Qwen3's flag is of q, k, v and o; Qwen2 has a bias of q, k and v without one.
    bias = c.get("attention_bias", bool, False) if kind in ("llama", "qwen3") else False
    types, window = llama_layer_types(c, L)
    d = c.get("head_dim", int, 128 if kind == "qwen3" else C // H)
    if d % 2:
        raise UserError(f"{c.where}: heads of odd width {d} cannot be rotated")
    return model_config(
        vocab_size=c.get("vocab_size", int), hidden_size=C, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=G,
        head_dim=d, intermediate_size=c.get("intermediate_size", int),
        max_position_embeddings=c.get("max_position_embeddings", int), position_embedding="rope", **rope_keys(c), norm="rmsnorm",
        norm_eps=c.get("rms_norm_eps", float, 1e-6), qk_norm="rmsnorm" if kind == "qwen3" else "none", activation="swiglu",
        bias=bias, qkv_bias=kind == "qwen2", tie_word_embeddings=c.get("tie_word_embeddings", bool, False), layer_types=types,
        local_window=window)


def llama_tensors(t, m):
    C, F, V, d = m["hidden_size"], m["intermediate_size"], m["vocab_size"], m["head_dim"]
    width = {"q": m["num_attention_heads"] * d, "k": m["num_key_value_heads"] * d, "v": m["num_key_value_heads"] * d}
    yield "embed.weight", t.take("model.embed_tokens.weight", V, C)
    for n in range(m["num_hidden_layers"]):
        ours, theirs = f"layers.{n}.", f"model.layers.{n}."
        attention = theirs + "self_attn."
        yield ours + "attn_norm.weight", t.take(theirs + "input_layernorm.weight", C)
        yield ours + "attn.qkv.weight", np.concatenate([t.take(f"{attention}{x}_proj.weight", width[x], C) for x in "qkv"])
        if m["bias"] or m["qkv_bias"]:
            yield ours + "attn.qkv.bias", np.concatenate([t.take(f"{attention}{x}_proj.bias", width[x]) for x in "qkv"])
        if m["qk_norm"] == "rmsnorm":
            for x in "qk":
                yield f"{ours}attn.{x}_norm.weight", t.take(f"{attention}{x}_norm.weight", d)
        yield ours + "attn.out.weight", t.take(attention + "o_proj.weight", C, width["q"])
        if m["bias"]:  # ours is of the MLP too, where it adds nothing
            yield ours + "attn.out.bias", t.take(attention + "o_proj.bias", C)
            yield ours + "mlp.up.bias", np.zeros(F, "f")
            yield ours + "mlp.down.bias", np.zeros(C, "f")
        yield ours + "mlp_norm.weight", t.take(theirs + "post_attention_layernorm.weight", C)
        yield ours + "mlp.up.weight", t.take(theirs + "mlp.up_proj.weight", F, C)
        yield ours + "mlp.gate.weight", t.take(theirs + "mlp.gate_proj.weight", F, C)
        yield ours + "mlp.down.weight", t.take(theirs + "mlp.down_proj.weight", C, F)
    yield "final_norm.weight", t.take("model.norm.weight", C)
    if not m["tie_word_embeddings"]:
        yield "lm_head.weight", t.take("lm_head.weight", V, C)


ARCHITECTURES = {"gpt2": (gpt2_config, gpt2_tensors, (".attn.bias", ".attn.masked_bias", "lm_head.weight")),
                 **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"),
                                 (llama_config, llama_tensors, (".rotary_emb.inv_freq", "lm_head.weight")))}
LACKING = dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), "a mixture of experts")


# ---- llm.c ----

class LlmC:
    """llm.c's GPT-2: 256 int32, then all tensors, each of all layers, matrices as [out, in]."""

    def __init__(self, path):
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", 256) if size >= 1024 else np.zeros(256, "<i4")
        if header[0] != 20240326 or header[1] not in (3, 5):
            raise UserError(f"{path} is not a GPT-2 of llm.c (magic 20240326, version 3 or 5)")
        self.path, self.dtype = path, DTYPES["F32" if header[1] == 3 else "BF16"]
        T, V, L, H, C, padded = (int(x) for x in header[2:8])
        if min(T, V, L, H, C) < 1 or C % H or padded < V:
            raise UserError(f"{path}: its header is damaged")
        self.config = gpt2_config(Config(dict(n_positions=T, vocab_size=V, n_layer=L, n_head=H, n_embd=C), path))
        self.shapes = dict(embed=(padded, C), pos_embed=(T, C), ln1w=(L, C), ln1b=(L, C), qkvw=(L, 3 * C, C), qkvb=(L, 3 * C),
                           outw=(L, C, C), outb=(L, C), ln2w=(L, C), ln2b=(L, C), upw=(L, 4 * C, C), upb=(L, 4 * C),
                           downw=(L, C, 4 * C), downb=(L, C), lnfw=(C,), lnfb=(C,))
        if size != 1024 + self.dtype.itemsize * sum(int(np.prod(shape)) for shape in self.shapes.values()):
            raise UserError(f"{path} is damaged: its size is not that of its {L} layers of width {C}")

    def tensors(self):
        at, values = 1024, {}
        for name, shape in self.shapes.items():
            values[name] = np.memmap(self.path, self.dtype, "r", at, shape)
            at += self.dtype.itemsize * int(np.prod(shape))

        def take(name, layer=slice(None)):
            raw = values[name][layer]
            x = np.asarray(raw, "<f4") if self.dtype.itemsize == 4 else (raw.astype("<u4") << 16).view("<f4")
            if not np.isfinite(x).all():
                raise UserError(f"{self.path}: tensor {name} has values that are not finite")
            return x

        yield "embed.weight", take("embed", slice(self.config["vocab_size"]))
        yield "pos_embed.weight", take("pos_embed")
        parts = (("attn_norm", "ln1"), ("attn.qkv", "qkv"), ("attn.out", "out"), ("mlp_norm", "ln2"), ("mlp.up", "up"),
                 ("mlp.down", "down"))
        for n in range(self.config["num_hidden_layers"]):
            for ours, theirs in parts:
                yield f"layers.{n}.{ours}.weight", take(theirs + "w", n)
                yield f"layers.{n}.{ours}.bias", take(theirs + "b", n)
        yield "final_norm.weight", take("lnfw")
        yield "final_norm.bias", take("lnfb")


# ---- writing ----

def write_weights(path, tensors):
    """The header needs all shapes, so the values go to a second file first."""
    header, at, values = {"__metadata__": {"format": "pt"}}, 0, path.with_suffix(".values")
    with values.open("wb") as file:
        for name, x in tensors:
            x = np.ascontiguousarray(x, "<f4")
            header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
            file.write(x)
            at += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with path.open("wb") as file, values.open("rb") as source:
        file.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, file, 1 << 24)
    values.unlink()


def write_json(path, data):
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def largest_id(tokenizer, path):
    try:
        vocab = tokenizer["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]
        return max([*ids, *(token["id"] for token in tokenizer.get("added_tokens") or [])], default=-1)
    except (KeyError, TypeError):
        raise UserError(f"{path} is not a tokenizer.json") from None


def write_tokenizer(source, out, config, model_type):
    """tokenizer.json, copied or made of vocab.json and merges.txt; its configuration, which must run no code; and the chat
    template. Returns a remark where there is no tokenizer."""
    file, vocab = source / "tokenizer.json", source / "vocab.json"

    def read(name):
        return read_json(source / name) if (source / name).exists() else {}

    settings = read("tokenizer_config.json")
    if file.exists():
        highest = largest_id(read_json(file), file)
        shutil.copyfile(file, out / "tokenizer.json")
    else:
        kind = import_tokenizer.class_of(settings, model_type)
        if not kind or not vocab.exists():
            return f"warning: {file} is not there: the checkpoint has no tokenizer"
        file = vocab
        try:
            text, names = import_tokenizer.convert(source, settings, read("special_tokens_map.json"), read("added_tokens.json"),
                                                   kind)
        except ImportError:
            raise UserError(f"{vocab} needs Python's tokenizers package to be read: make deps") from None
        except import_tokenizer.Unsupported as error:
            raise UserError(f"{source}: {error}") from None
        (out / "tokenizer.json").write_text(text, encoding="utf-8")
        settings |= names
        highest = largest_id(json.loads(text), vocab)
    if highest >= config["vocab_size"]:
        raise UserError(f"{file} has id {highest}, and the model's vocab_size is {config['vocab_size']}")
    settings.pop("auto_map", None)
    write_json(out / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    template = source / "chat_template.jinja"
    if template.exists():
        shutil.copyfile(template, out / template.name)
    return None


def token_ids(source, config):
    """bos, eos and pad of generation_config.json, else of config.json. Old Llama models have -1 for no padding."""
    names, file = ("bos_token_id", "eos_token_id", "pad_token_id"), source / "generation_config.json"
    given = config | (read_json(file) if file.exists() else {})
    ids = {name: given[name] for name in names if given.get(name) is not None and (name, given[name]) != ("pad_token_id", -1)}
    for name, value in ids.items():
        for x in value if isinstance(value, list) else [value]:
            if type(x) is not int or not 0 <= x < config["vocab_size"]:
                raise UserError(f"{source}: {name} = {json.dumps(value)} is no id of a vocabulary of {config['vocab_size']}")
    return ids


def read_source(source):
    """The model_type, the checkpoint's configuration and token ids, its tensors one by one, and a check to be made after the
    last."""
    if source.is_file():
        model = LlmC(source)
        return "gpt2", model.config, {}, model.tensors(), lambda: None
    file = source / "config.json"
    values = read_json(file)
    kind = values.get("model_type")
    if kind not in ARCHITECTURES:
        why = f": it needs {LACKING[kind]}" if kind in LACKING else ""
        raise UserError(f"{file}: model_type {json.dumps(kind)} is not supported{why}; {', '.join(ARCHITECTURES)} are")
    read_config, name_tensors, ignored = ARCHITECTURES[kind]
    config, tensors = read_config(Config(values, file)), Tensors(source)
    ids = token_ids(source, values | {"vocab_size": config["vocab_size"]})
    return kind, config, ids, name_tensors(tensors, config), lambda: tensors.check_all_taken(ignored)


def import_model(source, out):
    if out.exists():
        raise UserError(f"{out} exists already")
    kind, config, ids, tensors, check = read_source(source)
    half = out.with_name(out.name + ".tmp")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        write_weights(half / "model.safetensors", tensors)
        check()
        remark = write_tokenizer(source, half, config, kind) if source.is_dir() else None
        write_json(half / "config.json", config | ids)
        write_json(half / "generation_config.json", ids)
        for path in CODE.glob("*.py"):
            shutil.copyfile(path, half / path.name)
        half.rename(out)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    if remark:
        print(remark, file=sys.stderr)
    print(f"{out}: {config['num_hidden_layers']} layers of width {config['hidden_size']}, vocabulary of {config['vocab_size']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder with config.json and safetensors files, or a .bin file of llm.c")
    parser.add_argument("out", type=Path, help="the checkpoint's folder, which must not exist")
    args = parser.parse_args()
    try:
        if not args.source.exists():
            raise UserError(f"{args.source} is not there")
        import_model(args.source, args.out)
    except UserError as error:
        print(f"import_hf.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"import_hf.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
