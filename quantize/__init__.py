"""Make quantized checkpoints offline, in one process: 8-bit or 4-bit weights from 16-bit weights."""
