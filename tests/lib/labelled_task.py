"""A task with labels that a tiny model learns in a second: at each mark, predict a digit made from the one before it."""

import numpy as np

from tests.lib.tiny import write_labels, write_shard

LENGTH, MARK, VOCABULARY = 16, 8, 9  # digits are 0 to 7


def answers(tokens):
    """The labels of sequences [n, LENGTH]: -1 but at marks."""
    before = np.roll(tokens, 1, axis=1)
    return np.where((tokens == MARK) & (before != MARK), (3 * before + 2) % 8, -1)


def sequences(count, seed):
    """[count, LENGTH], each with none to three marks."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 8, (count, LENGTH))
    for row in tokens:
        row[rng.choice(np.arange(1, LENGTH), size=rng.integers(0, 4), replace=False)] = MARK
    return tokens


def write_task(shard, tokens, labels=None):
    """One shard of sequences and its labels. A last token fills up the shard, and does not count."""
    labels = answers(tokens) if labels is None else labels
    write_shard(shard, np.append(tokens, 0))
    write_labels(shard, np.append(labels, -1))


CONFIG = f"""\
[model]
vocab_size = {VOCABULARY}
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 64
layer_pattern = iha_local mha_global

[train]
seq_len = {LENGTH}
micro_batch = 4
batch_tokens = {24 * LENGTH}
epochs = 9
patience = 3
best_by = exact
lr = 2e-2

[system]
device = cpu
precision = fp32
threads = 1

[data]
train = train.bin
val = val.bin

[run]
dir = run
eval_every = 5
"""


def make_task(folder):
    """train.bin (480 sequences: 20 steps an epoch), val.bin (50) and task.ini in a folder."""
    write_task(folder / "train.bin", sequences(480, 1))
    write_task(folder / "val.bin", sequences(50, 2))
    (folder / "task.ini").write_text(CONFIG)
    return folder / "task.ini"
