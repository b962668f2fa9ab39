"""Measurements. Each file asks one question; the last line it prints is JSON."""
