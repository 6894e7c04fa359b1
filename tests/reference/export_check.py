"""Check a checkpoint of the trainer from outside: config.json and model.safetensors, read by the safetensors package.

    pip install numpy safetensors
    python tests/reference/export_check.py CHECKPOINT_DIR [--numpy-loss TOKENS.bin SEQ_LEN COUNT]

Names and shapes must be exactly the configuration's, every tensor float32 and finite, the metadata {"format": "pt"}.
With --numpy-loss the last line is "val_loss <nats, 7 decimals> <tokens>": the mean over the first COUNT sequences of
an llm.c shard, computed in float64, to hold against `train_iha eval`. Exit code 0: all is well; 1: it is not, and why.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

from iha_reference import CONFIG_KEYS, LAYER_TYPES, cross_entropy, expected_shapes, logits

CHOICES = {
    "model_type": ("iha",), "position_embedding": ("rope", "learned", "none"), "norm": ("rmsnorm", "layernorm"),
    "activation": ("gelu_tanh", "relu2", "swiglu"), "iha_mask": ("flat", "token"), "iha_rope": ("virtual", "token"),
    "iha_collapse": ("full", "per_head"), "rope_scaling": ("none", "llama3"), "qk_norm": ("none", "rmsnorm"),
    "alpha_on": ("qkv", "qk", "v"), "bias": (True, False), "qkv_bias": (True, False), "tie_word_embeddings": (True, False),
    "causal": (True, False)}


def config_problems(config):
    """What is wrong with config.json, as a list of lines."""
    problems = [f"config.json: {key} is missing" for key in CONFIG_KEYS if key not in config]
    problems += [f"config.json: {key} does not belong there" for key in config
                 if key == "layer_pattern" or key.startswith("init_")]
    if problems:
        return problems
    for key in CONFIG_KEYS:
        value = config[key]
        if key in CHOICES:
            good = any(value is c if isinstance(c, bool) else value == c for c in CHOICES[key])
        elif key == "layer_types":
            good = isinstance(value, list) and all(kind in LAYER_TYPES for kind in value) \
                and len(value) == config["num_hidden_layers"]
        elif key in ("rope_theta", "norm_eps", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor"):
            good = type(value) in (int, float) and value > 0
        else:
            good = type(value) is int and value > 0
        if not good:
            problems.append(f"config.json: {key} is {value!r}")
    return problems


def load(path):
    """(metadata, {name: array}) of a safetensors file."""
    with safe_open(path, framework="numpy") as f:
        return f.metadata(), {name: f.get_tensor(name) for name in f.keys()}


def tensor_problems(config, metadata, tensors):
    """What is wrong with model.safetensors, as a list of lines."""
    expected = expected_shapes(config)
    problems = [] if metadata == {"format": "pt"} else [f"metadata is {metadata}"]
    problems += [f"{name} is missing" for name in expected if name not in tensors]
    for name, x in tensors.items():
        if name not in expected:
            problems.append(f"{name} {list(x.shape)} is not this configuration's")
        elif x.shape != expected[name]:
            problems.append(f"{name} is {list(x.shape)}, not {list(expected[name])}")
        if x.dtype != np.float32:
            problems.append(f"{name} is {x.dtype}, not float32")
        elif not np.isfinite(x).all():
            problems.append(f"{name} has {(~np.isfinite(x)).sum()} values that are not finite")
    return ["model.safetensors: " + p for p in problems]


def read_shard(path):
    """The tokens of an llm.c shard: 256 int32 (magic, version, token count), then uint16 or uint32."""
    raw = Path(path).read_bytes()
    if len(raw) < 1024:
        sys.exit(f"{path}: shorter than a shard's header")
    magic, version, count = np.frombuffer(raw, "<i4", 3)
    dtype = {(20240520, 1): "<u2", (20240801, 7): "<u4"}.get((int(magic), int(version)))
    if dtype is None or len(raw) != 1024 + count * np.dtype(dtype).itemsize:
        sys.exit(f"{path}: magic {magic}, version {version}, {count} tokens in {len(raw)} bytes is not a shard")
    return np.frombuffer(raw, dtype, offset=1024).astype(np.int64)


def shard_loss(config, params, tokens, seq_len, count):
    """(mean loss in nats, tokens) of sequences [i*T, (i+1)*T), i < count, targets shifted by one; one at a time."""
    if not 0 < count <= (len(tokens) - 1) // seq_len:
        sys.exit(f"the shard holds {(len(tokens) - 1) // seq_len} sequences of {seq_len}, not {count}")
    if tokens[:count * seq_len + 1].max() >= config["vocab_size"]:
        sys.exit("the shard has token ids outside the vocabulary")
    params = {name: x.astype(np.float64) for name, x in params.items()}
    total = 0.0
    for i in range(count):
        window = tokens[i * seq_len:(i + 1) * seq_len + 1]
        total += cross_entropy(np, logits(np, config, params, window[None, :-1]), window[None, 1:])
    return total / count, count * seq_len


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--numpy-loss", nargs=3, metavar=("TOKENS.bin", "SEQ_LEN", "COUNT"))
    args = parser.parse_args()

    config = json.loads((args.checkpoint / "config.json").read_text())
    problems = config_problems(config)
    if not problems:
        metadata, tensors = load(args.checkpoint / "model.safetensors")
        problems = tensor_problems(config, metadata, tensors)
    if problems:
        sys.exit("\n".join(problems))
    count = sum(x.size for x in tensors.values())
    print(f"{args.checkpoint}: {len(tensors)} tensors, {count} parameters, as expected")

    if args.numpy_loss:
        shard, seq_len, count = args.numpy_loss
        loss, n = shard_loss(config, tensors, read_shard(shard), int(seq_len), int(count))
        print(f"val_loss {loss:.7f} {n}")


if __name__ == "__main__":
    main()
