"""IHA models (Interleaved Head Attention, arXiv 2602.21371) for Hugging Face Transformers.

train_iha writes this file into every checkpoint; with trust_remote_code=True, AutoModelForCausalLM computes with it what
train_iha computes. Tensors have the names and shapes of model.safetensors.

B batch, T tokens, C hidden_size, H heads, G of keys and values, d head_dim, P pseudo-heads, S = T*P virtual tokens. An
MHA layer is an IHA layer with P = 1 and without mixing. A cache holds a token's P virtual tokens side by side, as one
token of P*d numbers a head: so its lengths are tokens, and every cache of Transformers works, static ones and those of
sliding windows included.
"""

import dataclasses
import functools
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from .configuration_iha import IhaConfig

# The field of outputs that holds the cache was called past_key_values before.
CACHE_FIELD = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)} & {"cache"} or {"past_key_values"}


class IhaRMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def make_norm(config):
    if config.norm == "layernorm":
        return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)
    return IhaRMSNorm(config.hidden_size, config.norm_eps)


class IhaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, width = config.hidden_size, config.intermediate_size
        self.activation = config.activation
        self.up = nn.Linear(C, width, bias=config.bias)
        if self.activation == "swiglu":
            self.gate = nn.Linear(C, width, bias=False)
        self.down = nn.Linear(width, C, bias=config.bias)
        self.down.adds_to_stream = True

    def forward(self, x):
        h = self.up(x)
        if self.activation == "swiglu":
            h = F.silu(self.gate(x)) * h
        elif self.activation == "relu2":
            h = F.relu(h).square()
        else:
            h = F.gelu(h, approximate="tanh")
        return self.down(h)


