"""The report on this machine, and what it finds out by trying."""
