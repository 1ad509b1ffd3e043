"""Convert a GGUF file's matrices to F16, so that the same model can be measured in both formats, by us and by
llama.cpp.

    pip install gguf                       # in a separate environment
    python scripts/make_f16_gguf.py models/smollm2-135m-instruct.gguf /tmp/smollm2-135m-f16.gguf

Vectors (norms) are written as float32. The values are the dequantized ones, rounded to float16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize

MADE_BY_THE_WRITER = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="MODEL.gguf")
    parser.add_argument("target", type=Path, metavar="F16.gguf")
    args = parser.parse_args()
    if args.target.exists():
        parser.error(f"{args.target} exists: choose another name, or delete it first")
    convert(GGUFReader(args.source), args.target)


def convert(reader: GGUFReader, target: Path) -> None:
    """Copy metadata and tensors. Raises ValueError if the file names no architecture."""
    architecture = reader.get_field("general.architecture")
    if architecture is None:
        raise ValueError("the file has no general.architecture: is it a model?")
    writer = GGUFWriter(target, architecture.contents())
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    for field in reader.fields.values():
        if field.name not in MADE_BY_THE_WRITER:
            element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)  # (rows, columns), or (columns,) for a vector
        is_matrix = len(tensor.shape) > 1
        kind = GGMLQuantizationType.F16 if is_matrix else GGMLQuantizationType.F32
        values = np.ascontiguousarray(values, dtype=np.float16 if is_matrix else np.float32)
        writer.add_tensor(tensor.name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


if __name__ == "__main__":
    main()
