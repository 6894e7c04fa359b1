"""Write tests/golden/model_*.safetensors and .json: small models, their loss, logits and every gradient in float64.

    pip install jax numpy safetensors
    python tests/reference/make_golden.py            # rewrites all; the same machine gives the same bytes

A case holds `param.NAME` (F32), `tokens`, `targets` (I32 [B,T]; targets < 0 do not count), `loss` (F64 [1]),
`logits` (F64 [B,T,V]), `grad.NAME` (F64); where it has segments, `segments` (I32 [B,T], the index of the first token
of each token's segment) and `restart_positions` (I32 [1]). For the tolerance rule, how far the same plain computation
in float32 lands from these: `plain32.loss` (absolute error), `plain32.logits`, `plain32.grad.NAME` (L2 norms of the error), F64 [1],
each the largest of a few runs that sum in different orders. Where a gradient is exactly zero (alpha_q and alpha_k
where every query sees one key) so is its plain32, and a test needs a floor: the rounding of all gradients, say.
The .json beside it is the config.json of such a checkpoint.
"""
import os
import zlib

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"   # one order of summation on any core count
os.environ["JAX_PLATFORMS"] = "cpu"

import json
from collections import namedtuple
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from iha_reference import differentiable, expected_shapes

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
LABELLINGS = 8
Case = namedtuple("Case", "config B T ignored segments restart")


