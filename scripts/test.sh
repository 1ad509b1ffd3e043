#!/usr/bin/env bash
# Set up what is missing, fetch the default model, then lint, types and tests.
# Arguments are pytest's: bash scripts/test.sh tests/scheduling -k preempt
set -euo pipefail
. "$(dirname "$0")/setup.sh"

export DEV="${DEV:-CPU}" # the device that every machine has
set_up dev
"$venv/bin/tinyvllm" pull "$default_model"
cd "$repo"
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m mypy
exec "$venv/bin/python" -m pytest "$@"
