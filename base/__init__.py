"""What every other package may import, by the standard library alone: habits of a process.

Not here: anything that knows of models, ranks or torch.
"""
