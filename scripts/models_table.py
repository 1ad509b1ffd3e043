"""Write the tables of docs/MODELS.md: python scripts/models_table.py. --check: end with status 1 if they are old."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tinyvllm.bench.model_tables import sections  # noqa: E402

PAGE = ROOT / "docs" / "MODELS.md"
BEGIN, END = "<!-- tables: python scripts/models_table.py -->", "<!-- end of tables -->"


def written(text: str) -> str:
    """The page's text with current tables."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{sections()}\n\n{END}{after}"


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    current = written(text)
    if "--check" in sys.argv[1:]:
        return 0 if current == text else 1
    PAGE.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
