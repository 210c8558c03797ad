"""A model on disk: its config, weights, tokenizer and image constants."""
