"""The tables of GGUF's types against the gguf package's."""

from __future__ import annotations

from gguf import constants

from tests.forking import printed_by
from tinyvllm.storage.gguf_types import ALIGNMENT, BLOCK_SIZES, TYPE_NAMES, ValueType


def test_types_are_those_of_the_package() -> None:
    names = {int(known): known.name for known in constants.GGMLQuantizationType}
    assert {number: TYPE_NAMES[number] for number in names} == names
    sizes = {known.name: size for known, size in constants.GGML_QUANT_SIZES.items()}
    assert {name: BLOCK_SIZES[name] for name in sizes} == sizes
    assert {one.name: int(one) for one in ValueType} == {one.name: int(one) for one in constants.GGUFValueType}
    assert constants.GGUF_DEFAULT_ALIGNMENT == ALIGNMENT


def test_loading_a_model_does_not_import_the_package() -> None:
    code = (
        "import sys\n"
        "import tinyvllm.engine.loading, tinyvllm.execution.runner, tinyvllm.server.serve\n"
        "print('gguf' in sys.modules)\n"
    )
    assert printed_by(code).strip() == "False"
