"""The inner loops that bound the speed of a step: products with few rows, attention over a cache.

What torch offers is used where it reaches the machine's limit; what is here exists because it does not.
Traceable operators over C++ loops for each instruction set; each has a slow reference in torch.
"""
