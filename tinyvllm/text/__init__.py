"""Text in, text out: tokenizers, incremental decoding, stop strings, chat templates. No tinygrad."""
