"""Make quantized checkpoints offline, in one process: folders of 8 or 4 bits, or GGUF files."""
