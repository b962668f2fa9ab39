"""Benchmarks. Each file answers one question; the last line of its output is JSON."""
