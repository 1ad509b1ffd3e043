#!/usr/bin/env bash
# Set up what is missing, fetch the models of the tests, then lint, dead code and types beside the tests.
# Arguments are pytest's, and with any of them tests run in one process: bash scripts/test.sh tests/scheduling -k preempt
set -euo pipefail
. "$(dirname "$0")/setup.sh"

export DEV="${DEV:-CPU}" # the device that every machine has
# Tests start some hundred processes: without compiled modules each would take half a second more.
unset PYTHONDONTWRITEBYTECODE
set_up dev
for model in "$default_model" gemma-3-270m; do
  "$venv/bin/tinyvllm" pull "$model"
done
cd "$repo"
if [ "$#" = 0 ]; then # the whole suite: a worker per core, and what took longest
  set -- -n auto --maxprocesses 4 --durations 25 --durations-min 3
fi
failed=0 # all are run, so that one run says everything
report="$(mktemp)"
trap 'kill "$checks" 2>/dev/null || true; rm -f "$report"' EXIT
check() { # on one core for over a minute, so the others begin the tests
  local failed=0
  "$venv/bin/python" -m ruff check --output-format concise . || failed=1
  "$venv/bin/python" -m vulture || failed=1
  "$venv/bin/python" -m mypy || failed=1
  return "$failed"
}
check >"$report" 2>&1 &
checks="$!"
"$venv/bin/python" -m pytest "$@" || failed=1
wait "$checks" || failed=1
cat "$report"
exit "$failed"
