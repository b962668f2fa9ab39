"""The terminal's side of a conversation: a process of its own, beside the ranks."""
