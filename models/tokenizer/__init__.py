"""Text to tokens and back, for every kind of tokenizer file that is supported."""
