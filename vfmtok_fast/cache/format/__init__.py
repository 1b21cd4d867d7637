"""The files of a cache (docs/cache.md lists them): how they are written and read."""
