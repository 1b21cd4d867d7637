"""Memory-bounded torch implementations, one per op that gains from one without Triton."""
