"""Benchmarks: `python -m bench cpu` (moekern against transformers' own backends) and `python -m bench ops`."""
