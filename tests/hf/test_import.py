"""Models made by Transformers itself, imported by scripts/import_hf.py: train_iha and modeling_iha.py compute what
Transformers does, with an error against float64 of at most three times Transformers' own in fp32."""

import json
import subprocess
import sys

import numpy as np
import torch
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
                          Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

from tests.hf.models import distance, load, loss_error
from tests.lib.runs import ROOT, Case
from tests.lib.tiny import write_shard

T, COUNT, V = 24, 4, 60
COMMON = dict(vocab_size=V, bos_token_id=1, eos_token_id=2)
# Wavelengths of head_dim 8 and this theta: kept, blended, blended and divided.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
LLAMA = dict(COMMON, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
             max_position_embeddings=T)
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=T)),
    "gpt2, untied, wide": lambda: GPT2LMHeadModel(GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=2, n_positions=T, n_inner=96,
                                                             tie_word_embeddings=False, layer_norm_epsilon=1e-3)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama, tied, heads of 12, theta": lambda: LlamaForCausalLM(LlamaConfig(
        **LLAMA, tie_word_embeddings=True, head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
    "mistral, window": lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=7)),
    "llama 3, groups, scaled": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA | {"num_key_value_heads": 2}, rope_parameters=LLAMA3)),
    "llama, biases of attention": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA | {"num_key_value_heads": 1}, attention_bias=True)),
    "mistral, groups": lambda: MistralForCausalLM(MistralConfig(**LLAMA | {"num_key_value_heads": 2}, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA | {"num_key_value_heads": 2}, tie_word_embeddings=True)),
    "qwen2, windows": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA | {"num_key_value_heads": 2}, head_dim=12, rms_norm_eps=1e-3)),
    "qwen3, biases": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=8, attention_bias=True, rope_parameters=LLAMA3)),
    "mistral, no window": lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=None)),
}


class Import(Case):
    def imported(self, model, old_keys=False, **options):
        """old_keys: the configuration as Transformers 4 wrote it."""
        source, out = self.new_dir("source"), self.new_dir("out")
        model.save_pretrained(source, **options)
        path = source / "config.json"
        config = json.loads(path.read_text())
        if old_keys and "rope_parameters" in config:
            rope = config.pop("rope_parameters")
            config["rope_theta"] = rope.pop("rope_theta")
            config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
            path.write_text(json.dumps(config))
        subprocess.run([sys.executable, ROOT / "scripts" / "import_hf.py", source, out], check=True, capture_output=True)
        return out

    def make(self, name):
        torch.manual_seed(len(name))
        model = MODELS[name]().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # initial norms are 1, biases 0
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    def test_function(self):
        ids = np.random.default_rng(3).integers(0, V, COUNT * T + 1)
        tokens, targets = torch.tensor(ids[:-1]).view(COUNT, T), torch.tensor(ids[1:]).view(COUNT, T)
        shard = self.tmp / "ids.bin"
        write_shard(shard, ids)
        for name in MODELS:
            for options in ({}, {"max_shard_size": "20KB", "old_keys": True}):
                with self.subTest(name, **options), torch.no_grad():
                    model = self.make(name)
                    out = self.imported(model, **options)
                    plain = model(tokens).logits
                    exact = model.double()(tokens).logits
                    self.assertLessEqual(distance(load(out)(tokens).logits, exact), 3 * distance(plain, exact))
                    expected = torch.nn.functional.cross_entropy(exact.flatten(0, 1), targets.flatten()).item()
                    loss, count, _ = self.evaluate(out, f"data.val={shard}", f"train.seq_len={T}")
                    self.assertEqual(count, COUNT * T)
                    self.assertAlmostEqual(loss, expected, delta=loss_error(plain, exact))
                    exported = self.new_dir("exported")
                    load(out).save_pretrained(exported)
                    self.assertTrue(torch.equal(load(exported)(tokens).logits, load(out)(tokens).logits))
                    again, _, _ = self.evaluate(exported, f"data.val={shard}", f"train.seq_len={T}")
                    self.assertEqual(again, loss)

    def test_half_precision(self):
        """Of weights in bf16 and fp16, exactly their values."""
        for dtype in (torch.bfloat16, torch.float16):
            model = self.make("mistral, window").to(dtype)
            found = load(self.imported(model)).state_dict()
            self.assertTrue(torch.equal(found["embed.weight"], model.model.embed_tokens.weight.float()), dtype)
            self.assertTrue(torch.equal(found["layers.1.mlp.gate.weight"], model.model.layers[1].mlp.gate_proj.weight.float()))

    def test_computing_in_bf16(self):
        """With three times the error of Transformers' own model in bf16."""
        tokens = torch.tensor(np.random.default_rng(3).integers(0, V, (COUNT, T)))
        for name in MODELS:
            with self.subTest(name), torch.no_grad():
                model = self.make(name)
                out = self.imported(model)
                exact = model.double()(tokens).logits
                plain = model.bfloat16()(tokens).logits
                for attention in ("sdpa", "eager"):
                    found = load(out, dtype=torch.bfloat16, attn_implementation=attention)(tokens).logits
                    self.assertLessEqual(distance(found, exact), 3 * distance(plain, exact), attention)

    def test_upcycled(self):
        """What the model becomes with IHA layers is the same function, and goes on to train."""
        model = self.make("gpt2")
        out = self.imported(model)
        shapes = ["model.vocab_size=60", "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=4",
                  "model.intermediate_size=128", "model.position_embedding=learned", "model.norm=layernorm", "model.bias=true",
                  f"train.seq_len={T}", "train.batch_tokens=48", f"model.max_position_embeddings={T}", "data.tokenizer=none"]
        ids = np.random.default_rng(4).integers(0, V, 20 * T + 1)
        shard = self.tmp / "train.bin"
        write_shard(shard, ids)
        self.train(*shapes, "model.layer_pattern=iha_global", f"train.init_from={out}", "train.steps=2",
                   f"data.train={shard}", f"data.val={shard}")
        self.assertIn("function preserved", self.last.stderr.decode())
