#!/usr/bin/env python3
"""Run `tinyvllm bench breakdown` from a checkout: where an engine's time goes. docs/PROFILING.md explains the output.

python scripts/bench_breakdown.py --model smollm2-135m-instruct --json out.json
"""

from __future__ import annotations

import sys

from tinyvllm.cli.commands import app

if __name__ == "__main__":
    app(["bench", "breakdown", *sys.argv[1:]])