def case(C, H, d, F, V, B, T, layers, **options):
    """The config of a case, its options at the contract's defaults unless given, and its batch.

    ignored: some targets do not count. segments: for each sequence, the lengths of its segments. restart: positions
    begin at 0 in each.
    """
    config = dict(
        model_type="iha", vocab_size=V, hidden_size=C, num_hidden_layers=len(layers.split()), num_attention_heads=H,
        num_key_value_heads=options.pop("num_key_value_heads", H), head_dim=d, intermediate_size=F, max_position_embeddings=T, position_embedding="rope", rope_theta=10000.0,
        rope_scaling="none", rope_factor=8.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0,
        rope_original_positions=8192, norm="rmsnorm", norm_eps=1e-5, qk_norm="none", activation="gelu_tanh", bias=False,
        qkv_bias=False, tie_word_embeddings=True, causal=True,
        layer_types=layers.split(), local_window=512, num_pseudo_heads=2, iha_window=None, iha_mask="flat",
        iha_rope="virtual", iha_collapse="full", alpha_on="qkv")
    ignored, lengths = options.pop("ignored", False), options.pop("segments", None)
    restart = options.pop("restart", True)
    segments = None
    if lengths:
        assert len(lengths) == B and all(sum(of_sequence) == T for of_sequence in lengths)
        segments = np.array([np.repeat(np.cumsum((0,) + n[:-1]), n) for n in lengths], dtype=np.int32)
    unknown = options.keys() - config.keys()
    assert not unknown, unknown
    config.update(options)
    if config["iha_window"] is None:   # auto, as the contract resolves it
        P = config["num_pseudo_heads"]
        config["iha_window"] = max(P, P * (T // (2 * P * P)))
    return Case(config, B, T, ignored, segments, restart)


CASES = {
    # MHA alone: the two familiar models
    "mha_gpt2": case(24, 3, 8, 40, 37, 2, 13, "mha_global mha_global", position_embedding="learned",
                     max_position_embeddings=16, norm="layernorm", bias=True),
    "mha_llama": case(20, 1, 20, 28, 41, 1, 17, "mha_local mha_global", local_window=5, activation="swiglu",
                      tie_word_embeddings=False),
    # the paper's schedule, window auto (8 virtual tokens)
    "iha_paper": case(16, 2, 8, 32, 61, 1, 37, "iha_local iha_local iha_local iha_local mha_global",
                      rope_theta=500000.0),
    # IHA, global: masks, RoPE rules and collapses against each other; P > H, H*d != C
    "iha_flat_virtual_full": case(16, 2, 8, 24, 31, 3, 7, "iha_global iha_global", num_pseudo_heads=3),
    "iha_flat_token_perhead": case(20, 3, 8, 24, 43, 2, 11, "iha_global iha_global", num_pseudo_heads=3,
                                   iha_rope="token", iha_collapse="per_head", norm="layernorm", activation="relu2"),
    "iha_token_virtual_perhead": case(18, 4, 6, 20, 30, 2, 9, "iha_global", iha_mask="token", iha_collapse="per_head",
                                      max_position_embeddings=32, norm_eps=1e-2, activation="swiglu", bias=True),
    "iha_token_token_full": case(16, 2, 8, 24, 33, 1, 19, "iha_global mha_global", num_pseudo_heads=4,
                                 iha_mask="token", iha_rope="token", tie_word_embeddings=False),
    # windows: not a multiple of P, one, larger than S
    "iha_window_ragged": case(24, 4, 4, 32, 47, 2, 23, "iha_local mha_local", num_pseudo_heads=3, iha_window=7,
                              local_window=4),
    "iha_window_ragged_token": case(20, 2, 20, 16, 35, 1, 21, "iha_local iha_local", num_pseudo_heads=3, iha_window=5,
                                    iha_mask="token", iha_rope="token", iha_collapse="per_head"),
    "iha_window_below_p": case(16, 3, 4, 20, 31, 2, 10, "iha_local", num_pseudo_heads=4, iha_window=2,
                               position_embedding="learned"),
    "iha_window_one": case(16, 2, 8, 24, 31, 2, 6, "iha_local mha_local", iha_window=1, local_window=1),
    "iha_window_one_token": case(16, 2, 8, 24, 31, 2, 6, "iha_local", num_pseudo_heads=3, iha_window=1,
                                 iha_mask="token", position_embedding="none"),
    "iha_window_wide": case(16, 4, 4, 24, 39, 2, 11, "mha_local iha_local", iha_window=1000, local_window=64,
                            norm="layernorm", bias=True, activation="relu2"),
    # edges: one token, one pseudo-head, one head
    "iha_one_token": case(16, 2, 8, 24, 31, 1, 1, "iha_global mha_global", num_pseudo_heads=4),
    "iha_p1": case(32, 4, 8, 24, 53, 2, 14, "iha_local iha_global", num_pseudo_heads=1, iha_window=6,
                   activation="relu2"),
    "iha_h1": case(20, 1, 20, 20, 31, 2, 8, "iha_global iha_local", num_pseudo_heads=3, iha_window=10,
                   position_embedding="none", activation="swiglu"),
    # not causal, as in the synthetic tasks, with padding ignored; iha_mask then changes nothing
    "iha_bidirectional": case(16, 4, 4, 32, 30, 3, 12, "iha_global mha_global", causal=False, num_pseudo_heads=4,
                              position_embedding="learned", max_position_embeddings=20, norm="layernorm", bias=True,
                              ignored=True),
    "iha_bidirectional_rope": case(16, 2, 8, 24, 31, 2, 7, "mha_global iha_global", causal=False, num_pseudo_heads=3,
                                   iha_mask="token", iha_collapse="per_head", tie_word_embeddings=False),
    # everything at once, all four layer types in an odd order
    "iha_mixed": case(40, 2, 8, 24, 37, 3, 15, "mha_local iha_global mha_global iha_local iha_global",
                      num_pseudo_heads=3, iha_window=11, local_window=3, norm="layernorm", bias=True,
                      activation="swiglu", tie_word_embeddings=False, ignored=True),
    # grouped-query attention: heads of keys and values for two and for all heads of queries, mixed among themselves
    "gqa": case(20, 4, 6, 24, 31, 2, 11, "mha_global iha_local mha_local iha_global", num_key_value_heads=2,
                num_pseudo_heads=3, iha_window=10, local_window=4, qkv_bias=True),
    "gqa_one": case(16, 3, 8, 24, 33, 3, 9, "iha_global mha_local", num_key_value_heads=1, iha_mask="token",
                    iha_rope="token", iha_collapse="per_head", position_embedding="learned", norm="layernorm", bias=True,
                    local_window=4, activation="swiglu", segments=((9,), (4, 5), (1, 2, 6))),
    "qk_norm": case(20, 4, 6, 24, 31, 2, 11, "mha_global iha_local iha_global", num_key_value_heads=2, qk_norm="rmsnorm",
                    norm_eps=1e-2, iha_window=7, iha_mask="token", tie_word_embeddings=False),
    # scaled RoPE, whose frequencies are kept, blended twice, and divided; a bias of qkv alone, as Qwen2 has
    "rope_llama3": case(20, 2, 8, 24, 31, 2, 19, "mha_global iha_local", rope_theta=100.0, rope_scaling="llama3",
                        rope_original_positions=64, iha_window=9, qkv_bias=True),
    # heads mixed in the weight of qkv: with RoPE and without, bias, windows, segments
    "folded_rope": case(16, 4, 4, 24, 31, 2, 11, "folded_global folded_local", local_window=4),
    "folded_bias": case(20, 3, 8, 24, 33, 3, 9, "folded_local mha_global folded_global", local_window=5, bias=True,
                        norm="layernorm", position_embedding="learned", ignored=True),
    "folded_segments": case(16, 2, 8, 24, 31, 2, 12, "folded_global iha_local", bias=True, causal=True,
                            segments=((5, 7), (3, 3, 6)), activation="swiglu"),
    # differential layers: one pair of heads and several, RoPE and without, bias, windows, segments, not causal
    "diff_rope": case(16, 4, 6, 24, 31, 2, 11, "diff_global diff_local", local_window=4, rope_theta=100.0),
    "diff_bias": case(20, 6, 4, 24, 33, 3, 9, "diff_local mha_global diff_global", local_window=5, bias=True,
                      norm="layernorm", position_embedding="learned", ignored=True),
    "diff_segments": case(16, 2, 8, 24, 31, 2, 12, "diff_global iha_local", norm_eps=1e-2,
                          segments=((5, 7), (3, 3, 6)), activation="swiglu"),
    "diff_bidirectional": case(16, 4, 4, 32, 30, 2, 10, "diff_global", causal=False, position_embedding="none"),
    # heads that talk: RoPE, windows, segments, bias
    "talking": case(20, 3, 6, 24, 31, 2, 13, "talking_local talking_global", local_window=5, rope_theta=100.0,
                    segments=((13,), (4, 9))),
    # pairs of keys: windows, not RoPE, segments, bias
    "simplicial": case(16, 2, 5, 24, 31, 2, 9, "simplicial_local simplicial_global mha_global", local_window=4,
                       bias=True, position_embedding="learned", segments=((9,), (3, 6))),
    # alphas of two of q, k and v, or of one
    "alpha_on_qk": case(16, 2, 8, 24, 31, 2, 9, "iha_local folded_global", iha_window=7, alpha_on="qk"),
    "alpha_on_v": case(16, 2, 8, 24, 31, 2, 9, "iha_global folded_global", num_pseudo_heads=3, alpha_on="v"),
    # segments: of one token, of the whole sequence; every kind of position, restarted or not; labels that do not count
    "segments_mha_learned": case(24, 3, 8, 40, 37, 2, 13, "mha_global mha_local", position_embedding="learned",
                                 local_window=4, norm="layernorm", bias=True, segments=((5, 1, 7), (13,))),
    "segments_iha_virtual": case(16, 2, 8, 24, 31, 2, 12, "iha_local iha_global", num_pseudo_heads=3, iha_window=7,
                                 segments=((6, 6), (1, 1, 10)), rope_theta=100.0),
    "segments_iha_token": case(18, 4, 6, 20, 30, 2, 11, "iha_global iha_local", iha_mask="token", iha_rope="token",
                               iha_window=5, iha_collapse="per_head", rope_theta=100.0, activation="swiglu",
                               segments=((4, 7), (9, 2))),
    "segments_continue": case(16, 2, 8, 24, 31, 2, 12, "iha_local mha_global", num_pseudo_heads=3, iha_window=8,
                              position_embedding="learned", max_position_embeddings=16, activation="relu2",
                              segments=((5, 7), (3, 3, 6)), restart=False),
    "segments_continue_rope": case(16, 2, 8, 24, 31, 1, 14, "mha_local iha_global", local_window=5, rope_theta=100.0,
                                   tie_word_embeddings=False, segments=((8, 2, 4),), restart=False),
    "segments_bidirectional": case(16, 4, 4, 32, 30, 3, 12, "iha_global mha_global", causal=False, num_pseudo_heads=2,
                                   segments=((4, 8), (1, 5, 6), (12,)), ignored=True),
    "segments_mixed": case(40, 2, 8, 24, 37, 3, 15, "mha_local iha_global mha_global iha_local", num_pseudo_heads=3,
                           iha_window=11, local_window=3, norm="layernorm", bias=True, activation="swiglu",
                           tie_word_embeddings=False, rope_theta=100.0, segments=((7, 8), (2, 4, 9), (14, 1)),
                           ignored=True),
}


def random_params(config, rng):
    """Every tensor away from its initial value, sized so that attention logits are of order 1 to 3."""
    H, P = config["num_attention_heads"], config["num_pseudo_heads"]
    params = {}
    for name, shape in expected_shapes(config).items():
        x = rng.standard_normal(shape)
        if name.endswith(".bias"):
            x *= 0.3
        elif "norm" in name:
            x = 1.0 + 0.3 * x
        elif "alpha" in name:
            x /= np.sqrt(shape[-1])
        elif "lambda" in name:
            x *= 0.5 / np.sqrt(shape[0])
        elif "talk" in name:
            x = 0.5 * np.eye(H) + x / np.sqrt(H)
        elif "collapse" in name:
            x /= np.sqrt(P * H if len(shape) == 3 else P)
        elif "embed" in name:
            x *= 0.5
        elif "qkv" in name:
            x *= 1.3 / np.sqrt(shape[1])
        else:
            x /= np.sqrt(shape[1])
        params[name] = x.astype(np.float32)
    return params


def random_tokens(case, rng):
    config, B, T = case.config, case.B, case.T
    tokens = rng.integers(0, config["vocab_size"], (B, T), dtype=np.int32)
    targets = rng.integers(0, config["vocab_size"], (B, T), dtype=np.int32)
    if case.ignored:                  # right padding, holes, and one sequence that counts for nothing
        targets[0, T // 2:] = -1
        targets[1, ::3] = -100
        targets[2, :] = -1
    return tokens, targets


def relabel(config, tensors, order):
    """The same model with channels, FFN units and heads numbered in another order {"C", "F", "H", "G": permutation}.

    Exact in real numbers; in float32 every sum is taken in another order.
    """
    H, G, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    axes = {"lambda_q1": "d", "lambda_k1": "d", "lambda_q2": "d", "lambda_k2": "d", "diff_norm": "d", "talk_logits": "HH", "talk_weights": "HH", "q_norm": "d",
            "k_norm": "d", "embed": "VC", "pos_embed": "TC", "lm_head": "VC", "qkv": "QC", "out": "CO", "up": "FC",
            "gate": "FC", "down": "CF", "alpha_q": "PHH", "alpha_k": "PGG", "alpha_v": "PGG",
            "collapse": "HPH" if config["iha_collapse"] == "full" else "HP"}
    rows = np.arange(5 * H * d).reshape(5 * H, d)
    heads = np.concatenate([order["H"], H + order["G"], H + G + order["G"],
                            3 * H + order["H"], 4 * H + order["H"]])   # the last two in simplicial layers
    order = order | {"O": rows[order["H"]].ravel()}
    out = {}
    for name, x in tensors.items():
        parts = name.split(".")
        module = parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]
        labels = "HH" if module.startswith("alpha") and x.ndim == 2 else axes.get(module, "C")
        for axis, label in enumerate(labels[:x.ndim]):                     # a bias has the rows' axis; a norm is [C]
            if label == "Q":                                               # with heads of k', v' or without
                x = np.take(x, rows[heads[:x.shape[axis] // d]].ravel(), axis=axis)
            elif label in order:
                x = np.take(x, order[label], axis=axis)
        out[name] = x
    return out


def make(name):
    config, segments, restart = CASES[name].config, CASES[name].segments, CASES[name].restart
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    params = random_params(config, rng)
    tokens, targets = random_tokens(CASES[name], rng)
    loss, z, grads = differentiable(config, tokens, targets, np.float64, segments, restart)(params)

    # One float32 run does not measure the error well: that of one scalar, or of a common factor of one gradient, is
    # sometimes small by chance. So it runs under several labellings, and the largest error of each tensor is kept.
    plain = differentiable(config, tokens, targets, np.float32, segments, restart)
    plain32 = {}
    for run in range(LABELLINGS):
        order = {"C": np.arange(config["hidden_size"]), "F": np.arange(config["intermediate_size"]),
                 "G": np.arange(config["num_key_value_heads"])}
        if run > 0:
            order = {label: rng.permutation(old) for label, old in order.items()}
            if any(kind.startswith("diff") for kind in config["layer_types"]):   # pairs of heads stay pairs
                order["G"] = (2 * rng.permutation(len(order["G"]) // 2)[:, None] + np.arange(2)).ravel()
        order["H"] = order["G"]
        group = config["num_attention_heads"] // config["num_key_value_heads"]
        if group > 1:   # heads of queries stay with theirs of keys
            order["H"] = np.concatenate([g * group + (rng.permutation(group) if run else np.arange(group)) for g in order["G"]])
        exact = {"loss": loss, "logits": z} | {"grad." + p: g for p, g in relabel(config, grads, order).items()}
        loss32, z32, grads32 = plain(relabel(config, params, order))
        got = {"loss": loss32, "logits": z32} | {"grad." + p: g for p, g in grads32.items()}
        for key in exact:
            error = np.linalg.norm((got[key].astype(np.float64) - exact[key]).ravel())
            plain32[key] = max(plain32.get(key, 0.0), error)

    tensors = {"tokens": tokens, "targets": targets, "loss": loss.reshape(1), "logits": z}
    if segments is not None:
        tensors |= {"segments": segments, "restart_positions": np.array([restart], dtype=np.int32)}
    tensors |= {"param." + p: value for p, value in params.items()} | {"grad." + p: g for p, g in grads.items()}
    tensors |= {"plain32." + key: np.array([error]) for key, error in plain32.items()}
    assert all(np.isfinite(t).all() for t in tensors.values())

    (GOLDEN / f"model_{name}.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (GOLDEN / f"model_{name}.json").write_text(json.dumps(config, indent=2) + "\n")
    worst = max((tensors["plain32.grad." + p][0] / np.linalg.norm(g), p) for p, g in grads.items() if g.any())
    print(f"{name:26s} {len(params):3d} tensors  loss {loss:.4f}  plain32: loss {tensors['plain32.loss'][0]:.1e}  "
          f"logits {tensors['plain32.logits'][0] / np.linalg.norm(z):.1e}  worst gradient {worst[0]:.1e} ({worst[1]})")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in CASES:
        make(name)
