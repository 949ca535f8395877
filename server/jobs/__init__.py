"""Quantization jobs: records in SQLite, one quantizer subprocess at a time."""
