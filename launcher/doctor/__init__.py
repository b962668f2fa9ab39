"""The `doctor` command: a report on this machine, with a trial of the placement."""
