"""EleutherAI's lm-evaluation-harness evaluates a checkpoint as any other model of Transformers: a task of choices and one
of generated text, both made here, without a network."""

import json
import os
import random
import subprocess
import sys

import torch

from tests.hf.models import load
from tests.lib.runs import Case, step_dir

CHOICE = """\
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATION = """\
task: continue
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""


def log_likelihood(model, text, continuation):
    ids = torch.tensor([list((text + continuation).encode())])
    with torch.no_grad():
        scores = model(ids, use_cache=False).logits.log_softmax(-1)[0, :-1]
    return scores.gather(1, ids[0, 1:, None])[len(text.encode()) - 1:].sum().item()


class LmEval(Case):
    def test_choices_and_generated_text(self):
        run_dir = self.train("train.steps=60", "model.max_position_embeddings=128", "model.num_hidden_layers=3")
        checkpoint, tasks = step_dir(run_dir, 60), self.tmp / "tasks"
        model = load(checkpoint)
        draw = random.Random(4)
        choices = [{"text": f"{name} {verb}", "choices": ["apples.", "books.", "xq#."], "label": draw.randrange(3)}
                   for name in ("anna", "boris", "clara", "david") for verb in ("sees", "takes", "likes")]
        texts = [{"text": row["text"] + " " * (i % 2)} for i, row in enumerate(choices)]
        for i, row in enumerate(texts):  # half of the answers are wrong
            ids = torch.tensor([list(row["text"].encode())])
            out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1]:]
            row["answer"] = bytes(x for x in out.tolist() if x < 256).decode(errors="replace").split(".")[0] + "!" * (i % 2)
        tasks.mkdir()
        for name, yaml, rows in (("choose", CHOICE, choices), ("continue", GENERATION, texts)):
            data = tasks / f"{name}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            (tasks / f"{name}.yaml").write_text(yaml.replace("FILE", str(data)))
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
             f"pretrained={checkpoint},trust_remote_code=True,dtype=float32", "--tasks", "choose,continue", "--include_path",
             str(tasks), "--device", "cpu", "--batch_size", "5", "--output_path", str(tasks / "out")],
            env={**os.environ, "HF_HOME": str(self.tmp / "hf"), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            timeout=600)
        self.assertEqual(done.returncode, 0, done.stderr[-3000:])
        results = json.loads(next((tasks / "out").rglob("results_*.json")).read_text())["results"]

        scores = [[log_likelihood(model, row["text"], " " + choice) for choice in row["choices"]] for row in choices]
        best = [max(range(3), key=row.__getitem__) for row in scores]
        accuracy = sum(b == row["label"] for b, row in zip(best, choices)) / len(choices)
        self.assertEqual(results["choose"]["acc,none"], accuracy)
        self.assertEqual(results["continue"]["exact_match,none"], 0.5)
