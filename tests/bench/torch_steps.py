"""What `bench --torch PYTHON` starts: optimizer steps in PyTorch, one for each line on standard input.

    threads N                         answered by "ready" and PyTorch's version
    MODEL PRECISION MODE              gpt2 or quickstart, fp32 or bf16, eager or compiled; answered by seconds,
                                      or by "failed" and why

The models are those of the benchmark: GPT-2 124M on 4 x 64 tokens, and the configuration given as argument. Attention is
scaled_dot_product_attention. Of ways to write the rest, those that were fastest in eager mode: head mixing and collapse
are multiplied into the projections beside them, and a layer with a window attends in blocks as long as the window, each
to itself and the block before. bf16 is autocast, with fp32 parameters, as PyTorch's documentation recommends. AdamW is
the fused one; gradients are clipped.
"""

import configparser
import math
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

GPT2 = {"vocab_size": 50257, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "layer_pattern": "mha_global", "position_embedding": "learned", "norm": "layernorm",
        "bias": True, "seq_len": 64, "micro_batch": 4, "num_pseudo_heads": 1}


def read_config(path):
    """The quickstart's configuration, and the defaults of what it leaves out."""
    ini = configparser.ConfigParser()
    if not ini.read(path):
        sys.exit(f"torch_steps.py: cannot read {path}")
    given = dict(ini["model"]) | dict(ini["train"])
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "num_pseudo_heads", "seq_len", "micro_batch")
    return {name: int(given[name]) for name in names} | {
        "layer_pattern": given["layer_pattern"], "position_embedding": "rope", "norm": "rmsnorm", "bias": False}


def layer_types(pattern, count):
    kinds = []
    for item in pattern.split():
        kind, _, times = item.partition("*")
        kinds += [kind] * int(times or 1)
    return [kinds[i % len(kinds)] for i in range(count)]


