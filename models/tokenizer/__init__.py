"""Text to tokens and back, from every kind of file that tokenizers come in."""
