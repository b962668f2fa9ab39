"""Make quantized checkpoints offline, in one process: folders of 8-bit or 4-bit weights, or GGUF files."""
