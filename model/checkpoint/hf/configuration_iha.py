"""The configuration of an IHA model (Interleaved Head Attention) for Hugging Face Transformers.

train_iha writes this file and modeling_iha.py into every checkpoint. All keys are its own, with its names and values;
their meaning: docs/configuration.md.
"""

from transformers import PreTrainedConfig

LAYER_TYPES = (
    "mha_global", "mha_local", "iha_global", "iha_local", "folded_global", "folded_local", "diff_global", "diff_local",
    "talking_global", "talking_local", "simplicial_global", "simplicial_local",
)
CHOICES = {
    "position_embedding": ("rope", "learned", "none"),
    "iha_rope_scaling": ("none", "llama3"),
    "qk_norm": ("none", "rmsnorm"),
    "norm": ("rmsnorm", "layernorm"),
    "activation": ("gelu_tanh", "relu2", "swiglu"),
    "iha_mask": ("flat", "token"),
    "iha_rope": ("virtual", "token"),
    "iha_collapse": ("full", "per_head"),
    "alpha_on": ("qkv", "qk", "v"),
}


class IhaConfig(PreTrainedConfig):
    """`layer_types` in config.json has train_iha's names. Transformers allows only its own there, and its caches read
    that attribute: so `iha_layer_types` holds ours, `layer_types` what the caches understand."""

    model_type = "iha"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    def __init__(
        self,
        vocab_size=257,
        hidden_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=None,
        head_dim=None,
        intermediate_size=None,
        max_position_embeddings=1024,
        position_embedding="rope",
        rope_theta=10000.0,
        rope_scaling="none",
        rope_factor=8.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_original_positions=8192,
        norm="rmsnorm",
        norm_eps=1e-5,
        qk_norm="none",
        activation="gelu_tanh",
        bias=False,
        qkv_bias=False,
        tie_word_embeddings=True,
        causal=True,
        layer_types=None,
        local_window=512,
        num_pseudo_heads=2,
        iha_window=None,
        iha_mask="flat",
        iha_rope="virtual",
        iha_collapse="full",
        alpha_on="qkv",
        use_cache=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.max_position_embeddings = max_position_embeddings
        self.position_embedding = position_embedding
        self.rope_theta = rope_theta
        self.iha_rope_scaling = rope_scaling  # Transformers gives `rope_scaling` a meaning of its own
        self.rope_factor = rope_factor
        self.rope_low_freq_factor = rope_low_freq_factor
        self.rope_high_freq_factor = rope_high_freq_factor
        self.rope_original_positions = rope_original_positions
        self.norm = norm
        self.norm_eps = norm_eps
        self.qk_norm = qk_norm
        self.activation = activation
        self.bias = bias
        self.qkv_bias = qkv_bias
        self.tie_word_embeddings = tie_word_embeddings
        self.causal = causal
        self.local_window = local_window
        self.num_pseudo_heads = num_pseudo_heads
        # As train_iha resolves `auto`: the paper's window for sequences of the longest length, in virtual tokens.
        tokens = max_position_embeddings // (2 * num_pseudo_heads**2)
        self.iha_window = iha_window or num_pseudo_heads * max(1, tokens)
        self.iha_mask = iha_mask
        self.iha_rope = iha_rope
        self.iha_collapse = iha_collapse
        self.alpha_on = alpha_on
        self.use_cache = use_cache and causal
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id

        pattern = ["iha_local"] * 4 + ["mha_global"]
        self.iha_layer_types = list(layer_types or (pattern[i % 5] for i in range(num_hidden_layers)))
        self._check()
        local = [kind.endswith("_local") for kind in self.iha_layer_types]
        self.layer_types = ["sliding_attention" if is_local else "full_attention" for is_local in local]
        # What a cache keeps of local layers, in tokens: it takes one number for all of them, and no 1.
        windows = [self.window_tokens(kind) for kind in self.iha_layer_types if kind.endswith("_local")]
        self.sliding_window = max([2, *windows]) if windows else None
        super().__init__(**kwargs)

    def _check(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                shown = "rope_scaling" if name == "iha_rope_scaling" else name
                raise ValueError(f"{shown} is {getattr(self, name)!r}; this file knows {', '.join(choices)}")
        for kind in self.iha_layer_types:
            if kind not in LAYER_TYPES:
                raise ValueError(f"layer_types names {kind!r}; this file knows {', '.join(LAYER_TYPES)}")
        if len(self.iha_layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.iha_layer_types)} layers, num_hidden_layers is {self.num_hidden_layers}"
            )
        if self.num_attention_heads % 2 and any(kind.startswith("diff") for kind in self.iha_layer_types):
            raise ValueError(f"num_attention_heads = {self.num_attention_heads} is odd; differential layers have pairs")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        if not self.causal and any(kind.endswith("_local") for kind in self.iha_layer_types):
            raise ValueError("local layers need causal = true")

    def pseudo_heads(self, kind):
        """Virtual tokens of a token in a layer of this type."""
        return self.num_pseudo_heads if kind.startswith("iha") else 1

    def window(self, kind):
        """How many virtual tokens a virtual query sees, itself included; 0: all."""
        if not kind.endswith("_local"):
            return 0
        return self.iha_window if kind == "iha_local" else self.local_window

    def window_tokens(self, kind):
        """How many tokens the queries of a token see of, the token itself included; 0: all."""
        window, pseudo = self.window(kind), self.pseudo_heads(kind)
        return window and 1 + -(-(window - 1) // pseudo)

    def to_dict(self):
        output = super().to_dict()
        if "iha_layer_types" in output:
            output["layer_types"] = output.pop("iha_layer_types")
            output.pop("sliding_window", None)
        if "iha_rope_scaling" in output:
            output["rope_scaling"] = output.pop("iha_rope_scaling")
        return output


__all__ = ["IhaConfig"]
