"""Which rows of a step make up a tile of tokens: computed on the device, from the step's inputs."""

from __future__ import annotations

from tinygrad import Tensor, UOp

from tinyvllm.ops.backend import Step
from tinyvllm.ops.gpu.attention_prefill_inputs import Inputs, PrefillSpec
from tinyvllm.ops.kernel.body import I32, Body, KernelFn, cached_kernel, clamp, empty, finish, run_kernel


def tile_map(spec: PrefillSpec, step: Step) -> Tensor:
    """The tile map: computed by the step's first layer with such tiles, and kept for the others."""
    name = f"tiles of {spec.tokens} tokens"
    if name not in step.kept:
        fresh = empty(spec.map_size + 1, I32, str(step.inputs.device))
        step.kept[name] = run_kernel(tile_map_kernel(spec.for_map), [fresh], [step.inputs])[0]
    return step.kept[name]


def tile_order(spec: PrefillSpec, tiles: Tensor, step: Step) -> Tensor:
    """The numbers of the tiles in the order of their work, kept likewise."""
    name = f"order of tiles of {spec.tokens} tokens"
    if name not in step.kept:
        fresh = empty(spec.map_size, I32, str(step.inputs.device))
        step.kept[name] = run_kernel(tile_order_kernel(spec.for_map), [fresh], [tiles, step.inputs])[0]
    return step.kept[name]


@cached_kernel
def tile_order_kernel(spec: PrefillSpec) -> KernelFn:
    """fn(order (map_size,) int32, tiles, inputs): the numbers of the tiles, those with the longest contexts first. One
    threadgroup: a thread finds how many tiles go before each of its own."""

    def kernel(order: UOp, tiles: UOp, inputs: UOp) -> UOp:
        body, step, size, threads = Body(), Inputs(spec, inputs), spec.map_size, spec.map_threads
        thread = body.threads(threads)
        own = [first + thread for first in range(0, size, threads)]
        contexts = [tile_context(step, tiles, tile) for tile in own]
        shared = body.shared(size, I32)
        shared = shared.after(UOp.group(*[shared[i].store(value) for i, value in zip(own, contexts, strict=True)]))
        count = clamp(tiles[size].load(), 0, max(2, spec.max_tiles))
        ranks = _zeros(body.registers(len(own), I32), shared)
        loop = body.fold_while(count)
        other = clamp(loop, 0, size - 1)
        value = shared[other].load()
        before = [
            ((value > context) | (value.eq(context) & (other > tile))).cast(I32)
            for tile, context in zip(own, contexts, strict=True)
        ]
        summed = _add(ranks.after(loop), before).end(loop)
        places = [clamp(ranks.after(summed)[i].load(), 0, size - 1) for i in range(len(own))]
        stores = [
            order[place.valid(tile < count)].store(tile.cast(I32)) for place, tile in zip(places, own, strict=True)
        ]
        return finish(UOp.group(*stores).end(thread), f"tile_order_{spec.layout.num_tokens}", nbytes=8 * size)

    return kernel


def tile_context(step: Inputs, tiles: UOp, tile: UOp) -> UOp:
    """How many keys a tile's last token attends to; 0 after the last tile."""
    tokens = step.spec.layout.num_tokens
    first, end = (tiles[at].load() for at in (tile, (tile + 1).minimum(step.spec.map_size - 1)))
    count = (end - first).maximum(0)
    return (count > 0).where(step.position(clamp(first, 0, tokens - 1)).cast(I32) + count, 0)


@cached_kernel
def tile_map_kernel(spec: PrefillSpec) -> KernelFn:
    """fn(tiles (map_size + 1,) int32, inputs): the first row of each tile, in order; the other words are the number of
    rows that are not padding, but the last is that of tiles. One threadgroup: each thread handles some consecutive
    rows."""

    def kernel(tiles: UOp, inputs: UOp) -> UOp:
        tile_map = _TileMap(spec, inputs)
        counts = tile_map.count()
        summed, sums = tile_map.add_up(counts)
        before, total, num_rows = (sums[i].load() for i in range(3))
        stores = [tile_map.write_starts(tiles, before, summed)]
        stores += tile_map.write_rest(tiles, total, num_rows)
        rows = spec.layout.num_tokens
        return finish(UOp.group(*stores).end(tile_map.thread), f"tile_map_{rows}", nbytes=16 * rows)

    return kernel


