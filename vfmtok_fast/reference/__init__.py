"""Torch-only oracles, one per op, with the names and signatures of `vfmtok_fast.ops`."""
