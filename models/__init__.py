"""The models themselves, one readable file per family, and what surrounds them.

Reading order: config, llama, load, tokenizer, chat, sampling, generate (the plain loop, the oracle for
`engine`).
"""
