"""Divide checkpoints for any number of ranks, offline: bytes are copied, nothing is computed."""
