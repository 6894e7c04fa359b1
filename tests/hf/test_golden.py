"""The model in PyTorch has the float64 reference's loss, logits and gradients, in every golden case, with an error of at
most three times that of plain fp32: what tests/unit/test_golden.c asks of the program."""

from unittest import mock

import numpy as np
import torch

from tests.hf.models import NAMES, Folder, RoundedToBf16, config_of, golden, in_float64, load, write_checkpoint, write_golden

TIMES = 3
ROUNDING = 2.0**-23


def inputs(data):
    """Arguments of forward: tokens, and where there are segments the mask and the positions that they mean."""
    tokens = torch.tensor(data["tokens"]).long()
    if "segments" not in data:
        return {"input_ids": tokens}
    first = torch.tensor(data["segments"]).long()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return {"input_ids": tokens, "attention_mask": (first[:, :, None] == first[:, None, :])[:, None],
            "position_ids": positions - first if data["restart_positions"][0] else positions}


def loss_of(logits, targets):
    targets = torch.tensor(targets).long()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.where(targets >= 0, -100).flatten())


class Golden(Folder):
    def check(self, what, found, expected, plain, floor):
        error = np.linalg.norm(found.detach().double().numpy() - expected)
        self.assertLessEqual(error, TIMES * max(plain, floor), what)

    def test_loss_logits_and_gradients(self):
        for name in NAMES:
            data, path = golden(name), write_golden(self.new(), name)
            gradients = np.sqrt(sum(np.sum(x**2) for key, x in data.items() if key.startswith("grad.")))
            for attention in ("sdpa", "eager"):
                with self.subTest(name, attention=attention):
                    model = load(path, attn_implementation=attention).train()
                    logits = model(**inputs(data), use_cache=False).logits
                    loss = loss_of(logits, data["targets"])
                    loss.backward()
                    self.check("loss", loss, data["loss"][0], data["plain32.loss"][0], ROUNDING * data["loss"][0])
                    self.check("logits", logits, data["logits"], data["plain32.logits"][0],
                               ROUNDING * np.linalg.norm(data["logits"]))
                    for tensor, parameter in model.named_parameters():
                        self.check(tensor, parameter.grad, data[f"grad.{tensor}"], data[f"plain32.grad.{tensor}"][0],
                                   ROUNDING * gradients)

    def test_checkpointing_changes_no_gradient(self):
        for name in ("model_iha_mixed", "model_mha_gpt2"):
            data, path = golden(name), write_golden(self.new(), name)
            found = []
            for checkpointing in (False, True):
                model = load(path).train()
                if checkpointing:
                    model.activation_checkpointing_enable()
                    self.assertTrue(model.is_activation_checkpointing)
                loss_of(model(**inputs(data)).logits, data["targets"]).backward()
                found.append([parameter.grad for parameter in model.parameters()])
            for plain, recomputed in zip(*found):
                self.assertTrue(torch.equal(plain, recomputed), name)

    def test_bf16(self):
        """No farther from float64 than three times the plain computation in bf16."""
        for name in ("model_iha_mixed", "model_mha_llama", "model_iha_paper", "model_gqa", "model_qk_norm"):
            data, path = golden(name), write_golden(self.new(), name)
            rounded = load(path, attn_implementation="eager", dtype=torch.bfloat16).double()
            with RoundedToBf16(), torch.no_grad():
                plain = rounded(**inputs(data), use_cache=False).logits
            for attention in ("sdpa", "eager"):
                model = load(path, attn_implementation=attention, dtype=torch.bfloat16)
                self.assertTrue(all(p.dtype == torch.bfloat16 for p in model.parameters()))
                logits = model(**inputs(data), use_cache=False).logits
                self.assertEqual(logits.dtype, torch.bfloat16)
                self.check_error(logits.detach(), plain, torch.tensor(data["logits"]), (name, attention))

    def test_sdpa_gets_no_mask_where_none_is_needed(self):
        """So that it can take its flash kernels: attention that is causal over virtual tokens, or not causal at all."""
        for name, causal in (("model_iha_flat_virtual_full", True), ("model_mha_gpt2", True), ("model_gqa", True),
                             ("model_iha_bidirectional", False), ("model_iha_token_token_full", True)):
            model = load(write_golden(self.new(), name), attn_implementation="sdpa")
            calls = []

            def attend(*args, **kwargs):
                calls.append((kwargs.get("attn_mask"), kwargs["is_causal"]))
                return plain(*args, **kwargs)

            plain = torch.nn.functional.scaled_dot_product_attention
            with mock.patch("torch.nn.functional.scaled_dot_product_attention", attend):
                model(**inputs(golden(name)), use_cache=False)
            for kind, (mask, is_causal) in zip(model.config.iha_layer_types, calls, strict=True):
                needed = kind.endswith("local") or (kind.startswith("iha") and model.config.iha_mask == "token")
                with self.subTest(name, kind=kind):
                    self.assertEqual((mask is not None, is_causal), (needed, causal and not needed))

    def test_what_a_forward_returns(self):
        data, path = golden("model_iha_mixed"), write_golden(self.new(), "model_iha_mixed")
        model = load(path, attn_implementation="eager")
        tokens = inputs(data)["input_ids"]
        B, T = tokens.shape
        out = model(tokens, labels=tokens, output_attentions=True, output_hidden_states=True)
        config = model.config
        self.assertEqual(len(out.hidden_states), config.num_hidden_layers + 1)
        for kind, weights in zip(config.iha_layer_types, out.attentions, strict=True):
            S = T * config.pseudo_heads(kind)
            self.assertEqual(weights.shape, (B, config.num_attention_heads, S, S))
            self.assertTrue(torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-6))
        self.assertTrue(torch.allclose(out.loss, loss_of(out.logits[:, :-1], tokens[:, 1:].numpy()), rtol=1e-6))
        last = model(tokens, logits_to_keep=1).logits
        self.assertEqual(last.shape, (B, 1, config.vocab_size))
        exact = in_float64(model, lambda m: m(tokens, use_cache=False).logits)
        self.check_error(last[:, 0], out.logits[:, -1], exact[:, -1])
        as_tuple = model(tokens, use_cache=False, return_dict=False)
        self.assertTrue(torch.equal(as_tuple[0], out.logits))
        embedded = model(inputs_embeds=model.get_input_embeddings()(tokens), use_cache=False)
        self.assertTrue(torch.equal(embedded.logits, out.logits))

    def test_another_s_keys_are_refused_by_name(self):
        cases = ({"layer_types": ["moe_global"] * 2}, {"norm": "batchnorm"}, {"num_hidden_layers": 3})
        for case in cases:
            config = config_of("model_mha_gpt2") | case
            with self.subTest(case), self.assertRaisesRegex(ValueError, str(next(iter(case)))):
                load(write_checkpoint(self.new(), config, {"x": np.zeros(1, "f")}))
