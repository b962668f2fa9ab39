"""Basics of a process that every other package may import: the standard library, and rich to draw.

Not here: anything that knows of models, ranks or torch.
"""
