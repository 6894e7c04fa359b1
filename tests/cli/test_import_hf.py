"""scripts/import_hf.py: golden models under the names, layouts and types of other programs come back as they were, and bad
input is refused in one line with nothing written. That Transformers computes the same is tested by make test-hf."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.lib.runs import BINARY, CPU, ENVIRONMENT, ROOT
from tests.lib.tiny import write_shard

SCRIPT, GOLDEN = ROOT / "scripts" / "import_hf.py", ROOT / "tests" / "golden"
GPT2 = {"attn_norm": "ln_1", "attn.qkv": "attn.c_attn", "attn.out": "attn.c_proj", "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj", "final_norm": "ln_f", "embed": "wte", "pos_embed": "wpe"}
LLAMA = {"attn_norm": "input_layernorm", "attn.out": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
         "mlp.up": "mlp.up_proj", "mlp.gate": "mlp.gate_proj", "mlp.down": "mlp.down_proj"}


def golden(name):
    """A golden case's configuration and parameters."""
    tensors = load_file(GOLDEN / f"model_{name}.safetensors")
    config = json.loads((GOLDEN / f"model_{name}.json").read_text())
    return config, {key[6:]: x for key, x in tensors.items() if key.startswith("param.")}


def as_gpt2(params, prefix="transformer."):
    out = {}
    for name, x in params.items():
        name, kind = name.rsplit(".", 1)
        layer, name = re.match(r"(layers\.\d+\.)?(.*)", name).groups()
        matrix = name.startswith(("attn.", "mlp.")) and kind == "weight"
        out[f"{prefix}{(layer or '').replace('layers', 'h')}{GPT2[name]}.{kind}"] = np.ascontiguousarray(x.T if matrix else x)
    return out | {prefix + "h.0.attn.bias": np.ones((1, 1, 4, 4), "f")}  # a buffer of old files


