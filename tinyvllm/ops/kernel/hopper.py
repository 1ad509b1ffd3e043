"""NVIDIA Hopper's wgmma, TMA, mbarrier and cluster instructions as inline PTX.

The copy engine (TMA) fetches a tile with one instruction of one thread. It follows a description of the matrix, a
tensor map, which the kernel writes itself, and counts the bytes that have arrived on a barrier in threadgroup memory
(mbarrier). Two threadgroups may form a cluster; a tile that both need is then fetched once. The matrix unit (wgmma)
reads both operands from threadgroup memory, for four warps together. (PTX ISA, "cp.async.bulk.tensor",
"tensormap.replace", "mbarrier", "wgmma".)

`allows_wgmma` prepares tinygrad for them. Its compiler needs the full target, sm_90a, because these instructions belong
to one generation and not to its successors, and goes on to machine code; its renderer, the number of threadgroups of a
cluster; and a launch, the threadgroup memory of the kernel, which exceeds what CUDA allocates statically.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinygrad import Device, UOp, dtypes
from tinygrad.device import TinyELF
from tinygrad.helpers import Target
from tinygrad.renderer.cstyle import CUDARenderer
from tinygrad.runtime.support.compiler_cuda import NVRTCCompiler
from tinygrad.uop.ops import Ops

from tinyvllm.device.program_store import digest_of, file_facts, nvrtc_path
from tinyvllm.device.recording import AWAIT_PREVIOUS
from tinyvllm.errors import InvariantError
from tinyvllm.ops.kernel.body import F16, F32, I32
from tinyvllm.ops.kernel.lanes import WAITED

ARCH = "sm_90"
CLUSTER = 2  # threadgroups of a cluster, on two neighboring multiprocessors
CLUSTERED = "barrier.cluster"  # occurs in the source of kernels whose threadgroups form clusters

WGMMA_TOKENS = 64  # left rows of one instruction
MULTIPROCESSORS = 132  # of an H100 or H200; with fewer, threadgroups take turns
GROUP_WARPS = 4  # warps that issue one wgmma together
WGMMA_COLS = 64  # columns of a tile: 128 bytes, the span that the copy engine swizzles
MAP_WORDS = 32  # words of a tensor map
HOPPER_SHARED_BYTES = 227 << 10  # threadgroup memory that a kernel may use

# The size is only known to the launch, so the kernel states it: as a comment, which stays with the machine code
EXTERN = "extern __shared__ __align__(1024) unsigned char shared_memory[];"
DECLARE = (
    f"{EXTERN}\n"
    "unsigned shared = (unsigned)__cvta_generic_to_shared(shared_memory);\n"
    'asm volatile("// dynamic shared memory: %d bytes");'
)
# an array in threadgroup memory, as tinygrad renders it
ARRAY = re.compile(r"__shared__ __align__\(16\) (\w[\w ]*?) (\w+)\[(\d+)\];")
ARRAY_ALIGNED, STATIC_BYTES = 16, 48 << 10
ITEM_BYTES = {"float": 4, "int": 4, "uint": 4, "half": 2, "unsigned char": 1}
# So many registers that several threadgroups fit on a multiprocessor at once: like the memory, for the renderer
RESIDENT = 'asm volatile("// threadgroups of a multiprocessor: %d");'
CLUSTER_OF = 'asm volatile("// threadgroups of a cluster: %d");'  # of kernels whose clusters have others than CLUSTER
IS_CLUSTER_OF = re.compile(r"// threadgroups of a cluster: (\d+)")
IS_RESIDENT = re.compile(r"// threadgroups of a multiprocessor: (\d+)")
LAUNCH_BOUNDS = re.compile(r"__launch_bounds__\((\d+)\)")
SHARE_REGISTERS = 'asm volatile("setmaxnreg.%s.sync.aligned.u32 %d;");'
DECLARED = re.compile(rb"// dynamic shared memory: (\d+) bytes")
FOR_LAUNCH = re.compile(rf"{DECLARED.pattern.decode()}|{re.escape(AWAIT_PREVIOUS)}")
NEEDLESS_BARRIER = re.compile(rf"{re.escape(WAITED)}\s*__syncthreads\(\);")
# Written in threadgroup memory, the only place where fields of a map can be set, and then copied to where the copy
# engine reads it. The fields that are not set here stay 0. What is set: float16 (6), swizzle by 128 bytes (3), zeros
# outside the matrix.
DESCRIBE = """if (threadIdx.y == {warp}{condition}) {{{{
  unsigned map = shared + {place};
  asm volatile("st.shared.u32 [%0], 0;" :: "r"(map + threadIdx.x * 4) : "memory");
  __syncwarp();
  if (threadIdx.x == 0) {{{{
    asm volatile("tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%0], %1;" :: "r"(map), "l"({{0}}));
{fields}
  }}}}
  __syncwarp();
  asm volatile("tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%0], [%1], 128;"
    :: "l"({{1}}), "r"(map) : "memory");
}}}}"""
FIELD = '    asm volatile("tensormap.replace.tile.{}.shared::cta.b1024.b{} [%0], {}%1;" :: "r"(map), "{}"({}));'
CONSTANT = '    asm volatile("tensormap.replace.tile.{}.shared::cta.b1024.b32 [%0], {};" :: "r"(map));'
ACQUIRE_MAP = 'asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" :: "l"({0}) : "memory");'
IS_FIRST = " && blockIdx.x + blockIdx.y + blockIdx.z == 0"
# the first `count` barriers expect `first` arrivals, the next `count` expect `second`
BARRIERS = """if (threadIdx.x == 0 && threadIdx.y == 0) {{{{
  for (int i = 0; i < {count}; i++) {{{{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared + {at} + i * 8), "r"({first}));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared + {at} + {count} * 8 + i * 8), "r"({second}));
  }}}}
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}}}}"""
MEET = 'asm volatile("barrier.cluster.arrive.release;\\nbarrier.cluster.wait.acquire;" ::: "memory");'
WAIT_AT = (
    'asm volatile("{{ .reg .pred done;\\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\\n'
    '@done bra over;\\nbra again;\\nover: }}" :: "r"({0}), "r"({1}) : "memory");'
)
WAIT = WAIT_AT.replace("{0}", "shared + {0}")
EXPECT = 'asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%%0], %d;" :: "r"(shared + {0}) : "memory");'
FETCH = (
    'asm volatile("%scp.async.bulk.tensor.%dd.shared::cluster.global.mbarrier::complete_tx::bytes%s [%%0], '
    '[%%1, {{%s}}], [%%2]%s" :: "r"(shared + {0}), "l"({1}), "r"(shared + {2}), %s : "memory");'
)
# A copy's cache policy, for bytes that a step reads once, as it does weights: they leave the L2 cache first, so that
# what other kernels read stays there (the step's inputs, keys and values of short contexts, norms)
ONCE = ".reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0; "
HINT, POLICY = ".L2::cache_hint", ", once"
STORE = (
    'asm volatile("st.shared.v4.b32 [%0], {{%1, %2, %3, %4}};" :: '
    '"r"(shared + {0}), "r"({1}), "r"({2}), "r"({3}), "r"({4}) : "memory");'
)
FENCE_PROXY = 'asm volatile("fence.proxy.async.shared::cta;" ::: "memory");'
PUBLISH = f"{FENCE_PROXY}\n__syncwarp();"
COPY_THERE = (
    'asm volatile("{{ .reg .b32 there, barrier;\\nmapa.shared::cluster.u32 there, %%0, %%2;\\n'
    "mapa.shared::cluster.u32 barrier, %%1, %%2;\\n"
    "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [%%0], %d, [barrier]; "
    '}}" :: "r"(shared + {0}), "r"(shared + {1}), "r"({2}) : "memory");'
)
# with a predicate: at a branch the compiler would wait for the products that are in flight
ARRIVE = (
    'asm volatile("{{ .reg .pred is_one;\\nsetp.ne.s32 is_one, %1, 0;\\n'
    '@is_one mbarrier.arrive.shared::cta.b64 _, [%0]; }}" :: "r"(shared + {0}), "r"((int)({1})) : "memory");'
)
ARRIVE_THERE = (
    'asm volatile("{{ .reg .pred is_one;\\n.reg .b32 there;\\nsetp.ne.s32 is_one, %1, 0;\\n'
    "mapa.shared::cluster.u32 there, %0, %2;\\n@is_one mbarrier.arrive.shared::cluster.b64 _, [there]; "
    '}}" :: "r"(shared + {0}), "r"((int)({1})), "r"({2}) : "memory");'
)
# A tile with swizzled rows of 128 bytes, 8 rows every 1024 bytes (PTX ISA, "wgmma", matrix descriptor). Its address is
# added, in units of 16 bytes.
DESCRIPTOR = "0x4000004000010000ull + ((shared + {%d}) >> 4)"
# the same for tiles whose rows are summed over: the bytes between tiles of 64 columns are a field of its own
TRANSPOSED = "0x4000004000000000ull + %dull + ((shared + {%d}) >> 4)"
FENCE = 'asm volatile("wgmma.fence.sync.aligned;" ::: "memory");'
COMMIT = 'asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");'


class HopperRenderer(CUDARenderer):
    """tinygrad's renderer, with a compiler for the full target, with clusters, and without needless barriers. The
    class's name is part of the key of compiled programs."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.compiler = MachineCodeCompiler()

    def render_kernel(self, function_name: str, kernel: list[str], *args: Any, **more: Any) -> str:
        source = in_one_memory(super().render_kernel(function_name, kernel, *args, **more))
        source = NEEDLESS_BARRIER.sub(WAITED, source)
        if resident := IS_RESIDENT.search(source):
            source = LAUNCH_BOUNDS.sub(rf"__launch_bounds__(\1, {resident[1]})", source, count=1)
        if not any(CLUSTERED in line for line in kernel):
            return source
        found = IS_CLUSTER_OF.search(source)
        size = CLUSTER if found is None else int(found[1])
        return source.replace("__launch_bounds__", f"__cluster_dims__({size}) __launch_bounds__", 1)


