#!/usr/bin/env bash
# Lint, dead code and types, without the tests: for an editor's save hook or a commit hook.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
"$python" -m ruff check .
"$python" -m vulture
"$python" -m mypy
