"""What lies on the disk: the files of a cache, how they are written and read.

OUT/
  manifest.json      what the cache is, and the fingerprint of all that changes tokens
  index.parquet      which pictures it holds, in which order, with which labels
  shards/tokens-00000.safetensors    the tokens
  quarantine/00000.jsonl             the pictures of a shard that could not be read, and why
  COMPLETE.json      written last
"""
