"""Tokenizers that are there as vocab.json and merges.txt: what scripts/import_hf.py makes of them gives the ids that
Transformers gives for the files themselves."""

import json
import shutil
import subprocess
import sys

import tokenizers
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from tests.lib.runs import ROOT, Case
from tests.lib.texts import texts

V = 320
CORPUS = ["anna sees 12 apples. boris takes BOOKS, and she'll like cats!\n\n  def f(x):\n\treturn x  # año"] * 5
SHAPE = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
MODELS = {"gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=2, n_positions=8,
                                                      bos_token_id=0, eos_token_id=0)),
          "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(vocab_size=V, intermediate_size=8, num_key_value_heads=2, **SHAPE))}
TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>")


def decoder(first, lstrip=False):
    """added_tokens_decoder with TOKENS from this id on; the last is no special token."""
    return {str(first + i): {"content": text, "lstrip": lstrip and i == 2, "rstrip": False, "normalized": i == 3, "single_word": False,
                             "special": i < 3} for i, text in enumerate(TOKENS)}


class VocabFiles(Case):
    def source(self, kind, extra_in_vocab, files):
        """A model's folder with the files of a tokenizer trained here."""
        torch.manual_seed(1)
        folder = self.new_dir("source")
        MODELS[kind]().save_pretrained(folder)
        words = tokenizers.ByteLevelBPETokenizer()
        words.train_from_iterator(CORPUS, vocab_size=256 + 40 + extra_in_vocab, min_frequency=1,
                                  special_tokens=list(TOKENS[:extra_in_vocab]), show_progress=False)
        words.save_model(str(folder))
        size = len(json.loads((folder / "vocab.json").read_text()))
        for name, content in files(size).items():
            (folder / name).write_text(json.dumps(content))
        return folder

    def test_ids(self):
        common = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        cases = {
            "nothing else": ("gpt2", 1, lambda size: {}),
            "tokens that the vocabulary lacks": ("gpt2", 0, lambda size: {}),
            "bos and a space in front": ("gpt2", 1, lambda size: {
                "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "add_bos_token": True}}),
            "decoder of added tokens": ("gpt2", 0, lambda size: {
                "tokenizer_config.json": common | {"added_tokens_decoder": decoder(size, lstrip=True)}}),
            "qwen, nothing else": ("qwen2", 0, lambda size: {}),
            "qwen, decoder of added tokens": ("qwen2", 0, lambda size: {
                "tokenizer_config.json": common | {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder(size),
                                                   "additional_special_tokens": ["<|im_start|>"]}}),
            "qwen, old files": ("qwen2", 0, lambda size: {
                "added_tokens.json": {text: size + i for i, text in enumerate(TOKENS)},
                "special_tokens_map.json": common | {"eos_token": {
                    "content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}},
                "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"}}),
        }
        parts = texts(60, 5) + ["he'LL  sée 1234", "<|im_start|>user\nhi <|im_end|>\n <tool>x",
                                "e\u0301 \ufb01 \u00b2 <|endoftext|>  b", CORPUS[0]]
        for name, (kind, extra, files) in cases.items():
            with self.subTest(name):
                source, out = self.source(kind, extra, files), self.new_dir("out")
                subprocess.run([sys.executable, ROOT / "scripts" / "import_hf.py", source, out], check=True, capture_output=True)
                theirs = AutoTokenizer.from_pretrained(source)
                ours = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
                self.assertFalse((source / "tokenizer.json").exists())
                for text in parts:
                    ids = theirs(text).input_ids
                    self.assertEqual(ours(text).input_ids, ids, text)
                    self.assertEqual(ours.decode(ids), theirs.decode(ids), text)
                    self.assertEqual(ours.decode(ids, skip_special_tokens=True), theirs.decode(ids, skip_special_tokens=True))
                for token in ("bos_token", "eos_token", "pad_token", "unk_token"):
                    self.assertEqual(getattr(ours, token), getattr(theirs, token), token)
                # and once more from what Transformers saves of both
                shutil.rmtree(out)
                theirs.save_pretrained(source)
                subprocess.run([sys.executable, ROOT / "scripts" / "import_hf.py", source, out], check=True, capture_output=True)
                again = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
                self.assertEqual([again(text).input_ids for text in parts], [theirs(text).input_ids for text in parts])
