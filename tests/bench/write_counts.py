"""Update the recorded counts of the tiny model's steps, after a change that is meant to raise them:

python -m tests.bench.write_counts
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from tests.builders import write_tiny_hf_llama

BASELINE = Path(__file__).parent / "data" / "tiny_counts.json"


def main() -> None:
    os.environ.setdefault("DEV", "CPU")
    from tests.bench.planted import make_runner, measure, only_counts

    with tempfile.TemporaryDirectory() as folder:
        figures = measure(make_runner(write_tiny_hf_llama(Path(folder) / "tiny")))
    BASELINE.parent.mkdir(exist_ok=True)
    BASELINE.write_text(json.dumps(only_counts(figures), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {BASELINE}")


if __name__ == "__main__":
    main()
