"""Benchmarks: `python -m bench cpu` (moekern against transformers' own backends), `ops` (each op) and `report`."""
