"""Between text and token ids: tokenizers, incremental decoding, stop strings, chat templates. No tinygrad."""
