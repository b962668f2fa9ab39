"""One reader for each file format, behind `weights.checkpoint`."""
