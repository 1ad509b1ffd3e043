#!/usr/bin/env python3
"""Where the time of an engine goes: `tinyvllm bench breakdown` from a checkout. docs/PROFILING.md reads its output.

python scripts/bench_breakdown.py --model smollm2-135m-instruct --json out.json
"""

from __future__ import annotations

import sys

from tinyvllm.cli import app

if __name__ == "__main__":
    app(["bench", "breakdown", *sys.argv[1:]])