class _TileMap:
    """The threadgroup's work."""

    def __init__(self, spec: PrefillSpec, inputs: UOp) -> None:
        self.spec, self.step, self.body = spec, Inputs(spec, inputs), Body()
        self.threads = spec.map_threads
        self.rows_per_thread = -(-spec.layout.num_tokens // self.threads)
        self.thread = self.body.threads(self.threads)

    def count(self) -> UOp:
        """For each thread, the tiles that begin in its rows, and then for each thread its rows that are not padding: 2
        * `threads` numbers in threadgroup memory."""
        counts = _zeros(self.body.registers(2, I32), self.thread)
        loop = self._loop_rows()
        inner = counts if loop is None else counts.after(loop)
        _, is_first, is_real = self._row(loop)
        added = _add(inner, [is_first.cast(I32), is_real.cast(I32)])
        counts = counts.after(added if loop is None else added.end(loop))
        shared = self.body.shared(2 * self.threads, I32)
        stores = [shared[i * self.threads + self.thread].store(counts[i].load()) for i in range(2)]
        return shared.after(UOp.group(*stores))

    def add_up(self, counts: UOp) -> tuple[UOp, UOp]:
        """(the end of the loop, registers: tiles that begin in earlier threads' rows, all tiles, all real rows)."""
        sums = _zeros(self.body.registers(3, I32), counts)
        other = self.body.fold(self.threads)
        here = counts[other].load()
        new = [(other < self.thread).where(here, 0), here, counts[self.threads + other].load()]
        summed = _add(sums.after(other), new).end(other)
        return summed, sums.after(summed)

    def write_starts(self, tiles: UOp, before: UOp, summed: UOp) -> UOp:
        """Store the first rows of the tiles that begin in the thread's rows, from number `before` on."""
        index, flag = self.body.registers(1, I32), self.body.registers(1, I32)
        index = index.after(index.after(summed)[0].store(before))
        loop = self._loop_rows()
        inner = index if loop is None else index.after(loop)
        row, is_first, _ = self._row(loop)
        # by way of a register: tinygrad would otherwise apply the store's condition to the sums that it depends on
        held = flag.after(flag.after(inner)[0].store(is_first.cast(I32)))[0].load()
        place = clamp(inner[0].load(), 0, self.spec.map_size - 1)
        written = tiles[place.valid(held.ne(0))].store(row.cast(I32))
        moved = inner.after(written)[0].store(inner[0].load() + held)
        done = UOp.group(written, moved)
        return done if loop is None else done.end(loop)

    def write_rest(self, tiles: UOp, total: UOp, num_rows: UOp) -> list[UOp]:
        """Stores of the words after the last tile's."""
        size = self.spec.map_size
        places = [first + self.thread for first in range(0, size, self.threads)]
        stores = [tiles[place.valid(place >= total)].store(num_rows) for place in places]
        return [*stores, tiles[(self.thread + size).valid(self.thread.eq(0))].store(total)]

    def _loop_rows(self) -> UOp | None:
        """A loop over the thread's rows; None if it has only one."""
        return self.body.fold(self.rows_per_thread) if self.rows_per_thread > 1 else None

    def _row(self, loop: UOp | None) -> tuple[UOp, UOp, UOp]:
        """(the thread's row in an iteration, whether a tile begins there, whether it is not padding)."""
        spec, step = self.spec, self.step
        row = self.thread * self.rows_per_thread + (0 if loop is None else loop)
        inside = row < spec.layout.num_tokens
        safe = inside.where(row, 0)
        sequence, before = step.sequence(safe), step.sequence((safe - 1).maximum(0))
        is_real = inside & (sequence < spec.layout.num_seqs)
        is_first = row.eq(0) | sequence.ne(before)
        if spec.tokens < spec.layout.num_tokens:  # else a tile has room for all of a sequence's rows
            is_first = is_first | (step.position(safe) % spec.tokens).eq(0)
        return row, is_real & is_first, is_real


def _zeros(registers: UOp, after: UOp) -> UOp:
    """Registers set to 0, after the stores and inside the loops of `after`."""
    count = registers.max_numel()
    return registers.after(UOp.group(*[registers.after(after)[i].store(UOp.const(0, I32)) for i in range(count)]))


def _add(registers: UOp, values: list[UOp]) -> UOp:
    """Stores that add a value to each register."""
    return UOp.group(*[registers[i].store(registers[i].load() + value) for i, value in enumerate(values)])
