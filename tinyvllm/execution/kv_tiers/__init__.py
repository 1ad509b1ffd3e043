"""Tiers below the KV pool: copies of cached blocks in host memory and on disk (docs/PREFIX_CACHE.md)."""
