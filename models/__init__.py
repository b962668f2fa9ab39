"""The models, one readable file per kind of block, and what they need: configuration, loading,
tokenizers, chat templates and sampling.

Reading order: config, llama, load, tokenizer, chat, sampling, reference (the plain loop, the test
oracle of `engine`).
"""
