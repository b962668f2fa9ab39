"""Basics of a process that every other package may import. Uses only the standard library.

Not here: anything that knows of models, ranks or torch.
"""
