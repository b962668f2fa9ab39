"""Making quantized checkpoints: weights of 8 or 4 bits from weights of 16, offline, in one process."""
