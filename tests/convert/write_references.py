"""Write data/encoded.json: small matrices as ggml and MLX quantize them. Nothing of tinyvllm computes anything here.

    pip install "mlx[cpu]" xllamacpp numpy        # in a separate environment, on Linux
    PYTHONPATH=. python tests/convert/write_references.py

ggml's own C function is called in xllamacpp's library, without an importance matrix; MLX's is mlx.core.quantize.
"""

from __future__ import annotations

import base64
import ctypes
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data" / "encoded.json"
ROWS, COLUMNS = 12, 512
# ggml's types by number (ggml.h), with the weights and bytes of a block
GGML_TYPES = {
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "IQ4_NL": (20, 32, 18),
}
MLX_CASES = [(bits, group, "bfloat16") for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
MLX_CASES += [(4, 64, "float32"), (3, 32, "float16")]


def make_matrix() -> np.ndarray:
    """(ROWS, COLUMNS) float32: rows of normal weights, some with outliers; zeros, constants and one-sided rows."""
    rng = np.random.default_rng(13)
    values = (0.05 * rng.standard_normal((ROWS, COLUMNS))).astype(np.float32)
    values[0] = 0
    values[1, :256] = 0.25
    values[2] = -0.1
    values[3] = np.abs(values[3])
    values[4, ::97] *= 20
    values[5, :32] = 0
    return values


def ggml_bytes(values: np.ndarray) -> dict[str, str]:
    import xllamacpp

    (library,) = Path(xllamacpp.__file__).parent.glob("*.so")
    quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    found = {}
    for name, (number, block_size, block_bytes) in GGML_TYPES.items():
        encoded = np.zeros(ROWS * COLUMNS // block_size * block_bytes, np.uint8)
        quantize(number, values.ctypes.data, encoded.ctypes.data, 0, ROWS, COLUMNS, None)
        found[name] = base64.b64encode(encoded.tobytes()).decode()
    return found


def mlx_bytes(values: np.ndarray) -> dict[str, list[str]]:
    """Codes, scales and biases as bytes, by "bits-group-dtype"."""
    import mlx.core as mx

    found = {}
    for bits, group, dtype in MLX_CASES:
        arrays = mx.quantize(mx.array(values).astype(getattr(mx, dtype)), group_size=group, bits=bits)
        raw = [np.array(one.view(mx.uint8)).tobytes() for one in arrays]
        found[f"{bits}-{group}-{dtype}"] = [base64.b64encode(one).decode() for one in raw]
    return found


def main() -> None:
    values = make_matrix()
    written = {
        "implementation": f"ggml in xllamacpp {version('xllamacpp')}, mlx {version('mlx')}",
        "sum": float(np.abs(values).sum()),
        "ggml": ggml_bytes(values),
        "mlx": mlx_bytes(values),
    }
    DATA.write_text(json.dumps(written, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
