"""Plain torch that beats the reference without Triton, one module per op; used on any device."""