def as_llama(params):
    out = {}
    for name, x in params.items():
        layer, name = re.match(r"(layers\.\d+\.)?(.*)\.weight", name).groups()
        if name == "attn.qkv":
            for which, part in zip("qkv", np.split(x, 3)):
                out[f"model.{layer}self_attn.{which}_proj.weight"] = part
        elif layer:
            out[f"model.{layer}{LLAMA[name]}.weight"] = x
        else:
            out[{"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}[name] + ".weight"] = x
    return out


def gpt2_config(c, **more):
    return dict(model_type="gpt2", vocab_size=c["vocab_size"], n_embd=c["hidden_size"], n_layer=c["num_hidden_layers"],
                n_head=c["num_attention_heads"], n_positions=c["max_position_embeddings"], n_inner=c["intermediate_size"],
                layer_norm_epsilon=c["norm_eps"]) | more


def llama_config(c, **more):
    return dict(model_type="mistral", sliding_window=c["local_window"], rms_norm_eps=c["norm_eps"],
                layer_types=["sliding_attention", "full_attention"], rope_theta=c["rope_theta"], tie_word_embeddings=False,
                num_key_value_heads=c["num_attention_heads"],
                **{key: c[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                           "intermediate_size", "max_position_embeddings")}) | more


class ImportHf(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.tmp = Path(temporary.name)
        self.source, self.out = self.tmp / "source", self.tmp / "out"
        self.source.mkdir()

    def run_script(self, code=0):
        done = subprocess.run([sys.executable, SCRIPT, self.source, self.out], capture_output=True, text=True)
        self.assertEqual(done.returncode, code, done.stderr)
        return done.stderr

    def write(self, config, tensors):
        (self.source / "config.json").write_text(json.dumps(config))
        save_file(tensors, self.source / "model.safetensors")

    def check_same(self, config, params, ignored=()):
        found = load_file(self.out / "model.safetensors")
        self.assertEqual(sorted(found), sorted(params))
        for name, x in params.items():
            self.assertTrue(np.array_equal(found[name], x), name)
        read = json.loads((self.out / "config.json").read_text())
        iha = ("num_pseudo_heads", "iha_window", "iha_mask", "iha_rope", "iha_collapse", *ignored)
        self.assertEqual({key: read[key] for key in config if key not in iha}, {key: x for key, x in config.items() if key not in iha})

    def test_gpt2(self):
        for prefix in ("transformer.", ""):
            config, params = golden("mha_gpt2")
            self.write(gpt2_config(config), as_gpt2(params, prefix))
            self.run_script()
            self.check_same(config, params, ("local_window",))
            shutil.rmtree(self.out)

    def test_mistral_with_windows(self):
        config, params = golden("mha_llama")
        self.write(llama_config(config), as_llama(params))
        self.run_script()
        self.check_same(config, params)

    def check_imported(self, config, tensors, **expected):
        """Every tensor is where it belongs, train_iha reads the checkpoint, and computes what the reference does."""
        self.write(config, tensors)
        self.run_script()
        read, found = json.loads((self.out / "config.json").read_text()), load_file(self.out / "model.safetensors")
        self.assertEqual({key: read[key] for key in expected}, expected)
        for n in range(config["num_hidden_layers"]):
            attention = f"model.layers.{n}.self_attn."
            for kind in ("weight", "bias"):
                parts = [tensors[f"{attention}{x}_proj.{kind}"] for x in "qkv" if f"{attention}{x}_proj.{kind}" in tensors]
                self.assertEqual(f"layers.{n}.attn.qkv.{kind}" in found, bool(parts))
                if parts:
                    self.assertTrue(np.array_equal(found[f"layers.{n}.attn.qkv.{kind}"], np.concatenate(parts)))
            for x in "qk":
                if f"{attention}{x}_norm.weight" in tensors:
                    self.assertTrue(np.array_equal(found[f"layers.{n}.attn.{x}_norm.weight"], tensors[f"{attention}{x}_norm.weight"]))
            if read["bias"]:
                self.assertTrue(np.array_equal(found[f"layers.{n}.attn.out.bias"], tensors[attention + "o_proj.bias"]))
                self.assertFalse(found[f"layers.{n}.mlp.up.bias"].any() or found[f"layers.{n}.mlp.down.bias"].any())
        ids = np.random.default_rng(5).integers(0, config["vocab_size"], 41)
        write_shard(self.tmp / "val.bin", ids)
        out = subprocess.run([BINARY, "eval", self.out, f"data.val={self.tmp}/val.bin", "train.seq_len=20", *CPU],
                             capture_output=True, text=True, env=ENVIRONMENT, check=True).stdout
        plain = subprocess.run([sys.executable, ROOT / "tests" / "reference" / "export_check.py", self.out, "--numpy-loss",
                                self.tmp / "val.bin", "20", "2"], capture_output=True, text=True, check=True).stdout
        self.assertAlmostEqual(float(out.split()[-2]), float(plain.split()[-2]), delta=1e-6)
        shutil.rmtree(self.out)

    def test_llama_3_and_qwen(self):
        C, F, V, H, G, d, L = 24, 40, 31, 4, 2, 8, 2
        draw = np.random.default_rng(3)
        common = dict(vocab_size=V, hidden_size=C, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=G,
                      head_dim=d, intermediate_size=F, max_position_embeddings=64, rms_norm_eps=1e-5)

        def tensors(**shapes):
            shapes = {"self_attn.q_proj.weight": (H * d, C), "self_attn.k_proj.weight": (G * d, C),
                      "self_attn.v_proj.weight": (G * d, C), "self_attn.o_proj.weight": (C, H * d), "mlp.up_proj.weight": (F, C),
                      "mlp.gate_proj.weight": (F, C), "mlp.down_proj.weight": (C, F), "input_layernorm.weight": (C,),
                      "post_attention_layernorm.weight": (C,)} | shapes
            all_shapes = {f"model.layers.{n}.{name}": shape for n in range(L) for name, shape in shapes.items()}
            all_shapes |= {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,), "lm_head.weight": (V, C)}
            return {name: (draw.normal(0, 0.3, shape) + name.endswith("norm.weight")).astype("f") for name, shape in all_shapes.items()}

        qkv = {f"self_attn.{x}_proj.bias": ((H if x == "q" else G) * d,) for x in "qkv"}
        scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
        scaled = dict(rope_scaling="llama3", rope_theta=1000.0, rope_original_positions=32, num_key_value_heads=G)
        for config, more, expected in (
                (dict(model_type="llama", rope_theta=1000, rope_scaling=scaling | {"rope_type": "llama3"}), {}, scaled),
                (dict(model_type="llama", rope_parameters=scaling | {"rope_type": "llama3", "rope_theta": 1000.0},
                      attention_bias=True), qkv | {"self_attn.o_proj.bias": (C,)}, scaled | {"bias": True}),
                (dict(model_type="qwen2"), qkv, dict(qkv_bias=True, bias=False, rope_scaling="none", local_window=512)),
                (dict(model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1), qkv,
                 dict(layer_types=["mha_global", "mha_local"], local_window=5)),
                (dict(model_type="qwen3", use_sliding_window=False, sliding_window=5),
                 {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)},
                 dict(qk_norm="rmsnorm", qkv_bias=False, layer_types=["mha_global"] * 2))):
            with self.subTest(config):
                self.check_imported(common | config, tensors(**more), **expected)

    def test_train_iha_reads_it(self):
        """Its loss is the golden case's, on the golden case's tokens."""
        config, params = golden("mha_gpt2")
        self.write(gpt2_config(config), as_gpt2(params))
        self.run_script()
        case = load_file(GOLDEN / "model_mha_gpt2.safetensors")
        tokens, T = case["tokens"][0], case["tokens"].shape[1]
        write_shard(self.tmp / "val.bin", tokens)
        out = subprocess.run([BINARY, "eval", self.out, f"data.val={self.tmp}/val.bin", f"train.seq_len={T - 1}", *CPU],
                             capture_output=True, text=True, env=ENVIRONMENT, check=True).stdout
        logits = case["logits"][0, :-1]
        logits = logits - logits.max(-1, keepdims=True)
        expected = np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(T - 1), tokens[1:]])
        self.assertAlmostEqual(float(out.split()[-2]), expected, delta=1e-5)

    def test_sharded_and_half_precision(self):
        config, params = golden("mha_llama")
        tensors = {name: x.astype(np.float16) for name, x in as_llama(params).items()}
        names = sorted(tensors)
        files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: tensors[name] for name in names if files[name] == file}, self.source / file)
        (self.source / "config.json").write_text(json.dumps(llama_config(config)))
        (self.source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        self.run_script()
        self.check_same(config, {name: x.astype(np.float16).astype(np.float32) for name, x in params.items()})
        shutil.rmtree(self.out)
        (self.source / "model-00002-of-00002.safetensors").unlink()
        self.refused("model-00002-of-00002.safetensors is not there")

    def test_llm_c(self):
        config, params = golden("mha_gpt2")
        C, V, L = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
        for version, bits in ((3, lambda x: x.astype("<f4")), (5, lambda x: (x.view("<u4") >> 16).astype("<u2"))):
            draw = np.random.default_rng(1)
            shapes = {name: (4 * C if x.shape[0] == 40 else x.shape[0], *((4 * C if n == 40 else n for n in x.shape[1:])))
                      for name, x in params.items()}
            values = {name: draw.normal(size=shape).astype("f") for name, shape in shapes.items()}
            padded = np.concatenate([values["embed.weight"], np.full((3, C), 9, "f")])
            body = [padded, values["pos_embed.weight"]]
            for part in ("attn_norm", "attn.qkv", "attn.out", "mlp_norm", "mlp.up", "mlp.down"):
                for kind in ("weight", "bias"):
                    body += [values[f"layers.{n}.{part}.{kind}"] for n in range(L)]
            body += [values["final_norm.weight"], values["final_norm.bias"]]
            header = struct.pack("<256i", 20240326, version, config["max_position_embeddings"], V, L,
                                 config["num_attention_heads"], C, V + 3, *[0] * 248)
            self.source = self.tmp / f"v{version}.bin"
            self.source.write_bytes(header + b"".join(bits(x).tobytes() for x in body))
            self.run_script()
            if version == 5:
                values = {name: ((x.view("<u4") >> 16) << 16).view("<f4") for name, x in values.items()}
            self.check_same(config | {"intermediate_size": 4 * C}, values, ("local_window",))
            shutil.rmtree(self.out)
        self.source.write_bytes(self.source.read_bytes()[:-2])
        self.refused("damaged")

    def test_tokenizer_and_its_end(self):
        config, params = golden("mha_gpt2")
        self.write(gpt2_config(config, eos_token_id=3, pad_token_id=-1), as_gpt2(params))
        tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 3}}, "added_tokens": [{"id": 5, "content": "<|endoftext|>"}]}
        (self.source / "tokenizer.json").write_text(json.dumps(tokenizer))
        (self.source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["x.Y", None]}, "eos_token": "b"}))
        (self.source / "chat_template.jinja").write_text("{{ messages }}")
        self.assertEqual(self.run_script(), "")
        self.assertEqual(json.loads((self.out / "tokenizer_config.json").read_text()),
                         {"eos_token": "b", "tokenizer_class": "PreTrainedTokenizerFast"})
        self.assertEqual(json.loads((self.out / "generation_config.json").read_text()), {"eos_token_id": 3})
        self.assertEqual((self.out / "tokenizer.json").read_bytes(), (self.source / "tokenizer.json").read_bytes())
        self.assertTrue((self.out / "chat_template.jinja").exists() and (self.out / "modeling_iha.py").exists())
        shutil.rmtree(self.out)
        tokenizer["added_tokens"][0]["id"] = config["vocab_size"]
        (self.source / "tokenizer.json").write_text(json.dumps(tokenizer))
        self.refused("vocab_size")

    def take_apart(self, tokenizer, **settings):
        """Writes a tokenizer.json as the files that it came from."""
        model = tokenizer["model"]
        (self.source / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (self.source / "merges.txt").write_text("#version: 0.2\n" + "".join(merge + "\n" for merge in merges), encoding="utf-8")
        added = {token["id"]: {key: x for key, x in token.items() if key != "id"} for token in tokenizer["added_tokens"]}
        (self.source / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added} | settings))

    def test_vocab_and_merges(self):
        """The tokenizer.json made of them is the golden one, whose ids tests/unit/test_tokenizer.c compares."""
        config, params = golden("mha_gpt2")
        gpt2 = json.loads((GOLDEN / "tokenizer_gpt2.json").read_text())
        qwen2 = next(kind["tokenizer"] for kind in json.loads((GOLDEN / "tokenizer_kinds.json").read_text()) if kind["name"] == "qwen2")
        left = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<left>")
        self.embed(config, params, 600)
        for tokenizer, name, settings, eos in ((gpt2, None, {}, "<|endoftext|>"),
                                               (qwen2, "Qwen2TokenizerFast", left | {"add_prefix_space": False}, "<left>")):
            with self.subTest(name):
                self.take_apart(tokenizer, **{"tokenizer_class": name} if name else {}, **settings)
                self.assertEqual(self.run_script(), "")
                found = json.loads((self.out / "tokenizer.json").read_text())
                for part in ("normalizer", "pre_tokenizer", "added_tokens"):
                    self.assertEqual(found[part], tokenizer[part], part)
                self.assertEqual(found["decoder"]["type"], "ByteLevel")
                self.assertEqual(found["model"]["vocab"], tokenizer["model"]["vocab"])
                self.assertEqual([tuple(merge) for merge in found["model"]["merges"]],
                                 [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in tokenizer["model"]["merges"]])
                more = json.loads((self.out / "tokenizer_config.json").read_text())
                self.assertEqual((more["eos_token"], more["tokenizer_class"]), (eos, "PreTrainedTokenizerFast"))
                written = subprocess.run([BINARY, "generate", self.out, "--prompt", "He said", "--tokens", "1", *CPU],
                                         capture_output=True, env=ENVIRONMENT, check=True).stdout
                self.assertTrue(written.startswith(b"He said"), written)
                shutil.rmtree(self.out)

    def test_vocab_and_merges_that_do_not_fit(self):
        config, params = golden("mha_gpt2")
        tokenizer = json.loads((GOLDEN / "tokenizer_gpt2.json").read_text())
        self.embed(config, params, 600)
        self.take_apart(tokenizer)
        for name, text, words in (("merges.txt", "#version: 0.2\nq w x\n", "are no tokenizer"), ("vocab.json", "{1", "are no tokenizer"),
                                  ("merges.txt", "#version: 0.2\nzq qz\n", "are no tokenizer"),
                                  ("tokenizer_config.json", '{"added_tokens_decoder": {"999": {"content": "<x>"}}}', "has id 999"),
                                  ("tokenizer_config.json", '{"added_tokens_decoder": {"z": {"content": "<x>"}}}', "added_tokens_decoder"),
                                  ("tokenizer_config.json", '{"eos_token": 7}', "7 among the special tokens is not a token")):
            with self.subTest(text):
                before = (self.source / name).read_text()
                (self.source / name).write_text(text)
                self.refused(words)
                (self.source / name).write_text(before)
        (self.source / "merges.txt").unlink()
        self.refused("merges.txt is not there")
        (self.source / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        self.assertIn("the checkpoint has no tokenizer", self.run_script())
        shutil.rmtree(self.out)
        self.take_apart(tokenizer)
        self.embed(config, params, 200)
        self.refused("vocab_size")

    def embed(self, config, params, size):
        """Writes the model with so many tokens."""
        rows = np.random.default_rng(1).normal(size=(size, config["hidden_size"])).astype("f")
        self.write(gpt2_config(config, vocab_size=size), as_gpt2(params | {"embed.weight": rows}))

    # ---- bad input ----

    def refused(self, *names):
        before = sorted(os.listdir(self.tmp))
        lines = self.run_script(code=2).splitlines()
        self.assertEqual(len(lines), 1, lines)
        for name in names:
            self.assertIn(name, lines[0])
        self.assertEqual(sorted(os.listdir(self.tmp)), before)

    def test_models_that_do_not_fit(self):
        config, params = golden("mha_llama")
        wide = {"num_attention_heads": 4, "num_key_value_heads": 3}
        for more, name in ((wide, "num_key_value_heads"), ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
                           ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
                           ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
                           ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
                                              "original_max_position_embeddings": 64}}, "low_freq_factor"),
                           ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"), ({"hidden_act": "gelu"}, "hidden_act"),
                           ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": None, "max_window_layers": -1},
                            "max_window_layers"), ({"model_type": "mixtral"}, "experts"),
                           ({"model_type": "bert"}, "bert"), ({"hidden_size": "20"}, "hidden_size"),
                           ({"layer_types": ["linear_attention"] * 2}, "layer_types"), ({"vocab_size": 0}, "vocab_size"),
                           ({"eos_token_id": 41}, "eos_token_id")):
            with self.subTest(more):
                self.write(llama_config(config, **more), as_llama(params))
                self.refused("config.json" if name != "eos_token_id" else name, name)

    def test_tensors_that_do_not_fit(self):
        config, params = golden("mha_llama")
        good = as_llama(params)
        first = "model.layers.0.mlp.up_proj.weight"
        bad = {"missing": {name: x for name, x in good.items() if name != first}, "model.extra": good | {"model.extra": np.zeros(2, "f")},
               "not finite": good | {first: np.full_like(good[first], np.nan)}, "config.json means": good | {first: good[first][:, :-1]}}
        for name, tensors in bad.items():
            with self.subTest(name):
                self.write(llama_config(config), {key: np.ascontiguousarray(x) for key, x in tensors.items()})
                self.refused(name)

    def test_files_that_are_damaged(self):
        config, params = golden("mha_llama")
        self.refused("config.json is not there")
        self.write(llama_config(config), as_llama(params))
        whole = (self.source / "model.safetensors").read_bytes()
        for text in (b"", whole[:100], whole[:-4], b"\xff" * 64):
            (self.source / "model.safetensors").write_bytes(text)
            self.refused("damaged")
        (self.source / "model.safetensors").unlink()
        self.refused("model.safetensors is not there")
        (self.source / "config.json").write_text("[1")
        self.refused("config.json cannot be read")
        shutil.rmtree(self.source)
        self.refused("source is not there")

    def test_an_output_that_exists(self):
        self.out.mkdir()
        self.refused("exists already")
