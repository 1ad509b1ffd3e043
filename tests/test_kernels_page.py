"""docs/KERNELS.md: its Python blocks run in the order of the page, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "KERNELS.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_pages_examples_run() -> None:
    blocks = _BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) == 7
    namespace: dict[str, Any] = {"__name__": "docs_kernels"}
    for number, code in enumerate(blocks, 1):
        exec(compile(code, f"docs/KERNELS.md, block {number}", "exec", dont_inherit=True), namespace)
