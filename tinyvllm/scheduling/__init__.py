"""Who computes what in the next step: requests, blocks, policy. Integers and lists; no tinygrad, no text."""
