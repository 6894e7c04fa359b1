"""A checkpoint's files for Hugging Face Transformers, as far as they can be tested without it (make test-hf does the
rest): what they contain, and that train_iha needs none of them."""

import ast
import json
import shutil
import subprocess

import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file

from tests.lib.runs import BINARY, ENVIRONMENT, ROOT, Case, T, step_dir
from tests.lib.texts import texts

CODE = ("configuration_iha.py", "modeling_iha.py")
OTHERS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")


class TransformersFiles(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.run_dir = cls.tmp / "bytes"
        subprocess.run([BINARY, "train", cls.config, f"run.dir={cls.run_dir}", "train.steps=2", "data.tokenizer=bytes",
                        f"data.val={cls.val}"], check=True, capture_output=True, env=ENVIRONMENT)
        cls.checkpoint = step_dir(cls.run_dir, 2)

    def read(self, name, checkpoint=None):
        return json.loads(((checkpoint or self.checkpoint) / name).read_text())

    def without(self, *names):
        """A copy of the run whose checkpoint lacks these files."""
        run_dir = self.new_dir()
        shutil.copytree(self.run_dir, run_dir)
        for name in names:
            (step_dir(run_dir, 2) / name).unlink()
        return run_dir

    def generate(self, path):
        return self.run_cli("generate", path, "--prompt", "anna <|endoftext|>", "--tokens", 20).stdout

    def test_code_is_the_repository_s(self):
        for name in CODE:
            text = (self.checkpoint / name).read_text()
            self.assertEqual(text, (ROOT / "model/checkpoint/hf" / name).read_text())
            ast.parse(text)

    def test_config_names_code_and_token_ids(self):
        config = self.read("config.json")
        self.assertEqual(config["architectures"], ["IhaForCausalLM"])
        self.assertEqual(config["dtype"], "float32")
        self.assertEqual((config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]), (256, [256], 256))
        for target in config["auto_map"].values():
            file, name = target.split(".")
            classes = [node.name for node in ast.parse((self.checkpoint / f"{file}.py").read_text()).body
                       if isinstance(node, ast.ClassDef)]
            self.assertIn(name, classes)

    def test_bytes_as_tokenizer_json(self):
        tokenizer = tokenizers.Tokenizer.from_file(str(self.checkpoint / "tokenizer.json"))
        for text in texts(200, 1):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            self.assertEqual(ids, list(text.encode()))
            self.assertEqual(tokenizer.decode(ids), text)
        self.assertEqual(tokenizer.encode("a<|endoftext|>b").ids, [97, 256, 98])
        config = self.read("tokenizer_config.json")
        self.assertEqual([config[role] for role in ("bos_token", "eos_token", "pad_token")], ["<|endoftext|>"] * 3)
        self.assertEqual(config["model_max_length"], 32)

    def test_train_iha_takes_bytes_as_bytes(self):
        """The prompt's <|endoftext|> is text for the byte tokenizer, and with tokenizer.json alone it is a token."""
        self.assertEqual(self.generate(self.run_dir), self.generate(self.without("tokenizer.json")))
        self.assertNotEqual(self.generate(self.run_dir), self.generate(self.without("trainer.json")))

    def test_checkpoints_without_the_files(self):
        """As they were written before: they evaluate, generate and resume, and the next one has the files."""
        old = self.without(*CODE, *OTHERS)
        config = self.read("config.json", step_dir(old, 2))
        for key in ("architectures", "auto_map", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"):
            del config[key]
        (step_dir(old, 2) / "config.json").write_text(json.dumps(config))
        self.assertEqual(self.evaluate(old), self.evaluate(self.run_dir))
        self.assertEqual(self.generate(old), self.generate(self.run_dir))
        self.train("train.steps=3", "data.tokenizer=bytes", f"data.val={self.val}", run_dir=old)
        for name in (*CODE, *OTHERS):
            self.assertTrue((step_dir(old, 3) / name).exists(), name)

    def test_weights_in_bf16(self):
        """As Transformers saves a model that was loaded in bf16: the values of the same weights in fp32."""
        narrow, wide = self.without("trainer.json"), self.without("trainer.json")
        tensors = load_file(step_dir(narrow, 2) / "model.safetensors")
        bits = {name: (x.view(np.uint32) >> 16).astype(np.uint16) for name, x in tensors.items()}
        save_file({name: (x.astype(np.uint32) << 16).view(np.float32) for name, x in bits.items()},
                  step_dir(wide, 2) / "model.safetensors")
        header, data, at = {}, b"", 0
        for name, x in bits.items():
            header[name] = {"dtype": "BF16", "shape": x.shape, "data_offsets": [at, at + x.nbytes]}
            data, at = data + x.tobytes(), at + x.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (step_dir(narrow, 2) / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        options = f"data.val={self.val}", f"train.seq_len={T}"
        self.assertEqual(self.evaluate(narrow, *options), self.evaluate(wide, *options))
        self.assertNotEqual(self.evaluate(narrow, *options), self.evaluate(self.run_dir, *options))

    def test_weights_in_several_files(self):
        """As Transformers saves large models: refused, with what to do."""
        run_dir = self.without("model.safetensors")
        checkpoint = step_dir(run_dir, 2)
        (checkpoint / "model.safetensors.index.json").write_text("{}")
        for command in (["eval", checkpoint, f"data.val={self.val}"], ["generate", run_dir],
                        ["train", self.config, f"run.dir={self.new_dir()}", f"train.init_from={checkpoint}"]):
            said = self.run_cli(*command, code=2).stderr.decode()
            self.assertIn("its weights are in several files", said)
            self.assertIn("max_shard_size", said)

    def test_another_program_s_code_stays_unread(self):
        """A new checkpoint has the program's own, whatever stands in the one before."""
        run_dir = self.without()
        (step_dir(run_dir, 2) / "modeling_iha.py").write_text("raise SystemExit('executed')")
        self.train("train.steps=3", "data.tokenizer=bytes", f"data.val={self.val}", run_dir=run_dir)
        self.assertEqual((step_dir(run_dir, 3) / "modeling_iha.py").read_bytes(), (self.checkpoint / "modeling_iha.py").read_bytes())

    def test_a_tokenizer_file_keeps_its_config(self):
        folder = self.tmp / "tokenizer"
        folder.mkdir()
        shutil.copy(self.checkpoint / "tokenizer.json", folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "LlamaTokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
             "eos_token": {"content": "<|endoftext|>"}, "chat_template": "{{ messages }}", "model_max_length": 7}))
        run_dir = self.train("train.steps=1", f"data.tokenizer={folder}/tokenizer.json")
        self.assertEqual(self.read("tokenizer_config.json", step_dir(run_dir, 1)),
                         {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"content": "<|endoftext|>"},
                          "chat_template": "{{ messages }}", "model_max_length": 7, "bos_token": "<|endoftext|>",
                          "pad_token": "<|endoftext|>"})
        self.assertEqual((step_dir(run_dir, 1) / "tokenizer.json").read_bytes(), (folder / "tokenizer.json").read_bytes())

    def test_no_tokenizer_no_files_of_one(self):
        run_dir = self.train("train.steps=1", "data.tokenizer=none")
        names = {path.name for path in step_dir(run_dir, 1).iterdir()}
        self.assertEqual(names & {"tokenizer.json", "tokenizer_config.json"}, set())
        self.assertEqual(self.read("generation_config.json", step_dir(run_dir, 1)), {})
        self.assertNotIn("eos_token_id", self.read("config.json", step_dir(run_dir, 1)))
