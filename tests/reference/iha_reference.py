"""The whole model, written from the paper (Interleaved Head Attention, arXiv 2602.21371), as plainly as possible.

Explicit S x S masks, einsum, no cache, no fusion: this is what the C and CUDA code is compared against.
Written once over an array module `xp` (numpy, or jax.numpy where gradients are wanted); it computes in the
dtype of the parameters. Importing this file needs NumPy alone; `differentiable` needs JAX.

`config` is the dictionary of a checkpoint's config.json, `params` a flat dictionary {tensor name: array}.
Shapes: B batch, T tokens, C hidden, H heads, d head_dim, P pseudo-heads, S = T*P virtual tokens, F FFN, V vocabulary.
Where a sequence has segments, `segments` [B,T] is the index of the first token of each token's segment: attention
stays inside, and positions begin at 0 in each with `restart`. None: every sequence is one segment.
"Step n" in comments is the paper's layer: 1 project, 2 mix heads, 3 interleave, 4 RoPE, 5 attend, 6 collapse, 7 output.
"""
import math

import numpy as np

LAYER_TYPES = ("mha_global", "mha_local", "iha_global", "iha_local", "folded_global", "folded_local",
               "diff_global", "diff_local", "talking_global", "talking_local",
               "simplicial_global", "simplicial_local")

# Every [model] key as config.json has it: layer_types for layer_pattern, no init_*.
CONFIG_KEYS = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "max_position_embeddings", "position_embedding", "rope_theta", "rope_scaling", "rope_factor",
    "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_positions", "norm", "norm_eps", "qk_norm",
    "activation", "bias", "qkv_bias", "tie_word_embeddings", "causal", "layer_types", "local_window", "num_pseudo_heads",
    "iha_window", "iha_mask", "iha_rope", "iha_collapse", "alpha_on")


def kv_heads(config):
    """G, the heads of keys and values; each serves H/G consecutive heads of queries."""
    return config.get("num_key_value_heads", config["num_attention_heads"])


def expected_shapes(config):
    """{tensor name: shape} of exactly the tensors a model of this configuration has."""
    C, V, F = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    H, d, P = config["num_attention_heads"], config["head_dim"], config["num_pseudo_heads"]
    G = kv_heads(config)
    shapes = {}

    def norm(name):
        shapes[name + ".weight"] = (C,)
        if config["bias"] and config["norm"] == "layernorm":
            shapes[name + ".bias"] = (C,)

    def linear(name, rows, columns, bias):
        shapes[name + ".weight"] = (rows, columns)
        if bias:
            shapes[name + ".bias"] = (rows,)

    shapes["embed.weight"] = (V, C)
    if config["position_embedding"] == "learned":
        shapes["pos_embed.weight"] = (config["max_position_embeddings"], C)
    for n, kind in enumerate(config["layer_types"]):
        layer = f"layers.{n}."
        norm(layer + "attn_norm")
        extra = 2 * H if kind.startswith("simplicial") else 0
        linear(layer + "attn.qkv", (H + 2 * G + extra) * d, C, config["bias"] or config.get("qkv_bias", False))
        if config.get("qk_norm", "none") != "none":
            for which in "qk":
                shapes[f"{layer}attn.{which}_norm.weight"] = (d,)
        if kind.startswith("iha"):
            for which in config.get("alpha_on", "qkv"):
                shapes[f"{layer}attn.alpha_{which}"] = (P, H, H) if which == "q" else (P, G, G)
            shapes[layer + "attn.collapse"] = (H, P, H) if config["iha_collapse"] == "full" else (H, P)
        if kind.startswith("folded"):
            for which in config.get("alpha_on", "qkv"):
                shapes[f"{layer}attn.alpha_{which}"] = (H, H)
        if kind.startswith("talking"):
            shapes[layer + "attn.talk_logits"] = shapes[layer + "attn.talk_weights"] = (H, H)
        if kind.startswith("diff"):
            for which in ("q1", "k1", "q2", "k2"):
                shapes[f"{layer}attn.lambda_{which}"] = (d,)
            shapes[layer + "attn.diff_norm.weight"] = (2 * d,)
        linear(layer + "attn.out", C, H * d, config["bias"])
        norm(layer + "mlp_norm")
        linear(layer + "mlp.up", F, C, config["bias"])
        if config["activation"] == "swiglu":
            linear(layer + "mlp.gate", F, C, False)
        linear(layer + "mlp.down", C, F, config["bias"])
    norm("final_norm")
    if not config["tie_word_embeddings"]:
        linear("lm_head", V, C, False)
    return shapes


