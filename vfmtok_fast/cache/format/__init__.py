"""The files of a cache (listed in docs/cache.md): how they are written and read."""
