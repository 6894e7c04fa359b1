"""Checkpoints of train_iha in Transformers and back: losses, generated text, fine-tuning, tokenizers."""

import json
import shutil

import numpy as np
import tokenizers
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from tests.hf.models import in_float64, load, loss_error
from tests.lib.runs import T, Case, documents, step_dir
from tests.lib.texts import texts

MODELS = {
    "paper": [],
    "gpt2": ["model.layer_pattern=mha_global", "model.position_embedding=learned", "model.norm=layernorm", "model.bias=true"],
    "llama": ["model.layer_pattern=mha_local mha_global", "model.activation=swiglu", "model.tie_word_embeddings=false",
              "model.local_window=9"],
    "token": ["model.layer_pattern=iha_global", "model.iha_mask=token", "model.iha_rope=token", "model.num_pseudo_heads=3",
              "model.iha_collapse=per_head", "model.activation=relu2", "model.init_collapse=mean", "model.init_alpha=noise"],
    "none": ["model.layer_pattern=iha_local iha_global", "model.position_embedding=none", "model.iha_window=7",
             "model.init_alpha=noise", "model.head_dim=12"],
    "grouped": ["model.layer_pattern=iha_local mha_global iha_global", "model.num_hidden_layers=3", "model.num_attention_heads=4",
                "model.num_key_value_heads=2", "model.qk_norm=rmsnorm", "model.qkv_bias=true", "model.init_alpha=noise",
                "model.rope_scaling=llama3", "model.rope_original_positions=16"],
    "compared": ["model.layer_pattern=diff_global talking_local simplicial_local folded_global diff_local",
                 "model.num_hidden_layers=5", "model.local_window=5", "model.init_alpha=noise"],
    "bidirectional": ["model.layer_pattern=iha_global mha_global", "model.causal=false", "run.sample_every=0"],
}


def tokenizer_of(checkpoint):
    """Transformers reads config.json for it, and without the code does not know its layer_types."""
    return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)


