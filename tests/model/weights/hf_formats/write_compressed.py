"""Write data/compressed.safetensors: matrices that compressed-tensors has compressed, and the values that it gives them
back; and those of bitsandbytes and of gpt-oss's MXFP4, by their own code.

With torch, transformers, compressed-tensors and bitsandbytes:
python -m tests.model.weights.hf_formats.write_compressed
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "compressed.safetensors"
ROWS, COLS = 12, 256  # zeros of 12 rows take a word and a half
WIDE_COLS = 160  # not a multiple of bitsandbytes' blocks of 64, which go on in the next row


def _ints(bits: int, group: int | None, symmetric: bool = True) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}


def _floats(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "symmetric": True, **more}


# module: the library's format, its settings of weights, our name
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "w4_g32": ("pack-quantized", _ints(4, 32), "w4a16-g32"),
    "w4_g64": ("pack-quantized", _ints(4, 64), "w4a16-g64"),
    "w4_g128": ("pack-quantized", _ints(4, 128), "w4a16-g128"),
    "w4_g128_zeros": ("pack-quantized", _ints(4, 128, False), "w4a16-g128"),
    "w4_channel": ("pack-quantized", _ints(4, None), "w4a16-channel"),
    "w4_channel_zeros": ("pack-quantized", _ints(4, None, False), "w4a16-channel"),
    "w8_g128": ("pack-quantized", _ints(8, 128), "w8a16-g128"),
    "w8_channel_zeros": ("pack-quantized", _ints(8, None, False), "w8a16-channel"),
    "w3_g64_zeros": ("pack-quantized", _ints(3, 64, False), "w3a16-g64"),
    "w2_g64": ("pack-quantized", _ints(2, 64), "w2a16-g64"),
    "int8_channel": ("int-quantized", _ints(8, None), "w8a16-channel"),
    "int8_channel_zeros": ("int-quantized", _ints(8, None, False), "w8a16-channel"),
    "fp8_channel": ("float-quantized", _floats(8, strategy="channel"), "fp8-channel"),
    "fp8_tensor": ("float-quantized", _floats(8, strategy="tensor"), "fp8-tensor"),
    "fp8_block": ("float-quantized", _floats(8, strategy="block", block_structure=[4, 128]), "fp8-block4x128"),
    "mxfp8": ("mxfp8-quantized", _floats(8, strategy="group", group_size=32), "mxfp8"),
    "nvfp4": ("nvfp4-pack-quantized", _floats(4, strategy="tensor_group", group_size=16), "nvfp4"),
    "mxfp4": ("mxfp4-pack-quantized", _floats(4, strategy="group", group_size=32), "mxfp4"),
}
BNB_CASES = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4_nested": {"quant_type": "nf4", "compress_statistics": True},
    "fp4_nested": {"quant_type": "fp4", "compress_statistics": True},
    "nf4_wide": {"quant_type": "nf4", "compress_statistics": False},
}


def compress(name: str, weight: Any) -> dict[str, Any]:
    import torch
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    form, settings, _ = CASES[name]
    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=None)
    limit = {"int": 2.0 ** (args.num_bits - 1), "float": 448.0 if args.num_bits == 8 else 6.0}[args.type]
    block = settings.get("block_structure") or [
        ROWS if settings["strategy"] == "tensor" else 1,
        args.group_size or COLS,
    ]
    blocks = weight.abs().reshape(ROWS // block[0], block[0], COLS // block[1], block[1])
    scale = blocks.amax(dim=(1, 3)) / limit
    if form.startswith("mx"):
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    state = {"weight": weight, "weight_scale": scale.to(torch.bfloat16)}
    if form.startswith("nvfp4"):
        state["weight_global_scale"] = torch.tensor([448.0 / scale.max()])
        state["weight_scale"] = (scale * state["weight_global_scale"]).to(torch.float8_e4m3fn).to(torch.float32)
    if settings["strategy"] == "tensor":
        state["weight_scale"] = state["weight_scale"].reshape(1)
    if not args.symmetric:
        state["weight_zero_point"] = torch.randint(-2, 2, scale.shape).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    wide = {end: part.float() if part.dtype == torch.bfloat16 else part for end, part in stored.items()}
    if form.startswith("nvfp4"):
        expected = decompress_nvfp4(wide, args)
    else:
        expected = compressor.decompress(wide, scheme)["weight"].float()  # in bfloat16 it would be rounded
    return {f"{name}.{end}": part for end, part in stored.items()} | {f"{name}.expected": expected}


def decompress_nvfp4(stored: dict[str, Any], args: Any) -> Any:
    """What the library's decompress does, in float32."""
    import torch
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    values = unpack_fp4_from_uint8(stored["weight_packed"], ROWS, COLS, dtype=torch.float32)
    scale, global_scale = stored["weight_scale"].float(), stored["weight_global_scale"]
    return dequantize(x_q=values, scale=scale, args=args, global_scale=global_scale, dtype=torch.float32)


def quantize_bnb(name: str, weight: Any) -> dict[str, Any]:
    from bitsandbytes import functional

    shape = weight.shape
    if shape[1] % 64:  # as one row: on a CPU the library takes each row's blocks to begin with the row
        weight = weight.reshape(1, -1)
    codes, state = functional.quantize_4bit(weight, blocksize=64, **BNB_CASES[name])
    expected = functional.dequantize_4bit(codes, state).reshape(shape)
    state.shape = shape
    parts = {f"{name}.weight.{end}": part for end, part in state.as_dict(packed=True).items()}
    return parts | {f"{name}.weight": codes, f"{name}.expected": expected}


def main() -> None:
    import torch
    from safetensors.torch import save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    tensors: dict[str, Any] = {}
    for name in CASES:
        tensors |= compress(name, torch.randn(ROWS, COLS))
    for name in BNB_CASES:
        tensors |= quantize_bnb(name, torch.randn(ROWS, WIDE_COLS if name.endswith("wide") else COLS))
    blocks = torch.randint(0, 256, (2, ROWS, 4, 16), dtype=torch.uint8)
    scales = torch.randint(117, 130, (2, ROWS, 4), dtype=torch.uint8)
    values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # (experts, in, out)
    tensors |= {"experts.up_blocks": blocks, "experts.up_scales": scales}
    tensors["experts.expected"] = values.transpose(1, 2)
    DATA.parent.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, DATA)
    print(f"wrote {DATA}, {DATA.stat().st_size} bytes")


if __name__ == "__main__":
    main()
