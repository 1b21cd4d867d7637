"""Make a cache: from images to shards, in one process, in many, or on a Ray cluster."""
