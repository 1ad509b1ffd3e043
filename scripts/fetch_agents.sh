#!/usr/bin/env bash
# Install the coding agents of `pytest -m agents` into a directory, from npm and PyPI, with the versions that
# docs/CLIENTS.md names: 1.8 GB in all. Open WebUI, 7.4 GB more, is installed if it is named.
# Usage: scripts/fetch_agents.sh DIR [open-webui], then TINYVLLM_AGENTS=DIR pytest -m agents.
set -euo pipefail
[ $# -eq 1 ] || { [ $# -eq 2 ] && [ "$2" = open-webui ]; } || { echo "usage: $0 DIR [open-webui]" >&2; exit 2; }
mkdir -p "$1"
cd "$1"
[ -f package.json ] || echo '{"private": true}' >package.json
# Claude Code asks for Node 22 to install, but runs without Node; opencode likewise.
npm install --no-audit --no-fund --ignore-scripts \
  @anthropic-ai/claude-code@2.1.332 @openai/codex@0.171.0 opencode-ai@1.18.33 @continuedev/cli@1.5.47
# They put the binary of this platform in place.
(cd node_modules/@anthropic-ai/claude-code && node install.cjs)
(cd node_modules/opencode-ai && node postinstall.mjs)
# Python 3.11 or 3.12, each in an environment of its own: they pin what they depend on.
python3 -m venv aider
aider/bin/pip install --quiet aider-chat==0.86.2
if [ "${2-}" = open-webui ]; then
  python3 -m venv open-webui
  open-webui/bin/pip install --quiet open-webui==0.12.4
fi
for name in claude codex opencode cn; do
  printf '%s %s\n' "$name" "$(HOME="$PWD" node_modules/.bin/$name --version 2>/dev/null)"
done
