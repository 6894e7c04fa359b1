/* Names of the token that ends a text, in the order they are looked for. The one list: tokenizer_json.c includes
 * it, and prepare_tokenizers.py reads its lines. */
"<|endoftext|>",
"<|end_of_text|>",
"<|end▁of▁sentence|>",
"<｜end▁of▁sentence｜>",
"</s>",
"<eos>",
"<|eos|>",
"[EOS]",
"<EOS>",
"<EOT>",