class RoundTrip(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.checkpoints = {}

    def checkpoint(self, name):
        if name not in self.checkpoints:
            run_dir = self.train(*MODELS[name], "train.steps=12", "train.mix_lr_scale=3")
            self.checkpoints[name] = step_dir(run_dir, 12)
        return self.checkpoints[name]

    def sequences(self, count):
        """The first sequences of the validation shard, and one token more."""
        return torch.tensor(documents(40, 9)[:count * T + 1])

    def logits(self, model, count):
        with torch.no_grad():
            return model(self.sequences(count)[:-1].view(count, T), use_cache=False).logits

    def loss_of(self, logits):
        targets = self.sequences(len(logits))[1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).item()

    def loss(self, model, count):
        return self.loss_of(self.logits(model, count))

    def check_loss(self, model, count, loss):
        """train_iha's loss is the model's in float64, to three times the error that PyTorch's fp32 has."""
        exact = in_float64(model, lambda m: self.logits(m, count))
        self.assertAlmostEqual(loss, self.loss_of(exact), delta=loss_error(self.logits(model, count), exact))

    def test_losses(self):
        """The same of both programs, and to the last digit again once Transformers has saved the model."""
        for name in MODELS:
            with self.subTest(name):
                checkpoint, saved = self.checkpoint(name), self.new_dir()
                loss, tokens, digits = self.evaluate(checkpoint, f"data.val={self.val}")
                model = load(checkpoint)
                self.check_loss(model, tokens // T, loss)
                model.save_pretrained(saved)
                self.assertEqual(self.evaluate(saved, f"data.val={self.val}", f"train.seq_len={T}")[2], digits)
                before, after = (json.loads((path / "config.json").read_text()) for path in (checkpoint, saved))
                self.assertEqual({key: after.get(key) for key in before}, before)
                weights = [load_file(path / "model.safetensors") for path in (checkpoint, saved)]
                self.assertEqual(*(list(sorted(w)) for w in weights))
                for tensor in weights[0]:
                    self.assertTrue(np.array_equal(weights[0][tensor], weights[1][tensor]), tensor)
                self.check_loss(load(saved), tokens // T, loss)

    def test_generated_text(self):
        for name in ("paper", "gpt2", "llama", "none", "grouped", "compared"):
            with self.subTest(name):
                checkpoint = self.checkpoint(name)
                written = self.run_cli("generate", checkpoint, "--prompt", "anna sees", "--tokens", 20, "--temperature", 0,
                                       "system.precision=fp32")
                tokenizer, model = tokenizer_of(checkpoint), load(checkpoint)
                out = model.generate(**tokenizer("anna sees", return_tensors="pt"), max_new_tokens=20, do_sample=False)
                text = tokenizer.decode(out[0], skip_special_tokens=True)
                self.assertEqual(written.stdout.decode(errors="replace").rstrip("\n"), text.rstrip("\n"))

    def test_fine_tuning_elsewhere(self):
        """train_iha, ten steps of PyTorch, train_iha again."""
        model, saved = load(self.checkpoint("paper")).train(), self.new_dir()
        ids = self.sequences(16)[:-1].view(16, T)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
        first = self.loss(model, 16)
        for _ in range(10):
            optimizer.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
        tuned = self.loss(model, 16)
        self.assertLess(tuned, first)
        model.save_pretrained(saved)
        tokenizer_of(self.checkpoint("paper")).save_pretrained(saved)
        loss, tokens, _ = self.evaluate(saved, f"data.val={self.val}", f"train.seq_len={T}")
        self.check_loss(model.eval(), tokens // T, loss)
        self.run_cli("generate", saved, "--prompt", "anna", "--tokens", 5)
        run_dir = self.train("train.steps=2", "train.lr=0", f"train.init_from={saved}")
        again, _, _ = self.evaluate(step_dir(run_dir, 2), f"data.val={self.val}")
        self.assertEqual(again, loss)

    def test_trainer(self):
        """Transformers' own training loop, with activation checkpointing, goes through every layer type."""
        for name in ("paper", "grouped", "compared"):
            with self.subTest(name):
                model = load(self.checkpoint(name))
                ids = self.sequences(16)[:-1].view(16, T)
                options = TrainingArguments(
                    output_dir=str(self.new_dir()), per_device_train_batch_size=8, max_steps=10, learning_rate=1e-2, seed=1,
                    activation_checkpointing=True, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
                    logging_strategy="no")
                first = self.loss(model, 16)
                trainer = Trainer(model=model, args=options, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
                trainer.train()
                self.assertLess(self.loss(model.eval(), 16), first)
                saved = self.new_dir()
                trainer.save_model(saved)
                loss, tokens, _ = self.evaluate(saved, f"data.val={self.val}", f"train.seq_len={T}")
                self.check_loss(load(saved), tokens // T, loss)

    def test_untrained_models_begin_alike(self):
        """What Transformers initialises is distributed as what train_iha does."""
        run_dir = self.train("train.steps=1", "train.lr=0", "model.hidden_size=64", "model.iha_collapse=per_head")
        config = load(step_dir(run_dir, 1)).config
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        ours = load_file(step_dir(run_dir, 1) / "model.safetensors")
        for name, theirs in model.named_parameters():
            theirs = theirs.detach().numpy()
            if theirs.std() == 0 or "alpha" in name or "collapse" in name:
                self.assertTrue(np.array_equal(theirs, ours[name]), name)
            else:
                self.assertAlmostEqual(theirs.std() / ours[name].std(), 1, delta=0.1, msg=name)

    def test_tokenizers(self):
        bytes_ = tokenizer_of(self.checkpoint("paper"))
        for text in texts(100, 2):
            self.assertEqual(bytes_(text).input_ids, list(text.encode()))
            self.assertEqual(bytes_.decode(bytes_(text).input_ids, clean_up_tokenization_spaces=False), text)
        self.assertEqual((bytes_.eos_token_id, bytes_.pad_token_id, bytes_.bos_token_id), (256, 256, 256))
        batch = bytes_(["ab", "abcd"], padding=True, padding_side="left")
        self.assertEqual(batch.input_ids[0], [256, 256, 97, 98])
        self.assertEqual(batch.attention_mask[0], [0, 0, 1, 1])

        words = tokenizers.ByteLevelBPETokenizer()
        words.train_from_iterator(["anna sees apples. boris takes books. clara likes cats."] * 5, vocab_size=257 + 20,
                                  min_frequency=1, special_tokens=["<|endoftext|>"])
        folder = self.tmp / "words"
        folder.mkdir()
        words.save(str(folder / "tokenizer.json"))
        run_dir = self.train("train.steps=1", f"data.tokenizer={folder}/tokenizer.json", "model.vocab_size=300",
                             f"data.val={self.val}")
        loaded = tokenizer_of(step_dir(run_dir, 1))
        file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        for text in texts(100, 3) + ["anna sees cats<|endoftext|>boris"]:
            self.assertEqual(loaded(text).input_ids, file.encode(text).ids)
        self.assertEqual(loaded.eos_token, "<|endoftext|>")

    def test_files_are_needed(self):
        """Without its code a checkpoint is no model of Transformers."""
        folder = self.new_dir()
        shutil.copytree(self.checkpoint("paper"), folder)
        (folder / "modeling_iha.py").unlink()
        with self.assertRaises(OSError):
            load(folder)
