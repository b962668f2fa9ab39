"""Checkpoints: every file format behind one lazy interface and one canonical naming.

A `Checkpoint` maps canonical names (those of the Hugging Face Llama family) to entries that read any
slice on demand, so that each rank reads only its own part of a file.
"""
