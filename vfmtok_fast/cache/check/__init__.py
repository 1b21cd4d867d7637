"""Looking after a cache: how far it is, whether it is sound, and mending it."""
