"""Write data/mlx.json: greedy tokens of mlx-lm for the models of mlx.py, in float32, and the names of the tensors that
mlx_lm.convert writes for them.

With mlx and mlx-lm (on Linux mlx[cpu]): python -m tests.families.write_mlx_references
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.families.mlx import DEFAULT, MODELS, write_mlx
from tests.families.recipe import mlx_weights, write_hf

DATA = Path(__file__).parent / "data" / "mlx.json"
# mlx_lm.convert reads its unquantized experts only by mlx-lm's own names
RENAMED = ("gpt_oss",)
PROMPT = "two are company, three are none"
NUM_STEPS = 48
LEAST_GAP = 0.003  # between the two likeliest logprobs: what sums in another order do not turn round


def main() -> None:
    written: dict[str, Any] = {"about": f"greedy tokens by mlx-lm {version('mlx-lm')}, mlx {version('mlx')}"}
    for name, recipe in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            files = write_mlx(Path(folder) / "mlx", recipe)
            of_mlx = partial(lambda recipe, weights: mlx_weights(recipe), recipe) if name in RENAMED else None
            plain = write_hf(Path(folder) / "hf", recipe, transform=of_mlx)
            written[name] = {
                "names": converted_names(plain.path, Path(folder) / "converted"),
                "tokens": generate(files.path),
            }
    DATA.write_text(json.dumps(written, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"wrote {DATA}, {DATA.stat().st_size} bytes")


def converted_names(source: Path, target: Path) -> list[str]:
    """Of the first layer's tensors and of those outside of layers."""
    import mlx.core as mx
    from mlx_lm import convert

    convert(str(source), str(target), quantize=True, q_group_size=DEFAULT["group_size"], q_bits=DEFAULT["bits"])
    names = [name for path in target.glob("*.safetensors") for name in mx.load(str(path))]
    return sorted(name for name in names if ".layers." not in name or ".layers.0." in name)


def generate(path: Path) -> list[int]:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(path)
    ids, tokens, gap = list(PROMPT.encode()), [], 1e9
    for _ in range(NUM_STEPS):
        logits = model(mx.array([ids]))[0, -1].astype(mx.float32)  # the whole sequence each time
        best = mx.argsort(-logits)[:2].tolist()
        gap = min(gap, float(logits[best[0]] - logits[best[1]]))
        tokens.append(best[0])
        ids.append(best[0])
    print(f"{path}: {len(set(tokens))} kinds of tokens, smallest gap {gap:.4f}: {tokens}")
    assert gap >= LEAST_GAP, "choose another seed"
    return tokens


if __name__ == "__main__":
    main()