def split_window(x, length):
    """[B,S,H,d] -> [B * blocks, H, 2 * length, d]: each block after the one before; zeros before the first."""
    blocks = x.unflatten(1, (-1, length))
    before = F.pad(blocks[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
    return torch.cat([before, blocks], dim=2).flatten(0, 1).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, config, kind):
        super().__init__()
        C, self.H, T = config["hidden_size"], config["num_attention_heads"], config["seq_len"]
        self.iha = kind.startswith("iha")
        self.P = config["num_pseudo_heads"] if self.iha else 1
        self.qkv = nn.Linear(C, 3 * C, bias=config["bias"])
        self.out = nn.Linear(C, C, bias=config["bias"])
        S, d = T * self.P, C // self.H
        self.window = 0
        if self.iha:
            identity = torch.eye(self.H).repeat(self.P, 1)  # [P * H, H]
            self.alpha = nn.Parameter(identity.repeat(3, 1, 1))
            collapse = torch.zeros(self.H, self.P, self.H)
            collapse[:, -1] = torch.eye(self.H)
            self.collapse = nn.Parameter(collapse.flatten(1))  # [H, P * H]
        if kind == "iha_local":
            length = self.window = max(self.P, self.P * (T // (2 * self.P * self.P)))
            assert S % length == 0
            query, key = torch.arange(length)[:, None] + length, torch.arange(2 * length)[None, :]
            see = (key <= query) & (query - key < length)
            first = see & (key >= length)
            see = torch.cat([first[None], see[None].expand(S // length - 1, -1, -1)])
            mask = torch.zeros(see.shape).masked_fill(~see, -math.inf)[:, None]
            self.register_buffer("mask", mask.repeat(config["micro_batch"], 1, 1, 1))
        elif not kind.endswith("global"):
            sys.exit(f"torch_steps.py: layers of type {kind} are not written here")
        self.rope = config["position_embedding"] == "rope"
        if self.rope:
            angle = torch.arange(S)[:, None] * 10000.0 ** (-2.0 * torch.arange(d // 2) / d)
            self.register_buffer("cos", torch.cos(angle)[:, None])
            self.register_buffer("sin", torch.sin(angle)[:, None])

    def rotate(self, x):
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, a * self.sin + b * self.cos], dim=-1).to(x.dtype)

    def forward(self, x):
        B, T, C = x.shape
        H, P = self.H, self.P
        if self.iha:
            mixed = torch.bmm(self.alpha, self.qkv.weight.view(3, H, -1)).view(-1, C)
            q, k, v = F.linear(x, mixed).view(B, T, 3, P * H, -1).unbind(2)
        else:
            q, k, v = self.qkv(x).view(B, T, 3, H, -1).unbind(2)
        q, k, v = (y.reshape(B, T * P, H, -1) for y in (q, k, v))
        if self.rope:
            q, k = self.rotate(q), self.rotate(k)
        if self.window:
            length = self.window
            q = q.unflatten(1, (-1, length)).flatten(0, 1).transpose(1, 2)
            k, v = split_window(k, length), split_window(v, length)
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask.to(q.dtype))
        else:
            o = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True)
        o = o.transpose(1, 2).reshape(B, T, -1)
        if self.iha:
            weight = torch.matmul(self.out.weight.view(C, H, -1).transpose(1, 2), self.collapse)  # [C, d, P * H]
            return F.linear(o, weight.transpose(1, 2).reshape(C, -1))
        return self.out(o)


class Block(nn.Module):
    def __init__(self, config, kind):
        super().__init__()
        C, F_, bias = config["hidden_size"], config["intermediate_size"], config["bias"]
        norm = nn.LayerNorm if config["norm"] == "layernorm" else nn.RMSNorm
        self.attn_norm, self.mlp_norm = norm(C, eps=1e-5), norm(C, eps=1e-5)
        self.attn = Attention(config, kind)
        self.up, self.down = nn.Linear(C, F_, bias=bias), nn.Linear(F_, C, bias=bias)

    def forward(self, x):
        x = x + self.attn(self.attn_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, V = config["hidden_size"], config["vocab_size"]
        self.embed = nn.Embedding(V, C)
        self.positions = nn.Embedding(1024, C) if config["position_embedding"] == "learned" else None
        kinds = layer_types(config["layer_pattern"], config["num_hidden_layers"])
        self.layers = nn.ModuleList(Block(config, kind) for kind in kinds)
        norm = nn.LayerNorm if config["norm"] == "layernorm" else nn.RMSNorm
        self.final_norm = norm(C, eps=1e-5)
        for name, p in self.named_parameters():
            if p.dim() > 1 and "alpha" not in name and "collapse" not in name:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, targets):
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[:tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.final_norm(x), self.embed.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Training:
    """One model and its optimizer: precisions and modes differ in how a step computes, and share them."""

    def __init__(self, config):
        torch.manual_seed(1)
        self.model = Model(config)
        decayed = [p for n, p in self.model.named_parameters() if p.dim() > 1 and "alpha" not in n and "collapse" not in n]
        others = [p for p in self.model.parameters() if all(p is not q for q in decayed)]
        self.optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                           lr=1e-4, betas=(0.9, 0.95), fused=True)
        shape = (config["micro_batch"], config["seq_len"])
        self.tokens, self.targets = (torch.randint(config["vocab_size"], shape) for _ in range(2))
        self.loss = {"eager": self.model, "compiled": torch.compile(self.model, dynamic=False)}

    def step(self, precision, mode):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = self.loss[mode](self.tokens, self.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - start


def main():
    configs = {"gpt2": GPT2, "quickstart": None}
    current, training = None, None
    for line in sys.stdin:
        words = line.split()
        if words[0] == "threads":
            torch.set_num_threads(int(words[1]))
            print("ready", torch.__version__.partition("+")[0], flush=True)
            continue
        name, precision, mode = words
        try:
            if name != current:
                training = None  # one model at a time in memory
                training = Training(configs[name] or read_config(sys.argv[1]))
                current = name
            print(training.step(precision, mode), flush=True)
        except Exception as error:
            print("failed", str(error).strip().partition("\n")[0][:200], flush=True)


if __name__ == "__main__":
    main()
