#!/usr/bin/env bash
# Lint, dead code and types, without the tests: what an editor's save hook or a commit hook wants.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
"$python" -m ruff check .
"$python" -m vulture
"$python" -m mypy