def in_one_memory(source: str) -> str:
    """A kernel's source; if its arrays in threadgroup memory are larger than CUDA allocates statically, they follow
    what it declares (`declare`). Kernels that are not of this engine have arrays of any type, and never such large
    ones."""
    arrays = [*ARRAY.finditer(source)]
    declared = declared_bytes(source.encode())
    if unknown := sorted({one[1] for one in arrays} - ITEM_BYTES.keys()):
        if declared:
            raise InvariantError(f"an array of {unknown[0]} beside declared threadgroup memory: add it to ITEM_BYTES")
        return source
    sizes = [-(-int(one[3]) * ITEM_BYTES[one[1]] // ARRAY_ALIGNED) * ARRAY_ALIGNED for one in arrays]
    if sum(sizes) <= STATIC_BYTES:
        return source
    if not declared:
        raise InvariantError(f"a kernel with arrays of {sum(sizes)} bytes in threadgroup memory declares none of it")
    place = -(-declared // ARRAY_ALIGNED) * ARRAY_ALIGNED
    for found, size in zip(arrays, sizes, strict=True):
        kind, name, _ = found.groups()
        source = source.replace(found[0], f"{EXTERN} {kind}* {name} = ({kind}*)(shared_memory + {place});", 1)
        place += size
    return source.replace(f"// dynamic shared memory: {declared} bytes", f"// dynamic shared memory: {place} bytes", 1)


class MachineCodeCompiler(NVRTCCompiler):
    """NVRTC for the full target, down to machine code. tinygrad's compiler stops at PTX, which the driver would compile
    when a kernel is loaded: one after the other, in the process and on the thread that serves.

    What a kernel tells its launch, which PTX keeps as comments, follows the machine code, whose header has its size."""

    def __init__(self) -> None:
        made_by = digest_of(file_facts(nvrtc_path()))[:16]  # tinygrad's cache of compiled sources knows no versions
        super().__init__(f"{ARCH}a", ptx=False, cache_key=f"machine_code_{made_by}")

    def compile(self, src: str) -> bytes:
        code: bytes = super().compile(src)
        return code + "".join(f"\n{found[0]}" for found in FOR_LAUNCH.finditer(src)).encode()


def allows_wgmma(device_name: str) -> bool:
    """Whether a device has these instructions; if so, prepare it and its compiler for them."""
    device = Device[device_name]
    renderer = device.renderer
    if renderer.target.arch != ARCH or type(renderer) not in (CUDARenderer, HopperRenderer):
        return False
    if type(renderer) is CUDARenderer:
        renderer.compiler = MachineCodeCompiler()
        renderer.__class__ = HopperRenderer  # tinygrad's compiling processes create a renderer of this class
        make = device.runtime_t
        assert make is not None

        def program(owner: Any, compiled: TinyELF) -> Any:
            return make(owner, compiled, smem=declared_bytes(compiled.lib))

        device.runtime_t = program
    return True


def declared_bytes(program: bytes) -> int:
    """The size of the threadgroup memory that a compiled kernel has declared with `declare`; 0 if it has not."""
    found = DECLARED.search(program)
    return int(found[1]) if found else 0


def has_wgmma(device_name: str) -> bool:
    """Whether `allows_wgmma` has found these instructions on a device."""
    return type(Device[device_name].renderer) is HopperRenderer


EXIT = "if ({0}) return;"
BREAK = "if ({0}) break;"
MEET_THREADS = 'asm volatile("bar.sync %%0, %d;" :: "r"((int)({0})) : "memory");'
# generic stores are seen by wgmma after the fence
CLEAR = (
    'asm volatile("{{ .reg .pred is_one;\\nsetp.ne.s32 is_one, %1, 0;\\n'
    '@is_one st.shared.v4.b32 [%0], {{%2, %2, %2, %2}}; }}" :: "r"(shared + {0}), "r"((int)({1})), "r"(0) : "memory");'
)


# -- statements. A place is a byte offset in the kernel's threadgroup memory; a barrier is given by its place ----------


def statement(text: str, *operands: UOp) -> UOp:
    return UOp(Ops.CUSTOM, dtypes.void, src=operands, arg=text)


def declare(num_bytes: int) -> UOp:
    """Declare the kernel's threadgroup memory. Every statement with a place comes after it."""
    return statement(DECLARE % num_bytes, UOp.const(0.0, F16))


def share_multiprocessor(count: int) -> UOp:
    """Let `count` threadgroups run on a multiprocessor at once, which share its registers."""
    return statement(RESIDENT % count, UOp.const(0.0, F16))


@dataclass(frozen=True)
class Box:
    """The box that one copy fetches from a float16 matrix with dimensions of `sizes`, innermost first. `strides`: in
    bytes, of all dimensions but the innermost, whose values are contiguous. It begins at a multiple of 16 bytes. The
    copy engine swizzles rows of 128 bytes, unless it shall not."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    is_swizzled: bool = True


def describe(warp: int, place: int, target: UOp, matrix: UOp, box: Box, *after: UOp, by_first: bool = False) -> UOp:
    """Let one warp write the map of a matrix to `target`, of each threadgroup or of the first one. It uses 128 bytes at
    `place`."""
    fields = [CONSTANT.format("rank", len(box.sizes) - 1)]
    for i, (size, taken) in enumerate(zip(box.sizes, box.box, strict=True)):
        fields += [
            FIELD.format("box_dim", 32, f"{i}, ", "r", taken),
            FIELD.format("global_dim", 32, f"{i}, ", "r", size),
        ]
        fields.append(CONSTANT.format("element_stride", f"{i}, 1"))
    for i, stride in enumerate(box.strides):
        fields.append(FIELD.format("global_stride", 64, f"{i}, ", "l", f"{stride}ull"))
    swizzle = 3 if box.is_swizzled else 0
    for name, value in (("elemtype", 6), ("interleave_layout", 0), ("swizzle_mode", swizzle), ("fill_mode", 0)):
        fields.append(CONSTANT.format(name, value))
    condition = IS_FIRST if by_first else ""
    text = DESCRIBE.format(warp=warp, condition=condition, place=place, fields="\n".join(fields))
    return statement(text, matrix, target, *after)


def make_barriers(place: int, count: int, first: int, second: int, *after: UOp) -> UOp:
    """`count` barriers from `place` on that expect `first` arrivals, followed by `count` that expect `second`."""
    return statement(BARRIERS.format(at=place, count=count, first=first, second=second), *after)


def meet(*after: UOp) -> UOp:
    """A barrier for all threads of the cluster."""
    return statement(MEET, *after)


def acquire_map(target: UOp, *after: UOp, warp: int | None = None) -> UOp:
    """Make a map that others wrote visible to this thread's copies after it; if `warp` is given, to those of its first
    lane alone."""
    condition = "" if warp is None else f"if (threadIdx.x == 0 && threadIdx.y == {warp}) "
    return statement(condition + ACQUIRE_MAP, target, *after)


def wait(barrier: UOp, parity: UOp, *after: UOp) -> UOp:
    """Wait until the phase of this parity has ended. For a new barrier, the phase before the first one has."""
    return statement(WAIT, barrier, parity, *after)


def expect(barrier: UOp, num_bytes: int, *after: UOp, condition: UOp | None = None) -> UOp:
    """Arrive, and let the phase end only after `num_bytes` more bytes have come. With a condition, only the threads for
    which it holds do so; likewise below."""
    return _conditional(EXPECT % num_bytes, (barrier,), condition, after)


def _conditional(text: str, operands: Sequence[UOp], condition: UOp | None, after: Sequence[UOp]) -> UOp:
    if condition is None:
        return statement(text, *operands, *after)
    return statement(f"if ({{{len(operands)}}}) {{{{ {text} }}}}", *operands, condition, *after)


def fetch(
    place: UOp,
    target: UOp,
    barrier: UOp,
    at: Sequence[UOp],
    *after: UOp,
    is_shared: bool = False,
    is_read_once: bool = False,
    condition: UOp | None = None,
) -> UOp:
    """Start to fetch a map's box that begins `at`, innermost dimension first; its bytes count on the barrier. If
    shared, both threadgroups of the cluster get it, each at the same place and on the same barrier of its own
    memory. `is_read_once`: in a step, by one threadgroup."""
    rank, last = len(at), 3 + len(at)
    coordinates = ", ".join(f"%{3 + i}" for i in range(rank))
    operands = ", ".join(f'"r"({{{3 + i}}})' for i in range(rank))
    shared, mask = "", ""
    if is_shared:
        shared, mask = ".multicast::cluster", f", %{last}"
        operands += f', "h"((unsigned short){(1 << CLUSTER) - 1})'
    policy, last_operands = "", f"{mask};"
    if is_read_once:
        policy, shared, last_operands = f"{{{{ {ONCE}", shared + HINT, f"{mask}{POLICY}; }}}}"
    text = FETCH % (policy, rank, shared, coordinates, last_operands, operands)
    places = [UOp.const(0, I32) + place for place in at]
    return _conditional(text, (place, target, barrier, *places), condition, after)


def store_words(place: UOp, words: Sequence[UOp], *after: UOp) -> UOp:
    """Store four words."""
    return statement(STORE, place.cast(I32), *words, *after)


def publish_stores(*after: UOp) -> UOp:
    """Let wgmma and the copy engine see what a warp's lanes have stored: copies that one of its lanes starts after
    this, and products that start after one of its lanes has arrived at a barrier."""
    return statement(PUBLISH, *after)


def copy_there(place: UOp, num_bytes: int, barrier: UOp, threadgroup: UOp, condition: UOp, *after: UOp) -> UOp:
    """Start to copy bytes to the same place in the memory of another threadgroup of the cluster. They count on its
    barrier."""
    operands = (place.cast(I32), barrier, threadgroup.cast(I32))
    return _conditional(COPY_THERE % num_bytes, operands, condition, after)


def arrive(barrier: UOp, is_one: UOp, *after: UOp, threadgroup: UOp | None = None) -> UOp:
    """The threads with `is_one` arrive at a barrier: their own threadgroup's, or that of `threadgroup` in the
    cluster."""
    if threadgroup is None:
        return statement(ARRIVE, barrier, is_one, *after)
    return statement(ARRIVE_THERE, barrier, is_one, threadgroup, *after)


def take_registers(count: int, *after: UOp) -> UOp:
    """Let the threads of a group of four warps use more registers, which others have given."""
    return statement(SHARE_REGISTERS % ("inc", count), *after)


def give_registers(count: int, *after: UOp) -> UOp:
    """Let the threads of a group of four warps keep only so many registers."""
    return statement(SHARE_REGISTERS % ("dec", count), *after)


def make_clusters(size: int, *after: UOp) -> UOp:
    """Let each cluster have so many threadgroups (otherwise CLUSTER)."""
    return statement(CLUSTER_OF % size, UOp.const(0.0, F16), *after)


def exit_if(condition: UOp) -> UOp:
    """End the threads with the condition, which must be all of the threadgroup's."""
    return statement(EXIT, condition)


def leave_if(condition: UOp, *after: UOp) -> UOp:
    """End the innermost loop. tinygrad does not render a loop whose length depends on another loop around it."""
    return statement(BREAK, condition, *after)


def meet_threads(barrier: UOp, count: int, *after: UOp) -> UOp:
    """A barrier for `count` threads of the threadgroup; 0 is that of all threads."""
    return statement(MEET_THREADS % count, barrier, *after)


def clear_piece(place: UOp, is_wanted: UOp, *after: UOp) -> UOp:
    """Store 16 bytes of zeros, if wanted."""
    return statement(CLEAR, place.cast(I32), is_wanted, *after)


def fence_proxy(*after: UOp) -> UOp:
    """Make this thread's stores visible to wgmma."""
    return statement(FENCE_PROXY, *after)


def multiply_wgmma(type_name: str, left: UOp, right: UOp, sums: UOp, pending: int, *after: UOp) -> UOp:
    """Start to add the product of two tiles, left (64 x 64) and right (8 n x 64), to the registers `sums`, and wait
    until all but the `pending` latest products are done. A lane holds the same sums of the n blocks as with
    `TileMma.add`."""
    count = sums.max_numel()
    a, b = DESCRIPTOR % count, DESCRIPTOR % (count + 1)
    lines = [FENCE, f"{{{{ unsigned long long a = {a}, b = {b};"]
    for k in range(WGMMA_COLS // 16):
        operands = f"%{count}, %{count + 1}, 1, 1, 1, 0, 0"
        lines.append(_product(type_name, count, operands, f'"l"(a + {2 * k}), "l"(b + {2 * k})'))
    lines += ["}}", COMMIT, _wait_for(pending, count)]
    return statement("\n".join(lines), *[sums[i] for i in range(count)], left, right, *after)


def start_scores(
    type_name: str, left: UOp, right: UOp, sums: UOp, cols: int, stride: tuple[int, int], *after: UOp
) -> UOp:
    """Start to compute left (64 x cols) @ right (8 n x cols).T into the registers `sums`, and do not wait for it. The
    tiles of 64 columns of left and of right are `stride` bytes apart."""
    count = sums.max_numel()
    lines = [FENCE, f"{{{{ unsigned long long a = {DESCRIPTOR % count}, b = {DESCRIPTOR % (count + 1)};"]
    for k in range(cols // 16):
        tile, inner = k * 16 // WGMMA_COLS, k * 16 % WGMMA_COLS
        a, b = ((tile * size + inner * 2) // 16 for size in stride)
        operands = f"%{count}, %{count + 1}, {int(k > 0)}, 1, 1, 0, 0"
        lines.append(_product(type_name, count, operands, f'"l"(a + {a}), "l"(b + {b})'))
    lines += ["}}", COMMIT]
    return statement("\n".join(lines), *[sums[i] for i in range(count)], left, right, *after)


def start_weighing(type_name: str, words: Sequence[UOp], right: UOp, sums: UOp, stride: int, *after: UOp) -> UOp:
    """Start to add weights @ right to the registers `sums`, and do not wait for it. right: tiles of 64 columns,
    `stride` bytes apart, with 16 rows for each four words of weights, which are those of `TileMma.weights`."""
    count = sums.max_numel()
    first = count + len(words)
    lines = [FENCE, f"{{{{ unsigned long long b = {TRANSPOSED % (stride // 16 << 16, first)};"]
    for k in range(len(words) // 4):
        four = ", ".join(f"%{count + i}" for i in range(4))
        inputs = ", ".join(f'"r"({{{count + 4 * k + i}}})' for i in range(4))
        operands = f"{{{{{four}}}}}, %{count + 4}, 1, 1, 1, 1"
        lines.append(_product(type_name, count, operands, f'{inputs}, "l"(b + {k * 16 * WGMMA_COLS * 2 // 16})'))
    lines += ["}}", COMMIT]
    return statement("\n".join(lines), *[sums[i] for i in range(count)], *words, right, *after)


def start_rows(
    type_name: str, words: Sequence[UOp], right: UOp, sums: UOp, adds: bool, *after: UOp, stride: int = 0
) -> UOp:
    """Start to compute left @ right.T into the registers `sums`, or to add it, and do not wait for it. left: four words
    a lane for each 16 of its columns; right: tiles of 64 columns, `stride` bytes apart."""
    count = sums.max_numel()
    first = count + len(words)
    lines = [FENCE, f"{{{{ unsigned long long b = {DESCRIPTOR % first};"]
    for k in range(len(words) // 4):
        four = ", ".join(f"%{count + i}" for i in range(4))
        inputs = ", ".join(f'"r"({{{count + 4 * k + i}}})' for i in range(4))
        operands = f"{{{{{four}}}}}, %{count + 4}, {int(adds or k > 0)}, 1, 1, 0"
        tile, inner = k * 16 // WGMMA_COLS, k * 16 % WGMMA_COLS
        at = (tile * stride + inner * 2) // 16
        lines.append(_product(type_name, count, operands, f'{inputs}, "l"(b + {at})'))
    lines += ["}}", COMMIT]
    return statement("\n".join(lines), *[sums[i] for i in range(count)], *words, right, *after)


def await_earlier(pending: int, *after: UOp) -> UOp:
    """Wait for all but the `pending` latest products, which still use their registers."""
    return statement(_wait_for(pending, 0), *after)


def await_products(pending: int, sums: UOp, *after: UOp) -> UOp:
    """Wait for all but the `pending` latest products. `sums`: the registers that may be read after it."""
    count = sums.max_numel()
    text = f'asm volatile("wgmma.wait_group.sync.aligned {pending};" : {_registers(count)} :: "memory");'
    return statement(text, *[sums[i] for i in range(count)], *after)


def _product(type_name: str, count: int, operands: str, inputs: str) -> str:
    """The text of one instruction, for 16 columns."""
    sums = ", ".join(f"%{i}" for i in range(count))
    return (
        f'asm volatile("wgmma.mma_async.sync.aligned.m64n{count * 2}k16.f32.{type_name}.{type_name} '
        f'{{{{{sums}}}}}, {operands};" : {_registers(count)} : {inputs});'
    )


def _registers(count: int) -> str:
    return ", ".join(f'"+f"(*{{{i}}})' for i in range(count))


def _wait_for(pending: int, count: int) -> str:
    """The text of waiting for all but `pending` products. If none is pending, the sums may be read after it."""
    registers = f" : {_registers(count)} :" if pending == 0 else " ::"
    return f'asm volatile("wgmma.wait_group.sync.aligned {pending};"{registers}: "memory");'


def finish_wgmma(sums: UOp, *after: UOp) -> UOp:
    """Wait until all products are done. Then `read_sums` may read `sums`."""
    count = sums.max_numel()
    return statement(_wait_for(0, count), *[sums[i] for i in range(count)], *after)


def read_sums(sums: UOp, *after: UOp) -> list[UOp]:
    """The registers' values after statements; tinygrad does not order its own loads after them."""
    return [UOp(Ops.CUSTOM, F32, src=(sums[i], *after), arg="(*{0})") for i in range(sums.max_numel())]


def uniform(value: UOp) -> UOp:
    """The first lane's value, which the compiler then knows to be the same in all lanes: products do not stay in flight
    across a branch that may diverge. tinygrad knows no bounds of the result."""
    return UOp(Ops.CUSTOM, dtypes.int, src=(UOp.const(0, I32) + value,), arg="__shfl_sync(0xffffffffu, {0}, 0)")


def hidden(value: UOp) -> UOp:
    """An int whose limits tinygrad does not know."""
    return UOp(Ops.CUSTOM, dtypes.int, src=(value,), arg="{0}")


def opaque(condition: UOp) -> UOp:
    """A condition of a store into which tinygrad does not look. Otherwise it would simplify what is stored, and so make
    a second loop in which the condition holds."""
    return UOp(Ops.CUSTOM, dtypes.bool, src=(condition,), arg="{0}")
