"""A product that is added to the residual, with what adapters add to it."""

from __future__ import annotations

from dataclasses import replace

from tinygrad import Tensor

from tinyvllm.ops.adapter_spec import AdapterSite
from tinyvllm.ops.backend import Epilogue, Operations, Step
from tinyvllm.ops.formats.matrix import Matrix


def adapted_product(
    ops: Operations, name: str, x: Tensor, matrix: Matrix, site: AdapterSite | None, step: Step, epilogue: Epilogue
) -> Tensor:
    """epilogue(x @ matrix.T + what each row's adapter adds): (T * N,).

    Without a norm after the product, adapters add to the residual beforehand, so that the product keeps its fused
    epilogue. The residual is overwritten.
    """
    tokens = step.num_tokens
    if site is None or not step.layout.has_adapters:
        return ops.linear(name, x, [matrix], tokens, None, epilogue)[0]
    if epilogue.post_norm is None and epilogue.residual is not None:
        (residual,) = ops.adapt(x, [epilogue.residual], site, step, scale=epilogue.scale)
        return ops.linear(name, x, [matrix], tokens, None, replace(epilogue, residual=residual))[0]
    (product,) = ops.linear(name, x, [matrix], tokens, None, Epilogue(bias=epilogue.bias))
    (product,) = ops.adapt(x, [product], site, step)
    return ops.finish(product, tokens, replace(epilogue, bias=None))
