"""Making a cache: from pictures to shards, by one process, many, or a Ray cluster."""
