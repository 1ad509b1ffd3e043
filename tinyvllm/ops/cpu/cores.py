"""How many cores compute a model's steps on the CPU device, and how they share the work."""

from __future__ import annotations

from collections.abc import Sequence

from tinyvllm.config import LayerKind
from tinyvllm.ops.formats.matrix import PANEL

MOST_CORES = 32  # each reads the columns of all others: a kernel takes up to 63 buffers (tinygrad's MAX_ARGS)
Team = tuple[tuple[int, int], tuple[str, ...]]  # KV heads [first, end), and the cores that attend to them


def share(count: int, cores: tuple[str, ...]) -> list[tuple[tuple[int, int], str]]:
    """[((first, end), core)]: `count` units divided between cores as evenly as possible."""
    num = min(len(cores), count)
    return [((i * count // num, (i + 1) * count // num), cores[i]) for i in range(num)]


def count_cores(available: int, layers: Sequence[LayerKind]) -> int:
    """The cores that compute a model's steps, of those that are available.

    Matrices can be shared by any number up to MOST_CORES. KV heads cannot be divided; several cores that share one
    divide its query heads. A core's rows of q, k and v must fill whole panels; where heads do not, and where something
    else reads the columns of a core's heads (norms of all heads together, output gates, latents, recurrent layers),
    there are at most as many cores as KV heads. Where no number of heads fills panels there is one: zeros then pad
    the rows of q, k and v together."""
    shapes = {(kind.num_kv_heads, kind.head_dim) for kind in layers if kind.latent is None and kind.state is None}
    latents = {(kind.latent, kind.num_heads) for kind in layers if kind.latent is not None}
    if not shapes | latents:
        return 1
    if all(map(_divides_heads, layers)):
        return min(available, MOST_CORES)
    for latent, heads in latents:
        shapes |= {(heads, dim) for dim in (latent.nope_dim + latent.rope_dim, latent.rank, latent.value_dim)}

    def fills_panels(num: int, heads: int, dim: int) -> bool:
        return all(((i + 1) * heads // num - i * heads // num) * dim % PANEL == 0 for i in range(num))

    most = min(available, MOST_CORES, *[heads for heads, _ in shapes])
    return next((num for num in range(most, 1, -1) if all(fills_panels(num, *shape) for shape in shapes)), 1)


def _divides_heads(kind: LayerKind) -> bool:
    """Whether cores can divide the query heads of a layer's KV head."""
    is_plain = kind.latent is None and kind.state is None and not (kind.head_norm_is_whole or kind.has_output_gate)
    return is_plain and kind.head_dim % PANEL == 0
