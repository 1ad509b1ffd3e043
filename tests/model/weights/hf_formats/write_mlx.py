"""Write data/mlx.safetensors: matrices that MLX has quantized, and the values that it gives them back, in float32.

With the package mlx (on Linux mlx[cpu]): python -m tests.model.weights.hf_formats.write_mlx
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data" / "mlx.safetensors"
ROWS, COLS = 4, 256
# module, and what config.json says about it
CASES: dict[str, dict[str, Any]] = {
    f"affine{bits}_g{group}_{dtype}": {"bits": bits, "group_size": group}
    for i, bits in enumerate((1, 2, 3, 4, 5, 6, 8))
    for j, group in enumerate((32, 64, 128))
    for dtype in [("bfloat16", "float16", "float32")[(i + j) % 3]]
} | {
    mode: {"bits": bits, "group_size": group, "mode": mode}
    for mode, bits, group in (("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16))
}


def main() -> None:
    import mlx.core as mx

    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for name, case in CASES.items():
        dtype = getattr(mx, name.rpartition("_")[2]) if "mode" not in case else mx.bfloat16
        values = mx.array(rng.standard_normal((ROWS, COLS)).astype(np.float32)).astype(dtype)
        codes, scales, *biases = mx.quantize(values, **case)
        tensors |= {f"{name}.weight": codes, f"{name}.scales": scales}
        wide = [biases[0].astype(mx.float32)] if biases else []
        if biases:
            tensors[f"{name}.biases"] = biases[0]
            scales = scales.astype(mx.float32)  # MLX computes in the dtype of the scales, and would round
        tensors[f"{name}.expected"] = mx.dequantize(codes, scales, *wide, **case, dtype=mx.float32)
    DATA.parent.mkdir(exist_ok=True)
    mx.save_safetensors(str(DATA), tensors, {"about": f"quantized and dequantized by mlx {mx.__version__}"})
    print(f"wrote {DATA}, {DATA.stat().st_size} bytes")


if __name__ == "__main__":
    main()