def constant(xp, x):
    """x without a gradient: for the shift in softmax, which cancels."""
    if xp is np:
        return x
    import jax
    return jax.lax.stop_gradient(x)


def linear(xp, params, name, x):
    y = xp.einsum("...c,rc->...r", x, params[name + ".weight"])
    return y + params[name + ".bias"] if name + ".bias" in params else y


def rms_norm(xp, config, x, weight):
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + config["norm_eps"]) * weight


def normalize(xp, config, params, name, x):
    """RMSNorm, or LayerNorm with the biased variance; eps inside the root."""
    if config["norm"] == "layernorm":
        x = x - xp.mean(x, axis=-1, keepdims=True)
    y = rms_norm(xp, config, x, params[name + ".weight"])
    return y + params[name + ".bias"] if name + ".bias" in params else y


def visible(config, kind, T, P, segments=None):
    """[S,S] bool: does virtual query s (row) see virtual key s' (column)? P = 1 in MHA layers. [B,S,S] in segments."""
    s, key = np.arange(T * P)[:, None], np.arange(T * P)[None, :]
    if not config["causal"]:
        see = np.ones((T * P, T * P), bool)
    elif kind.startswith("iha") and config["iha_mask"] == "token":
        see = key // P <= s // P
    else:
        see = key <= s
    if kind.endswith("local"):
        see &= s - key < config["iha_window" if kind == "iha_local" else "local_window"]
    if segments is not None:
        own = np.repeat(segments, P, axis=1)
        see = see & (own[:, :, None] == own[:, None, :])
    return see


def positions(T, segments, restart):
    """The position of each token: [T], or [B,T] where it depends on the segments."""
    return np.arange(T) - segments if segments is not None and restart else np.arange(T)


