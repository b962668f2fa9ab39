"""The terminal side of a conversation: a separate process beside the ranks."""
