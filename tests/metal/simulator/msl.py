"""Reading a kernel's Metal source: its parameters and limits, what Apple's compiler would refuse, and its C++.

The text is tinygrad's renderer's (or one written alike): one kernel, parameters without `[[buffer(n)]]`, threadgroup
arrays declared at the head of the body. It is compiled as it is, except that threadgroup arrays become references into
the runtime's threadgroup memory; lines keep their numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_BUFFERS = 31  # Metal Feature Set Tables: entries in the buffer argument table, by function
MAX_THREADGROUP_BYTES = 32 << 10  # Apple4 to Apple9 and Mac2
MAX_THREADS = 1024
SIMDGROUP = 32

SIZES = {"char": 1, "bool": 1, "short": 2, "half": 2, "bfloat": 2, "int": 4, "float": 4, "long": 8}
SCALARS = (*SIZES, "uchar", "ushort", "uint", "ulong")
VECTOR_WIDTHS = ("2", "3", "4")
PLACES = {"threadgroup_position_in_grid": "gid", "thread_position_in_threadgroup": "lid"}

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
_SIGNATURE = re.compile(r"kernel void (\w+)\((.*?)\)\s*\{", re.S)
_SHARED = re.compile(
    r"^(?P<indent>\s*)threadgroup\s+(?:__attribute__\(\(aligned\(\d+\)\)\)\s+)?"
    r"(?P<type>[a-z][\w ]*?)\s+(?P<name>\w+)\[(?P<count>\d+)\];",
    re.M,
)
_SHARED_QUALIFIER = re.compile(r"threadgroup\s+(?:__attribute__\(\(aligned\(\d+\)\)\)\s+)?(?=[a-z])")
_MEETING = re.compile(r"\b(threadgroup_barrier|simdgroup_\w+|simd_\w+)\b")
_VECTOR = re.compile(rf"\b(?:{'|'.join(SCALARS)})([1-9]\d*)\b")
_NOT_METAL = re.compile(r"\b(?:double\d*|(?:un)?signed_\w+|__\w*fp8\w*)\b")
_SIZED = re.compile(r"_(\d+)$")


class MslError(ValueError):
    """What Apple's compiler would refuse, or what the simulator does not know."""


@dataclass(frozen=True)
class Param:
    """A buffer (`device`) or a Variable (`constant`) of a kernel."""

    name: str
    type: str
    is_constant: bool

    @property
    def nbytes(self) -> int | None:
        """Its size where tinygrad names it (`data0_64`: 64 elements), else None."""
        if self.is_constant:
            return size_of(self.type)
        match = _SIZED.search(self.name)
        return int(match[1]) * size_of(self.type) if match else None


@dataclass(frozen=True)
class Shared:
    """An array in threadgroup memory."""

    name: str
    type: str
    count: int
    offset: int

    @property
    def nbytes(self) -> int:
        return self.count * size_of(self.type)


@dataclass(frozen=True)
class Kernel:
    name: str
    source: str
    params: tuple[Param, ...]
    places: tuple[str, ...]  # gid and lid, in the order in which they follow the buffers
    shared: tuple[Shared, ...]
    meets: bool  # threads wait for others: barriers, shuffles, matrices
    uses_matrices: bool

    @property
    def threadgroup_bytes(self) -> int:
        return sum(-(-array.nbytes // 16) * 16 for array in self.shared)

    def line(self, number: int) -> str:
        lines = self.source.splitlines()
        return lines[number - 1].strip() if 0 < number <= len(lines) else ""


def size_of(scalar: str) -> int:
    """Bytes of a scalar type, by any of its names. Raises MslError for what is none."""
    plain = scalar.replace("unsigned ", "").replace("signed ", "")
    plain = plain[1:] if plain in ("uchar", "ushort", "uint", "ulong") else plain
    if plain not in SIZES:
        raise MslError(f"type {scalar!r} is not in Metal")
    return SIZES[plain]


def read_kernel(source: str) -> Kernel:
    """Raises MslError where there is no kernel, or parameters that the simulator does not know."""
    plain = _COMMENT.sub("", source)
    found = _SIGNATURE.search(plain)
    if found is None:
        raise MslError("there is no kernel in this source")
    params, places = [], []
    for text in found[2].split(","):
        words = text.split("[[")[0].split()
        if "[[" in text:
            attribute = text.split("[[")[1].split("]]")[0].strip()
            if attribute not in PLACES:
                raise MslError(f"attribute [[{attribute}]] is not simulated")
            places.append(PLACES[attribute])
            continue
        if places or words[0] not in ("device", "constant"):
            raise MslError(f"parameter {text.strip()!r} is not simulated")
        params.append(Param(words[-1], " ".join(words[1:-1]).rstrip("*& "), words[0] == "constant"))
    return Kernel(
        name=found[1],
        source=source,
        params=tuple(params),
        places=tuple(places),
        shared=_shared(plain),
        meets=_MEETING.search(plain) is not None,
        uses_matrices="simdgroup_multiply_accumulate" in plain,
    )


def _shared(source: str) -> tuple[Shared, ...]:
    arrays, offset = [], 0
    for match in _SHARED.finditer(source):
        arrays.append(Shared(match["name"], match["type"], int(match["count"]), offset))
        offset += -(-arrays[-1].nbytes // 16) * 16
    return tuple(arrays)


def refusals(kernel: Kernel) -> list[str]:
    """What Apple's compiler would say of it, as far as can be told by reading."""
    plain = _COMMENT.sub("", kernel.source)
    out = [f"type '{name}' is not in Metal" for name in sorted(set(_NOT_METAL.findall(plain)))]
    widths = {match[0]: match[1] for match in _VECTOR.finditer(plain)}
    out += [f"vector type '{name}' is not in Metal" for name, width in widths.items() if width not in VECTOR_WIDTHS]
    if len(kernel.params) > MAX_BUFFERS:
        out.append(f"{len(kernel.params)} buffer arguments, but there are {MAX_BUFFERS} places")
    return out


def to_cpp(kernel: Kernel) -> str:
    """The kernel as C++, with an entry point `sim_entry(arguments, gid, lid)`."""
    offsets = {array.name: array.offset for array in kernel.shared}

    def declare(match: re.Match[str]) -> str:
        kind, name, count = match["type"], match["name"], match["count"]
        memory = f"*({kind} (*)[{count}])(sim_threadgroup + {offsets[name]})"
        return f"{match['indent']}{kind} (&{name})[{count}] = {memory};"

    source = _SHARED_QUALIFIER.sub("", _SHARED.sub(declare, kernel.source))
    arguments = [
        f"*(const {param.type}*)a[{i}]" if param.is_constant else f"({param.type}*)a[{i}]"
        for i, param in enumerate(kernel.params)
    ]
    call = f"{kernel.name}({', '.join([*arguments, *kernel.places])})"
    entry = '__attribute__((no_sanitize("thread"))) void sim_entry(void** a, uint3 gid, uint3 lid)'
    return f'{source}\nextern "C" {entry} {{ {call}; }}\n'
