"""Check the reference itself in float64: facts that can be proved about the layer; gradients against differences.

    pip install jax numpy
    python tests/reference/check_facts.py
"""
import os

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np

from iha_reference import attention, differentiable, logits, visible
from make_golden import CASES, random_params, random_tokens, relabel

T, H, P, D, C = 12, 4, 3, 8, 20
BASE = dict(num_attention_heads=H, head_dim=D, num_pseudo_heads=P, position_embedding="none", rope_theta=10000.0,
            causal=True, iha_mask="flat", iha_rope="virtual", iha_collapse="full", local_window=4, iha_window=4 * P)


def check(what, good):
    print("ok  " if good else "FAIL", what)
    if not good:
        raise SystemExit(1)


def random_layer(rng):
    return {"a.qkv.weight": rng.standard_normal((3 * H * D, C)) * 1.3 / np.sqrt(C),
            "a.out.weight": rng.standard_normal((C, H * D)) / np.sqrt(H * D)}


def lifted(layer, collapse):
    """The IHA layer made from an MHA layer: alpha = I, R selecting the last pseudo-head or averaging them."""
    R = np.zeros((H, P, H))
    for h in range(H):
        R[h, :, h] = 1 / P if collapse == "mean" else np.arange(P) == P - 1
    alpha = np.broadcast_to(np.eye(H), (P, H, H))
    return layer | {"a.alpha_q": alpha, "a.alpha_k": alpha, "a.alpha_v": alpha, "a.collapse": R}


def check_equivalence(rng):
    layer, x = random_layer(rng), rng.standard_normal((2, T, C))

    def same(collapse, kind="global", **options):
        config = BASE | options
        mha = attention(np, config, "mha_" + kind, layer, "a", x)
        iha = attention(np, config, "iha_" + kind, lifted(layer, collapse), "a", x)
        if config["iha_collapse"] == "full":
            R = np.einsum("hph->hp", lifted(layer, collapse)["a.collapse"])      # the diagonal is all there is
            per_head = attention(np, config | {"iha_collapse": "per_head"}, "iha_" + kind,
                                 lifted(layer, collapse) | {"a.collapse": R}, "a", x)
            assert np.allclose(per_head, iha, rtol=0, atol=1e-13)
        return np.abs(iha - mha).max() < 1e-13

    check("flat mask, alpha = I, R = last: MHA exactly", same("last"))
    check("flat mask, R = mean: not MHA", not same("mean"))
    check("token mask: MHA for R = last and for R = mean",
          same("last", iha_mask="token") and same("mean", iha_mask="token"))
    check("not causal: MHA for R = last and for R = mean", same("last", causal=False) and same("mean", causal=False))
    check("RoPE at the token's position keeps it",
          same("last", position_embedding="rope", iha_rope="token")
          and same("mean", position_embedding="rope", iha_rope="token", iha_mask="token"))
    check("RoPE at virtual positions breaks it, whatever the mask",
          not any(same(collapse, position_embedding="rope", iha_mask=mask)
                  for collapse in ("last", "mean") for mask in ("flat", "token")))
    check("a window of W*P keeps it for R = last, other windows do not",
          [W for W in range(3 * P, 6 * P) if same("last", "local", iha_window=W)] == [4 * P])
    check("in a window R = mean is never MHA, token mask or not: only the last pseudo-head sees whole tokens",
          not any(same("mean", "local", iha_mask=mask, iha_window=W)
                  for mask in ("flat", "token") for W in range(3 * P, 6 * P)))
    check("P = 1: alpha = I and R = I is MHA, RoPE included",
          np.allclose(attention(np, BASE | dict(num_pseudo_heads=1, position_embedding="rope"), "iha_global", layer |
                                {"a.alpha_q": np.eye(H)[None], "a.alpha_k": np.eye(H)[None],
                                 "a.alpha_v": np.eye(H)[None], "a.collapse": np.eye(H)[:, None]}, "a", x),
                      attention(np, BASE | dict(position_embedding="rope"), "mha_global", layer, "a", x),
                      rtol=0, atol=1e-13))


def check_masks():
    """visible() against a loop over the definition."""
    for P in (1, 2, 3):
        for window in range(1, 12):
            for mask in ("flat", "token"):
                config = BASE | dict(iha_mask=mask, iha_window=window, num_pseudo_heads=P)
                see = visible(config, "iha_local", 3, P)
                for s in range(3 * P):
                    for key in range(3 * P):
                        past = key <= s if mask == "flat" else key // P <= s // P
                        assert see[s, key] == (past and s - key < window)
    check("masks, entry by entry", True)


def check_strictness(rng):
    layer = random_layer(rng)
    mix = {"a.alpha_" + which: rng.standard_normal((2, H, H)) for which in "qkv"}
    mix["a.collapse"] = rng.standard_normal((H, 2, H))
    config = BASE | dict(num_pseudo_heads=2)
    a, b = rng.standard_normal((2, C))

    def additive(kind, params):
        def f(token):
            return attention(np, config, kind, params, "a", np.broadcast_to(token, (1, T, C)))
        return np.allclose(f(a) + f(b), f(a + b), rtol=0, atol=1e-12)

    check("all tokens equal: MHA is linear in the token, IHA with P = 2 is not",
          additive("mha_global", layer) and not additive("iha_global", layer | mix))


