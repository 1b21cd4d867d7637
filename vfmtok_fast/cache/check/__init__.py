"""Maintain a cache: see how far it is, whether it is sound, and repair it."""
