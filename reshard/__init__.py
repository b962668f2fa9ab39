"""Checkpoints divided for any number of ranks, offline: bytes are moved, nothing is computed."""