def rope(xp, config, x, position):
    """Rotate the pair (i, i + d/2) of x [B,S,H,d] by position[s] * theta^(-2i/d); position [S] or [B,S].

    rope_scaling = llama3 (Llama 3.1): frequencies of more than high_freq_factor periods in the original positions stay,
    those of fewer than low_freq_factor are divided by the factor, and between them the two are blended."""
    d = x.shape[-1]
    frequency = config["rope_theta"] ** (-2.0 * xp.arange(d // 2, dtype=x.dtype) / d)
    if config.get("rope_scaling", "none") == "llama3":
        low, high = config["rope_low_freq_factor"], config["rope_high_freq_factor"]
        periods = config["rope_original_positions"] * frequency / (2 * math.pi)
        share = xp.clip((periods - low) / (high - low), 0.0, 1.0)
        frequency = (1.0 - share) * frequency / config["rope_factor"] + share * frequency
    angle = xp.asarray(position, dtype=x.dtype)[..., None] * frequency             # [S, d/2] or [B, S, d/2]
    cos, sin = xp.cos(angle)[..., None, :], xp.sin(angle)[..., None, :]
    a, b = x[..., :d // 2], x[..., d // 2:]
    return xp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def softmax(xp, scores):
    e = xp.exp(scores - constant(xp, xp.max(scores, axis=-1, keepdims=True)))
    return e / xp.sum(e, axis=-1, keepdims=True)


def attend(xp, q, k, v, see):
    """Step 5: scaled dot-product attention, q [B,S,H,d], k, v [B,S,G,d], see [S,S] or [B,S,S]."""
    k, v = (xp.repeat(y, q.shape[2] // y.shape[2], axis=2) for y in (k, v))
    see = see[..., None, :, :]
    scores = xp.einsum("bshd,bzhd->bhsz", q, k) * (1.0 / math.sqrt(q.shape[-1]))
    return xp.einsum("bhsz,bzhd->bshd", softmax(xp, xp.where(see, scores, -math.inf)), v)


def attend_differential(xp, config, layer, params, name, q, k, v, see):
    """Ye et al. 2024: pair i is heads 2i and 2i + 1 of q and k, and one head of 2d of v; one map less lambda the other."""
    B, T, H, d = q.shape
    values = v.reshape(B, T, H // 2, 2 * d)
    maps = []
    for head in range(2):
        scores = xp.einsum("bshd,bzhd->bhsz", q[:, :, head::2], k[:, :, head::2]) / math.sqrt(d)
        maps.append(softmax(xp, xp.where(see[..., None, :, :], scores, -math.inf)))
    initial = 0.8 - 0.6 * math.exp(-0.3 * layer)
    q1, k1, q2, k2 = (params[f"{name}.lambda_{which}"] for which in ("q1", "k1", "q2", "k2"))
    factor = xp.exp(xp.sum(q1 * k1)) - xp.exp(xp.sum(q2 * k2)) + initial
    o = xp.einsum("bhsz,bzhd->bshd", maps[0] - factor * maps[1], values)
    o = o / xp.sqrt(xp.mean(o * o, axis=-1, keepdims=True) + config["norm_eps"])
    return ((1.0 - initial) * o * params[name + ".diff_norm.weight"]).reshape(B, T, H, d)


def attend_talking(xp, params, name, q, k, v, see):
    """Shazeer et al. 2020: logits of the heads are mixed before mask and softmax, weights after."""
    scores = xp.einsum("bshd,bzhd->bhsz", q, k) / math.sqrt(q.shape[-1])
    scores = xp.einsum("hk,bksz->bhsz", params[name + ".talk_logits"], scores)
    weights = softmax(xp, xp.where(see[..., None, :, :], scores, -math.inf))
    weights = xp.einsum("hk,bksz->bhsz", params[name + ".talk_weights"], weights)
    return xp.einsum("bhsz,bzhd->bshd", weights, v)


def attend_simplicial(xp, q, k, v, k2, v2, see):
    """2-simplicial attention, arXiv 2507.02754: one softmax over all pairs of visible keys, in [B,H,S,S,S]."""
    B, S, H, d = q.shape
    scores = xp.einsum("bshd,bjhd,bkhd->bhsjk", q, k, k2) / math.sqrt(d)
    both = (see[..., :, :, None] & see[..., :, None, :])[..., None, :, :, :]
    weights = softmax(xp, xp.where(both, scores, -math.inf).reshape(B, H, S, S * S)).reshape(B, H, S, S, S)
    return xp.einsum("bhsjk,bjhd,bkhd->bshd", weights, v, v2)


def attention(xp, config, kind, params, name, x, segments=None, restart=True):
    """Steps 1 to 7 for x [B,T,C], with qk_norm RMSNorm of each head of q and k between steps 1 and 2; an MHA layer is steps 1, 4, 5, 7 with P = 1; a folded one also mixes heads, step 2."""
    B, T, _ = x.shape
    H, G, d = config["num_attention_heads"], kv_heads(config), config["head_dim"]
    iha = kind.startswith("iha")
    P = config["num_pseudo_heads"] if iha else 1

    def alpha(which, shape):
        """The identity for every p where alpha_on leaves it out."""
        key = f"{name}.alpha_{which}"
        return params[key] if key in params else xp.broadcast_to(xp.eye(shape[-1], dtype=x.dtype), shape)

    # 1. q [B,T,H,d], k, v [B,T,G,d]: rows of W_qkv are q, then k, then v, each head-major
    qkv = linear(xp, params, name + ".qkv", x).reshape(B, T, -1, d)
    q, k, v = qkv[:, :, :H], qkv[:, :, H:H + G], qkv[:, :, H + G:H + 2 * G]
    if config.get("qk_norm", "none") != "none":
        q, k = (rms_norm(xp, config, y, params[f"{name}.{which}_norm.weight"]) for which, y in (("q", q), ("k", k)))
    if iha:
        # 2. q~[b,t,p,h,:] = sum_m alpha_q[p,h,m] q[b,t,m,:], and so for k, v, among their own heads
        q, k, v = (xp.einsum("phm,btmd->btphd", alpha(which, (P, y.shape[2], y.shape[2])), y)
                   for which, y in (("q", q), ("k", k), ("v", v)))
        # 3. virtual token s = t*P + p
        q, k, v = (y.reshape(B, T * P, -1, d) for y in (q, k, v))
    if kind.startswith("folded"):
        # 2. with P = 1, applied to the heads here, where the C code applies it to the weight
        q, k, v = (xp.einsum("hm,btmd->bthd", alpha(which, (H, H)), y)
                   for which, y in (("q", q), ("k", k), ("v", v)))
    if config["position_embedding"] == "rope" and not kind.startswith("simplicial"):
        # 4. at the virtual position s, or at the token's own, s // P
        position = np.repeat(positions(T, segments, restart), P, axis=-1)
        if iha and config["iha_rope"] == "virtual":
            position = position * P + np.arange(T * P) % P
        q, k = rope(xp, config, q, position), rope(xp, config, k, position)
    see = visible(config, kind, T, P, segments)
    if kind.startswith("talking"):
        o = attend_talking(xp, params, name, q, k, v, see)
    elif kind.startswith("simplicial"):
        o = attend_simplicial(xp, q, k, v, qkv[:, :, 3 * H:4 * H], qkv[:, :, 4 * H:], see)
    elif kind.startswith("diff"):
        o = attend_differential(xp, config, int(name.split(".")[1]), params, name, q, k, v, see)
    else:
        o = attend(xp, q, k, v, see)                                               # 5.
    if iha:
        # 6. full: o[b,t,h,:] = sum_p sum_g R[h,p,g] o~[b,t,p,g,:]; per head: sum_p R[h,p] o~[b,t,p,h,:]
        o = o.reshape(B, T, P, H, d)
        how = "hpg,btpgd->bthd" if config["iha_collapse"] == "full" else "hp,btphd->bthd"
        o = xp.einsum(how, params[name + ".collapse"], o)
    return linear(xp, params, name + ".out", o.reshape(B, T, H * d))               # 7.


def mlp(xp, config, params, name, x):
    h = linear(xp, params, name + ".up", x)
    if config["activation"] == "gelu_tanh":
        h = 0.5 * h * (1.0 + xp.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * h * h * h)))
    elif config["activation"] == "relu2":
        h = xp.maximum(h, 0.0) ** 2
    else:  # swiglu: silu(gate) * up
        gate = linear(xp, params, name + ".gate", x)
        h = gate / (1.0 + xp.exp(-gate)) * h
    return linear(xp, params, name + ".down", h)


def logits(xp, config, params, tokens, segments=None, restart=True):
    """tokens [B,T] -> logits [B,T,V]."""
    x = params["embed.weight"][tokens]
    if config["position_embedding"] == "learned":
        x = x + params["pos_embed.weight"][positions(tokens.shape[1], segments, restart)]
    for n, kind in enumerate(config["layer_types"]):
        layer = f"layers.{n}."
        h = normalize(xp, config, params, layer + "attn_norm", x)
        x = x + attention(xp, config, kind, params, layer + "attn", h, segments, restart)
        h = normalize(xp, config, params, layer + "mlp_norm", x)
        x = x + mlp(xp, config, params, layer + "mlp", h)
    x = normalize(xp, config, params, "final_norm", x)
    return linear(xp, params, "embed" if config["tie_word_embeddings"] else "lm_head", x)


def cross_entropy(xp, z, targets):
    """Mean over targets >= 0 of -log softmax(z)[target], in nats; negative targets do not count."""
    z = z - constant(xp, xp.max(z, axis=-1, keepdims=True))
    counted = targets >= 0
    chosen = xp.take_along_axis(z, xp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    nll = xp.log(xp.sum(xp.exp(z), axis=-1)) - chosen
    return xp.sum(xp.where(counted, nll, 0.0)) / int(counted.sum())


def differentiable(config, tokens, targets, dtype, segments=None, restart=True):
    """A function params -> (loss, logits [B,T,V], {name: gradient}): computed by JAX, wholly in dtype."""
    import jax
    import jax.numpy as jnp

    def loss_and_logits(params):
        z = logits(jnp, config, params, tokens, segments, restart)
        return cross_entropy(jnp, z, targets), z

    compiled = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))

    def run(params):
        # In float32, x64 is off, so nothing can be promoted; "highest" forbids anything below float32 in products.
        with jax.enable_x64(dtype == np.float64), jax.default_matmul_precision("highest"):
            (loss, z), grads = compiled({name: jnp.asarray(value, dtype=dtype) for name, value in params.items()})
            loss, z, grads = np.asarray(loss), np.asarray(z), {name: np.asarray(g) for name, g in grads.items()}
        assert all(a.dtype == dtype for a in (loss, z, *grads.values()))
        return loss, z, grads

    return run
