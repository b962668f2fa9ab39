"""The inner loops that bound the speed of a step: linears with few rows, attention over a cache.

torch is used where it reaches the machine's limit; the kernels here exist because elsewhere it does
not. They are traceable operators over C++ loops for each instruction set, each with a slow torch
reference.
"""
