"""Plain torch, one module per op that gains from one without Triton; used on any device."""
