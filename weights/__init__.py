"""What is a weight: file formats behind one lazy interface, and one canonical naming.

A `Checkpoint` maps canonical names (those of the Hugging Face Llama family) to entries that read any
slice on demand, so that each rank reads its own part of a file and nothing else.
"""
