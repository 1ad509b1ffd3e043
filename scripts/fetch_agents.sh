#!/usr/bin/env bash
# Install the coding agents of `pytest -m agents` into a directory: 1 GB in all, from npm, with the versions that
# docs/CLIENTS.md names. Usage: scripts/fetch_agents.sh DIR, then TINYVLLM_AGENTS=DIR pytest -m agents.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
mkdir -p "$1"
cd "$1"
[ -f package.json ] || echo '{"private": true}' >package.json
# Claude Code asks for Node 22 to install, but runs without Node; opencode likewise.
npm install --no-audit --no-fund --ignore-scripts \
  @anthropic-ai/claude-code@2.1.332 @openai/codex@0.171.0 opencode-ai@1.18.33
# They put the binary of this platform in place.
(cd node_modules/@anthropic-ai/claude-code && node install.cjs)
(cd node_modules/opencode-ai && node postinstall.mjs)
for name in claude codex opencode; do
  printf '%s %s\n' "$name" "$(HOME="$PWD" node_modules/.bin/$name --version 2>/dev/null)"
done