def check_cpm3():
    """App. B.3: H = P = 2, tokens 1 2 3 4, not causal, temperature -> 0: the heads hold all cyclic shifts."""
    H = P = 2
    N = H * P
    shift = np.roll(np.eye(N), 1, axis=1)                                          # Pi[i, i+1 mod N] = 1
    power = np.linalg.matrix_power
    x = np.concatenate([np.arange(1.0, N + 1)[:, None], np.eye(N)], axis=1)[None]  # [x, I]
    zero = np.zeros((1, N))
    Wq = [np.concatenate([zero, power(shift, m * H)]) for m in range(H)]           # [1+N, N]
    Wk = [np.concatenate([zero, power(shift, m).T]) for m in range(H)]
    Wv = [np.zeros((1 + N, N)) for _ in range(H)]
    for m in range(H):
        Wv[m][0, m] = H
    cold = 1e4
    alpha_q, alpha_kv = np.zeros((P, H, H)), np.zeros((P, H, H))
    R = np.zeros((H, P, H))
    for h in range(H):
        alpha_q[0, h, h] = 1
        R[h, 0, h] = 1
    for p in range(P):
        alpha_kv[p, :, p] = 1
    params = {"a.qkv.weight": np.concatenate([cold * np.hstack(Wq), np.hstack(Wk), np.hstack(Wv)], axis=1).T,
              "a.alpha_q": alpha_q, "a.alpha_k": alpha_kv, "a.alpha_v": alpha_kv, "a.collapse": R,
              "a.out.weight": np.eye(H * N)}
    config = BASE | dict(num_attention_heads=H, head_dim=N, num_pseudo_heads=P, causal=False)
    y = attention(np, config, "iha_global", params, "a", x)[0].reshape(N, H, N)[:, :, :P].reshape(N, H * P)
    check("CPM-3: rows are the cyclic shifts of 1 2 3 4",
          np.allclose(y, [[1, 2, 3, 4], [2, 3, 4, 1], [3, 4, 1, 2], [4, 1, 2, 3]], rtol=0, atol=1e-12))


def check_model(name, rng):
    """Gradients against central differences along a random direction per tensor; NumPy against JAX; symmetries."""
    config, T, segments, restart = (getattr(CASES[name], x) for x in ("config", "T", "segments", "restart"))
    params = {p: x.astype(np.float64) for p, x in random_params(config, rng).items()}
    tokens, targets = random_tokens(CASES[name], rng)
    run = differentiable(config, tokens, targets, np.float64, segments, restart)
    loss, z, grads = run(params)
    worst, step = 0.0, 1e-5
    for p, x in params.items():
        u = rng.standard_normal(x.shape)
        u /= np.linalg.norm(u)
        slope = (run(params | {p: x + step * u})[0] - run(params | {p: x - step * u})[0]) / (2 * step)
        worst = max(worst, abs(slope - np.vdot(grads[p], u)) / (np.linalg.norm(grads[p]) + 1e-6))
    check(f"{name}: gradients against differences ({worst:.1e})", worst < 1e-6)
    check(f"{name}: NumPy and JAX agree", np.allclose(logits(np, config, params, tokens, segments, restart), z,
                                                       rtol=0, atol=1e-12))

    order = {"C": rng.permutation(config["hidden_size"]), "F": rng.permutation(config["intermediate_size"]),
             "H": rng.permutation(config["num_attention_heads"])}
    loss2, z2, grads2 = run(relabel(config, params, order))
    check(f"{name}: numbering channels, units and heads differently changes nothing",
          abs(loss - loss2) < 1e-12 and np.allclose(z, z2, rtol=0, atol=1e-11)
          and all(np.allclose(g, grads2[p], rtol=0, atol=1e-11) for p, g in relabel(config, grads, order).items()))

    if config["causal"] and T > 1:
        other = tokens.copy()
        other[:, T // 2:] = (other[:, T // 2:] + 1) % config["vocab_size"]
        z3 = logits(np, config, params, other, segments, restart)
        check(f"{name}: the future is not seen", np.allclose(z3[:, :T // 2], z[:, :T // 2], rtol=0, atol=1e-12)
              and not np.allclose(z3[:, T // 2:], z[:, T // 2:]))


def check_segments(name, rng):
    """Each segment, its positions restarted, against the same tokens as a sequence."""
    case = CASES[name]
    params = {p: x.astype(np.float64) for p, x in random_params(case.config, rng).items()}
    tokens, _ = random_tokens(case, rng)
    z = logits(np, case.config, params, tokens, case.segments)
    for b in range(case.B):
        for first in set(case.segments[b]):
            inside = case.segments[b] == first
            alone = logits(np, case.config, params, tokens[b:b + 1, inside])
            assert np.allclose(alone[0], z[b, inside], rtol=0, atol=1e-12)
    check(f"{name}: segments have the logits that they have alone", not np.allclose(
        z, logits(np, case.config, params, tokens), rtol=0, atol=1e-3))


if __name__ == "__main__":
    rng = np.random.default_rng(1)
    check_masks()
    check_equivalence(rng)
    check_strictness(rng)
    check_cpm3()
    for name in ("iha_mixed", "iha_flat_token_perhead", "iha_bidirectional", "iha_window_ragged_token",
                 "iha_one_token", "segments_iha_virtual", "segments_bidirectional"):
        check_model(name, rng)
    for name in (name for name in CASES if CASES[name].segments is not None):
        check_segments(name, rng)
