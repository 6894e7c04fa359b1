"""What a run of less than a second needs: the configuration of a tiny model, and shards."""

from pathlib import Path

import numpy as np

import tests.lib.signals  # noqa: F401  (for what tests start)


def tiny_config(data, seq_len, batch_tokens, steps, system, run):
    """The text of a configuration: `data` is the folder of shards, `system` and `run` are further lines."""
    return f"""\
# A model of 8,000 parameters with one interleaved layer.
[model]
vocab_size = 257
hidden_size = 16
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 32
layer_pattern = iha_local mha_global

[train]
seq_len = {seq_len}
micro_batch = 2
batch_tokens = {batch_tokens}
steps = {steps}
lr = 1e-2

[system]
device = cpu
{system}

[data]
train = {data}/train_*.bin
val = {data}/val_*.bin
tokenizer = bytes

[run]
{run}
"""


def write_shard(path, tokens, wide=False, magic=None, version=None, count=None):
    """An llm.c shard; magic, version and count can be given wrong values."""
    header = np.zeros(256, "<i4")
    header[0] = magic if magic is not None else 20240801 if wide else 20240520
    header[1] = version if version is not None else 7 if wide else 1
    header[2] = count if count is not None else len(tokens)
    Path(path).write_bytes(header.tobytes() + np.asarray(tokens, "<u4" if wide else "<u2").tobytes())


def write_labels(shard, labels, magic=20261129, version=1, count=None):
    """The labels beside a shard: an id, -1 (does not count) or -2 (padding) a token."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, count if count is not None else len(labels)
    Path(shard).with_suffix(".labels").write_bytes(header.tobytes() + np.asarray(labels, "<i4").tobytes())
