"""generate() gives the same with any cache as without one, also in batches that are padded on the left."""

import torch
from transformers import DynamicCache, StaticCache

from tests.hf.models import NAMES, Folder, config_of, in_float64, load, write_golden

NEW = 14
CAUSAL = [name for name in NAMES if config_of(name)["causal"] and "segments" not in name]


def tokens_of(model, *shape):
    return torch.randint(1, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(5))


def generate(model, tokens, **options):
    return model.generate(tokens, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)


def logits_of(model, tokens):
    """In float64 and in fp32, without a cache."""
    def run(m):
        return m(tokens, use_cache=False).logits
    return in_float64(model, run), run(model)


class Generate(Folder):
    def models(self, *attentions):
        for name in CAUSAL:
            path = write_golden(self.new(), name, positions=64)
            for attention in attentions:
                with self.subTest(name, attention=attention):
                    yield load(path, attn_implementation=attention)

    def test_caches(self):
        for model in self.models("sdpa", "eager"):
            tokens = tokens_of(model, 2, 9)
            expected = generate(model, tokens, use_cache=False)
            self.assertEqual(expected.shape, (2, 9 + NEW))
            self.assertTrue(torch.equal(generate(model, tokens), expected), "dynamic")
            self.assertTrue(torch.equal(generate(model, tokens, cache_implementation="static"), expected), "static")

    def test_left_padding(self):
        """Of the row that is padded, what the model generates from it alone."""
        for model in self.models("sdpa"):
            tokens, mask = tokens_of(model, 2, 9), torch.ones(2, 9, dtype=torch.long)
            tokens[1, :4] = mask[1, :4] = 0
            long, short = generate(model, tokens[:1])[0], generate(model, tokens[1:, 4:])[0]
            for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
                found = generate(model, tokens, attention_mask=mask, **options)
                self.assertTrue(torch.equal(found[0], long) and torch.equal(found[1, 4:], short), options)

    def test_padding_changes_no_logit(self):
        """In forward itself, on either side, with positions that it counts from the mask."""
        for model in self.models("sdpa", "eager"):
            tokens = tokens_of(model, 1, 9)
            exact, plain = logits_of(model, tokens)
            for before, after in ((3, 0), (0, 3)):
                padding = torch.zeros(1, before, dtype=torch.long), torch.zeros(1, after, dtype=torch.long)
                mask = torch.cat([padding[0], torch.ones_like(tokens), padding[1]], 1)
                found = model(torch.cat([padding[0], tokens, padding[1]], 1), attention_mask=mask, use_cache=False).logits
                self.check_error(found[:, before:before + 9], plain, exact)
                self.assertTrue(found.isfinite().all())

    def test_logits_in_pieces(self):
        for model in self.models("sdpa", "eager"):
            tokens = tokens_of(model, 2, 25)
            exact, plain = logits_of(model, tokens)
            for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
                found = [model(piece, cache=cache, use_cache=True).logits for piece in tokens.split([5, 1, 7, 1, 1, 10], 1)]
                self.check_error(torch.cat(found, 1), plain, exact, type(cache).__name__)

    def test_local_layers_keep_their_window(self):
        model = load(write_golden(self.new(), "model_iha_mixed"))
        config, cache = model.config, DynamicCache(config=model.config)
        model(tokens_of(model, 1, 25), cache=cache, use_cache=True)
        windows = [config.window_tokens(kind) for kind in config.iha_layer_types]
        expected = [config.sliding_window - 1 if window else 25 for window in windows]
        self.assertLess(min(expected), 25)
        self.assertEqual([layer.keys.shape[2] for layer in cache.layers], expected)

    def test_old_name_of_the_cache(self):
        model = load(write_golden(self.new(), "model_iha_paper"))
        tokens = tokens_of(model, 1, 12)
        cache = DynamicCache(config=model.config)
        model(tokens[:, :7], past_key_values=cache, use_cache=True)
        found = model(tokens[:, 7:], past_key_values=cache, use_cache=True).logits
        exact, plain = logits_of(model, tokens)
        self.check_error(found, plain[:, 7:], exact[:, 7:])

    def test_beams_and_sampling(self):
        for model in self.models("sdpa"):
            tokens = tokens_of(model, 2, 6)
            beams = [generate(model, tokens, num_beams=3, use_cache=cache) for cache in (True, False)]
            self.assertTrue(torch.equal(*beams), "beams")
            samples = []
            for cache in (True, False):
                torch.manual_seed(3)
                samples.append(model.generate(tokens, max_new_tokens=NEW, do_sample=True, temperature=0.8, top_p=0.9,
                                              pad_token_id=0, use_cache=cache))
            self.assertTrue(torch.equal(*samples), "samples")

    def test_a_model_that_is_not_causal(self):
        model = load(write_golden(self.new(), "model_iha_bidirectional"))
        tokens = tokens_of(model, 1, 5)
        with self.assertRaisesRegex(ValueError, "not causal"):
            generate(model, tokens)
        with self.assertRaisesRegex(ValueError, "not causal"):
            model(tokens, use_cache=True)
        self.assertIsNone(model(tokens).past_key_values)