def rope_frequencies(config, device, dtype):
    """[d/2] radians a token. llama3: low ones are divided by a factor, as in Llama 3.1."""
    power = torch.arange(config.head_dim // 2, device=device, dtype=dtype) * (-2 / config.head_dim)
    frequency = config.rope_theta**power
    if config.iha_rope_scaling == "none":
        return frequency
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    periods = config.rope_original_positions * frequency / (2 * math.pi)
    share = ((periods - low) / (high - low)).clamp(0, 1)
    return (1 - share) * frequency / config.rope_factor + share * frequency


def rope_tables(config, kind, positions, dtype):
    """cos, sin [B or 1, 1, S, d/2] of the virtual tokens of tokens at `positions` [B or 1, T]; None without RoPE."""
    if config.position_embedding != "rope":
        return None
    pseudo, device = config.pseudo_heads(kind), positions.device
    # Angles of far positions need more than fp32.
    wide = torch.float32 if device.type == "mps" else torch.float64
    positions = positions.to(wide)[..., None].expand(-1, -1, pseudo)
    if config.iha_rope == "virtual":
        positions = positions * pseudo + torch.arange(pseudo, device=device, dtype=wide)
    angle = positions.flatten(1)[:, None, :, None] * rope_frequencies(config, device, wide)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, tables):
    """Rotate the pairs (i, i + d/2) of x [B,H,S,d]."""
    cos, sin = tables
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def eager_attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class IhaAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.kind = config.iha_layer_types[layer_idx]
        self.pseudo = config.pseudo_heads(self.kind)
        self.is_causal = config.causal
        H, G, d, P = config.num_attention_heads, config.num_key_value_heads, config.head_dim, self.pseudo
        self.num_key_value_groups = H // G
        self.extra = 2 * H if self.kind.startswith("simplicial") else 0  # heads of k' and v'
        self.qkv = nn.Linear(config.hidden_size, (H + 2 * G + self.extra) * d, bias=config.bias or config.qkv_bias)
        if config.qk_norm == "rmsnorm":
            self.q_norm = IhaRMSNorm(d, config.norm_eps)
            self.k_norm = IhaRMSNorm(d, config.norm_eps)
        if self.kind.startswith("folded"):
            for which in config.alpha_on:
                setattr(self, f"alpha_{which}", nn.Parameter(torch.empty(H, H)))
        elif self.kind.startswith("iha"):
            for which in config.alpha_on:
                size = H if which == "q" else G
                setattr(self, f"alpha_{which}", nn.Parameter(torch.empty(P, size, size)))
            self.collapse = nn.Parameter(torch.empty((H, P, H) if config.iha_collapse == "full" else (H, P)))
        elif self.kind.startswith("talking"):
            self.talk_logits, self.talk_weights = nn.Parameter(torch.empty(H, H)), nn.Parameter(torch.empty(H, H))
        elif self.kind.startswith("diff"):
            self.lambda_q1, self.lambda_k1 = nn.Parameter(torch.empty(d)), nn.Parameter(torch.empty(d))
            self.lambda_q2, self.lambda_k2 = nn.Parameter(torch.empty(d)), nn.Parameter(torch.empty(d))
            self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer_idx)
            self.diff_norm = IhaRMSNorm(2 * d, config.norm_eps)
        self.out = nn.Linear(H * d, config.hidden_size, bias=config.bias)
        self.out.adds_to_stream = True

    def pseudo_heads(self, x, alpha):
        """[B,T,H,d] -> [B,H,S,d]: sum_m alpha[p,h,m] x[b,t,m], interleaved as virtual token t*P + p."""
        if alpha is None:  # the identity for every p, or nothing is mixed
            return x.transpose(1, 2).repeat_interleave(self.pseudo, dim=2)
        if alpha.ndim == 2:  # of a folded layer, where train_iha applies it to the weight of qkv
            return torch.einsum("hm,btmd->bhtd", alpha, x)
        return torch.einsum("phm,btmd->bhtpd", alpha, x).flatten(2, 3)

    def update_cache(self, cache, key, value):
        """What the cache returns, as virtual tokens again."""
        B, H, S, d = key.shape  # d of a simplicial layer: 2d
        tokens = (B, H, S // self.pseudo, self.pseudo * d)
        key, value = cache.update(key.reshape(tokens), value.reshape(tokens), self.layer_idx)
        return key.reshape(B, H, -1, d), value.reshape(B, H, -1, d)

    def attend_talking(self, query, key, value, mask, scaling=None, **kwargs):
        """Heads are mixed before mask and softmax, and after."""
        scores = torch.einsum("hk,bkst->bhst", self.talk_logits, query @ key.transpose(2, 3) * scaling)
        scores = scores.masked_fill(~mask, float("-inf"))
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
        weights = torch.einsum("hk,bkst->bhst", self.talk_weights, weights)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    def attend_simplicial(self, query, key, value, mask, scaling=None, **kwargs):
        """One softmax over the pairs of keys that a query sees; keys are k and k' side by side, values v and v'. The
        weights are those of each first key, summed over the second."""
        (first, second), (v, w) = key.chunk(2, dim=-1), value.chunk(2, dim=-1)
        scores = torch.einsum("bhsd,bhjd,bhkd->bhsjk", query, first, second) * scaling
        scores = scores.masked_fill(~(mask[..., :, None] & mask[..., None, :]), float("-inf")).flatten(-2)
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
        weights = weights.unflatten(-1, (v.shape[2], v.shape[2]))
        return torch.einsum("bhsjk,bhjd,bhkd->bshd", weights, v, w), weights.sum(-1)

    def attend_differential(self, attend, query, key, value, mask, **kwargs):
        """Heads 2i and 2i + 1 attend to the same values, of 2d; [B,T,H/2,2d] is the one's less lambda times the other's,
        normalized. The weights are those of all heads, [B,H,T,T]."""
        values = torch.cat((value[:, 0::2], value[:, 1::2]), dim=-1)
        maps = [attend(self, query[:, i::2], key[:, i::2], values, mask, **kwargs) for i in range(2)]
        weights = None
        if maps[0][1] is not None:
            weights = torch.stack([of_map for _, of_map in maps], dim=2).flatten(1, 2)
        first, second = torch.dot(self.lambda_q1, self.lambda_k1), torch.dot(self.lambda_q2, self.lambda_k2)
        factor = torch.exp(first) - torch.exp(second) + self.lambda_init
        return (1 - self.lambda_init) * self.diff_norm(maps[0][0] - factor * maps[1][0]), weights

    def forward(self, x, rope, mask, cache=None, **kwargs):
        B, T, _ = x.shape
        H, G, d = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        iha = self.kind.startswith("iha")
        query, key, value, others = self.qkv(x).view(B, T, -1, d).split([H, G, G, self.extra], 2)
        if self.config.qk_norm == "rmsnorm":
            query, key = self.q_norm(query), self.k_norm(key)
        query = self.pseudo_heads(query, getattr(self, "alpha_q", None))
        key = self.pseudo_heads(key, getattr(self, "alpha_k", None))
        value = self.pseudo_heads(value, getattr(self, "alpha_v", None))
        if self.extra:
            others = others.transpose(1, 2).chunk(2, dim=1)
            key, value = (torch.cat(pair, dim=-1) for pair in zip((key, value), others))
        elif rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        if cache is not None:
            key, value = self.update_cache(cache, key, value)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if self.kind.startswith("diff"):
            attend = functools.partial(self.attend_differential, attend)
        elif self.kind.startswith("talking"):
            attend = self.attend_talking
        elif self.kind.startswith("simplicial"):
            attend = self.attend_simplicial
        else:
            attend = functools.partial(attend, self)
        o, weights = attend(
            query,
            key,
            value,
            mask,
            dropout=0.0,
            scaling=d**-0.5,
            sliding_window=self.config.window(self.kind) or None,
            **kwargs,
        )
        if iha:
            how = "hpg,btpgd->bthd" if self.collapse.ndim == 3 else "hp,btphd->bthd"
            o = torch.einsum(how, self.collapse, o.reshape(B, T, self.pseudo, H, d))
        return self.out(o.reshape(B, T, H * d)), weights


class IhaLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attn_norm = make_norm(config)
        self.attn = IhaAttention(config, layer_idx)
        self.mlp_norm = make_norm(config)
        self.mlp = IhaMLP(config)

    def forward(self, x, rope, mask, cache=None, **kwargs):
        o, weights = self.attn(self.attn_norm(x), rope, mask, cache, **kwargs)
        x = x + o
        return x + self.mlp(self.mlp_norm(x)), weights


def make_mask(config, kind, queries, keys, attention_mask):
    """Which keys a query sees: bool [B or 1, 1, Sq, Sk], or None where attention that is causal over the virtual tokens
    (or not at all, with causal = false) is the same.

    queries [Tq], keys [Tk]: indices of tokens in the sequence. attention_mask: None; [B, tokens], 0 where a token is
    padding; [B,1,Tq,tokens], whether a token sees another one, bool or added to scores.
    """
    P, window, device = config.pseudo_heads(kind), config.window(kind), queries.device
    explicit = config._attn_implementation == "eager" or kind.startswith(("talking", "simplicial"))
    pseudo = torch.arange(P, device=device)
    query, key = ((tokens[:, None] * P + pseudo).flatten() for tokens in (queries, keys))
    query, key = query[:, None], key[None, :]
    same_token = query // P == key // P
    if not config.causal:
        see = torch.ones_like(same_token)
    elif config.iha_mask == "token" and P > 1:
        see, explicit = (key <= query) | same_token, True
    else:
        # A mask that depends on the values of indices cannot be left out while these are traced.
        see = key <= query
        explicit = explicit or len(queries) != len(keys)
    if window:
        explicit = explicit or query.shape[0] > window or len(queries) != len(keys)
        see = see & (query - key < window)
    see = see[None, None]
    if attention_mask is None:
        return see if explicit else None
    if attention_mask.ndim == 4:
        allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
        allowed = at_tokens(allowed, keys).repeat_interleave(P, dim=2)
    else:
        allowed = at_tokens(attention_mask != 0, keys)[:, None, None, :]
    # Tokens of padding see at least themselves, so that no row is empty.
    return see & (allowed.repeat_interleave(P, dim=3) | same_token)


def at_tokens(allowed, keys):
    """Columns `keys` of `allowed`, whose last axis is tokens; false beyond its end."""
    tokens = allowed.shape[-1]
    return allowed[..., keys.clamp(max=tokens - 1)] & (keys < tokens)


class IhaPreTrainedModel(PreTrainedModel):
    config_class = IhaConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["IhaLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        """As train_iha initialises a model."""
        if isinstance(module, IhaAttention) and module.kind.startswith("folded"):
            for alpha in (getattr(module, f"alpha_{which}") for which in self.config.alpha_on):
                init.copy_(alpha, torch.eye(self.config.num_attention_heads))
        elif isinstance(module, IhaAttention) and module.kind.startswith("iha"):
            P, H = module.pseudo, self.config.num_attention_heads
            for alpha in (getattr(module, f"alpha_{which}") for which in self.config.alpha_on):
                init.copy_(alpha, torch.eye(alpha.shape[-1]).expand_as(alpha))
            last = (torch.arange(P) == P - 1).float().expand(H, P)
            full = last[:, :, None] * torch.eye(H)[:, None, :]
            init.copy_(module.collapse, full if module.collapse.ndim == 3 else last)
        elif isinstance(module, IhaAttention) and module.kind.startswith("talking"):
            for matrix in (module.talk_logits, module.talk_weights):
                init.copy_(matrix, torch.eye(self.config.num_attention_heads))
        elif isinstance(module, IhaAttention) and module.kind.startswith("diff"):
            for vector in (module.lambda_q1, module.lambda_k1, module.lambda_q2, module.lambda_k2):
                init.normal_(vector, std=0.1)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            halves = 2 * self.config.num_hidden_layers if getattr(module, "adds_to_stream", False) else 1
            init.normal_(module.weight, std=0.02 / halves**0.5)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, IhaRMSNorm)):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)


class IhaForCausalLM(IhaPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "embed.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding == "learned":
            self.pos_embed = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([IhaLayer(config, i) for i in range(config.num_hidden_layers)])
        self.final_norm = make_norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kwargs):
        """generate() would make masks of tokens for static caches; forward makes its own, of virtual tokens."""
        return attention_mask

    def prepare_inputs_for_generation(self, *args, inputs_embeds=None, **kwargs):
        if not self.config.causal:
            raise ValueError("this model is not causal (causal = false in config.json): it cannot generate")
        return super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)

    def _indices(self, kind, tokens, past, cache, device):
        """Indices of the queries' tokens, and of the keys' that the cache will return."""
        queries = torch.arange(tokens, device=device) + past
        if cache is None:
            return queries, queries
        layer = self.config.iha_layer_types.index(kind)
        count, first = cache.get_mask_sizes(tokens, layer)
        return queries, torch.arange(count, device=device) + first

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        logits_to_keep=0,
        past_key_values=None,
        return_dict=None,
        **kwargs,
    ):
        """attention_mask [B, tokens so far], 0 for padding, or [B,1,T,tokens so far], whether a token sees another one.

        position_ids [B,T]: by default they count the tokens that are not padding.
        """
        config = self.config
        cache = past_key_values if cache is None else cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and not config.causal:
            raise ValueError("use_cache: this model is not causal, so that keys and values of a token are not final")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")

        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        T, device = x.shape[1], x.device
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
            else:
                position_ids = (torch.arange(T, device=device) + past)[None]
        if config.position_embedding == "learned":
            x = x + self.pos_embed(position_ids)

        ropes, masks = {}, {}
        for kind in dict.fromkeys(config.iha_layer_types):
            queries, keys = self._indices(kind, T, past, cache, device)
            ropes[kind] = rope_tables(config, kind, position_ids, x.dtype)
            masks[kind] = make_mask(config, kind, queries, keys, attention_mask)
        hidden_states, attentions = (x,), ()
        for layer, kind in zip(self.layers, config.iha_layer_types):
            x, weights = layer(x, ropes[kind], masks[kind], cache=cache, **kwargs)
            if output_hidden_states:
                hidden_states += (x,)
            if output_attentions:
                attentions += (weights,)
        x = self.final_norm(x)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=hidden_states[:-1] + (x,) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
            **{field: cache if use_cache else None for field in CACHE_FIELD},
        )
        return output if return_dict else output.to_tuple()


__all__ = ["IhaForCausalLM", "IhaPreTrainedModel"]
