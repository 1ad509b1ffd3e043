#!/usr/bin/env bash
# From a fresh checkout to a server on http://127.0.0.1:8000: set up what is missing, fetch the default model, serve it.
# Arguments are those of `tinyvllm serve`: bash scripts/serve.sh --port 9000
set -euo pipefail
. "$(dirname "$0")/setup.sh"

set_up
"$venv/bin/tinyvllm" pull "$default_model"
exec "$venv/bin/tinyvllm" serve "$default_model" "$@"
