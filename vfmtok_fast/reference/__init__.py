"""References in plain torch, one per op of `vfmtok_fast.ops`; they take validated arguments."""
