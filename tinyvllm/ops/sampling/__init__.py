"""From logits to token ids, in the captured graph."""
