"""Products of quantized matrices by integer dot products: x is rounded to 16 or 8 bits, and nothing else is lost."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, UOp, dtypes

from tests.ops.builders import largest_difference, make_host, make_step, make_step_of, normal
from tests.ops.formats.drawn import BY_NAME, affine
from tests.sweeps import swept
from tinyvllm.arrays import CODE_BITS, Format, to_float32
from tinyvllm.config import LayerKind, count_physical
from tinyvllm.device.handle import DeviceHandle, has_dot_instructions, open_device
from tinyvllm.device.recording import record
from tinyvllm.device.replay import make_replay
from tinyvllm.ops.backend import Epilogue, Norm
from tinyvllm.ops.cpu import backend as cpu_backend
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.cpu.cores import MOST_CORES, count_cores
from tinyvllm.ops.cpu.dots import _statement
from tinyvllm.ops.cpu.fixed_rows import RowForm, fix_rows_kernel
from tinyvllm.ops.cpu.product import NormSpec
from tinyvllm.ops.cpu.unpacked_dots import add_statement, unpack_statement
from tinyvllm.ops.formats.dots import pack_dots
from tinyvllm.ops.formats.matrix import Planes, has_dots, high_bits, low_bits, pack, reads_dots, unpack
from tinyvllm.ops.kernel.body import Body, empty, finish, run_kernel
from tinyvllm.ops.step_inputs import StepLayout

COLS = 256
ROUNDED = {16: 4e-5, 8: 1.2e-2}  # of a product's largest value: what rounding x to so many bits may change
ROUNDED_64 = 1.5e-2  # to 8 bits where 64 columns share a unit: their peak is larger, and so is the unit
x86 = pytest.mark.skipif(not has_dot_instructions(), reason="the layout is for x86's instructions")
AFFINE = ("affine3_g64", "affine4_g64", "affine8_g128")
DRAWN = [name for name, fmt in BY_NAME.items() if has_dots(fmt)]
USUAL = (*("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"), *(f"{name}-float16" for name in AFFINE))

BY_DEFAULT = ("Q4_0", "Q4_K", "Q6_K", "affine3_g64-float16")  # with one scale and two, in one plane and in two
ROUNDINGS = [(name, (1, 6, 17, 5, 80)[i % 5], 16) for i, name in enumerate(USUAL)]


def multiply(backend: CpuBackend, host: Any, x: np.ndarray) -> np.ndarray:
    """norm(x) @ host.T, with a norm of ones."""
    norm = Norm(backend.device.upload(np.ones(x.shape[1], np.float32)), eps=1e-5)
    (out,) = backend.linear("test", backend.device.upload(x), [backend.matrix(host)], len(x), norm)
    parts = [np.asarray(part.numpy()).reshape(len(x), -1) for part in backend.parts_of(out)]
    return np.concatenate(parts, axis=1)


def normed(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("name", swept([*USUAL, *DRAWN], BY_DEFAULT))
def test_words_hold_what_a_checkpoint_does(name: str) -> None:
    """Read whole, and value by value, as embeddings are. All formats: pytest -m sweep tests/ops/cpu/test_dots.py"""
    host: Any = make_host(name, 40, COLS)
    matrix = pack(host, "dot", None, "CPU")
    np.testing.assert_allclose(unpack(matrix).numpy()[:40], to_float32(host), rtol=0, atol=2e-7)

    def kernel(out: UOp, *planes: UOp) -> UOp:
        body = Body()
        row, col = body.loop(64), body.loop(COLS)
        value = Planes(matrix.format, planes).value(row, col, COLS, "dot")
        return finish(out[row * COLS + col].store(value).end(col, row), "read_values")

    values = run_kernel(kernel, [empty(64 * COLS)], matrix.planes)[0].numpy().reshape(64, COLS)
    np.testing.assert_allclose(values[:40], to_float32(host), rtol=0, atol=2e-7)


@x86
@pytest.mark.parametrize(
    ("name", "tokens", "bits"),
    [
        *swept(ROUNDINGS, [case for case in ROUNDINGS if case[0] in BY_DEFAULT]),
        *[("Q4_K", 80, 8), ("Q6_K", 5, 8)],
        *[pytest.param(name, tokens, 8, marks=pytest.mark.sweep) for name, tokens in (("Q4_1", 1), ("Q8_0", 17))],
        *[
            pytest.param(name, tokens, bits, marks=pytest.mark.sweep)
            for name in DRAWN
            for tokens in (1, 9, 17)
            for bits in (16, 8)
        ],
    ],
)
def test_a_product_is_that_of_rounded_rows(device: DeviceHandle, name: str, tokens: int, bits: int) -> None:
    cols = 3 * COLS if tokens == 80 else COLS  # several blocks of rows, and chunks of columns
    host: Any = make_host(name, 64, cols)
    x = normal(tokens, cols)
    found = multiply(CpuBackend(device, None, x_bits=bits), host, x)
    form = RowForm.of(host.format, bits)
    allowed = ROUNDED_64 if (form.bits, form.group) == (8, 64) else ROUNDED[form.bits]
    assert largest_difference(found, normed(x) @ to_float32(host).astype(float).T) < allowed


@x86
@pytest.mark.parametrize(("name", "bits"), swept([("Q4_K", 16), ("Q6_K", 8)], [("Q4_K", 16)]))
def test_a_row_does_not_depend_on_its_neighbors_or_on_the_cores(name: str, bits: int) -> None:
    host, x = make_host(name, 96, COLS), normal(20, COLS)
    layers = [LayerKind(4, 2, 32)]
    one = CpuBackend(open_device(1), None, layers, x_bits=bits)
    three = CpuBackend(open_device(3), None, layers, x_bits=bits)
    together = multiply(one, host, x)
    np.testing.assert_array_equal(multiply(three, host, x), together)
    alone = np.concatenate([multiply(one, host, x[i : i + 1]) for i in (0, 19)])
    np.testing.assert_array_equal(together[[0, 19]], alone)
    np.testing.assert_array_equal(multiply(one, host, x[:8])[:1], alone[:1], "rounded by the product")


@x86
def test_whole_blocks_of_rows_are_computed_by_one_program() -> None:
    """That of a recorded step, which is launched for each block."""
    device = open_device(1)
    backend = CpuBackend(device, None, [LayerKind(4, 2, 32)], x_bits=16)
    host, norm = make_host("Q4_1", 32, COLS), Norm(device.upload(np.ones(COLS, np.float32)), eps=1e-5)
    matrix, launched = backend.matrix(host), []
    for num_rows in (64, 192):
        x = normal(num_rows, COLS)
        read, residual = device.upload(x), device.upload(normal(num_rows, 32))

        def trace(read: Tensor = read, residual: Tensor = residual, rows: int = num_rows) -> Tensor:
            out = backend.linear("test", read, [matrix], rows, norm, Epilogue(residual=residual))[0]
            return backend.parts_of(out)[0].realize()

        step = record(trace)
        make_replay(device, step)()
        found = device.read(step.output).view(np.float32)
        np.testing.assert_array_equal(found, np.asarray(trace().numpy()).reshape(-1))
        launched.append([(call.target.arg.name, call.target.arg.global_size[0]) for call in step.calls])
    names = f"norm_fixed_4096x{COLS}_32", f"test_Q4_1_4096x32x{COLS}"
    assert launched == [[(name, blocks) for name in names] for blocks in (1, 3)]


@pytest.mark.parametrize(("normed_first", "bits"), [(False, 16), (True, 16), (True, 8)])
def test_rows_are_rounded_to_their_groups_unit(normed_first: bool, bits: int) -> None:
    x = normal(3, 128) * np.logspace(-20, 4, 128, dtype=np.float32)
    x[2, :32], x[1, 40], x[1, 70] = 0.0, np.inf, np.nan
    spec, form = NormSpec(3, 128, 1e-5, (32, 96)), RowForm.of(affine(4, 32), bits)
    parts = [Tensor(np.ascontiguousarray(part).reshape(-1)).realize() for part in np.split(x, [32], axis=1)]
    parts += [Tensor(np.ones(128, np.float32)).realize()] if normed_first else []
    outs = [empty(3 * 4 * form.words, dtypes.short), empty(3 * 4 * 2)]
    outs = run_kernel(fix_rows_kernel(spec, form, normed_first), outs, parts)
    integers, factors = _in_order(outs[0].numpy(), form).reshape(3, 4, 32), outs[1].numpy().reshape(3, 4, 2)
    with np.errstate(invalid="ignore"):
        expected = (normed(x) if normed_first else x.astype(float)).reshape(3, 4, 32)
    units = factors[..., :1].astype(float)
    for row in (0, 2):
        peak = np.abs(expected[row]).max(-1, keepdims=True)
        assert (np.abs(integers[row] * units[row] - expected[row]) <= peak * (0.51 / form.largest) + 1e-34).all()
        np.testing.assert_allclose(factors[row, :, 1], (integers[row] * units[row]).sum(-1), rtol=1e-6, atol=1e-30)
    lost = slice(None) if normed_first else [1, 2]
    assert not np.isfinite(factors[1, lost, 0]).any(), "a product with infinity or NaN must not look like a number"


def _in_order(words: np.ndarray, form: RowForm) -> np.ndarray:
    """Integers of rows, flat, in the order of the columns."""
    if form.bits == 16:
        return words.astype(float)
    return words.view(np.int8).reshape(-1, form.run // 2, 2).swapaxes(1, 2).reshape(-1).astype(float)


def _in_words(integers: np.ndarray, form: RowForm) -> np.ndarray:
    """The opposite."""
    if form.bits == 16:
        return integers.astype(np.int16)
    return np.ascontiguousarray(integers.astype(np.int8).reshape(-1, 2, form.run // 2).swapaxes(1, 2)).view(np.int16)


TARGETS = ["x86-64", "haswell", "skylake-avx512", "icelake-server", "alderlake"]
DOT_BITS = [bits for bits in CODE_BITS if has_dots(affine(bits, 64))]
BOTH_BITS = [(bits, x_bits) for bits in DOT_BITS for x_bits in (16, 8) if x_bits == 16 or bits < 8]  # as RowForm


@x86
@pytest.mark.parametrize(
    ("bits", "x_bits"),
    swept(BOTH_BITS, [(4, 8)]),  # two planes, and rows of 16 bits: above, on this processor
)
def test_every_processors_statements_give_the_same_sums(tmp_path: Path, bits: int, x_bits: int) -> None:
    """Compiled for each; those that this computer can run."""
    fmt, rng = replace(affine(bits, 64), offset=0), np.random.default_rng(bits)
    form = RowForm.of(fmt, x_bits)
    assert form.bits == x_bits
    codes = rng.integers(0, 1 << bits, (32, 64)).astype(np.uint8)
    x = rng.integers(-form.largest, form.largest + 1, (3, 64))
    x[0], x[1] = form.largest, -form.largest  # the largest sums
    codes[0] = (1 << bits - (bits == 8)) - 1
    signed = codes.view(np.int8) if bits == 8 else codes
    expected = x.astype(np.int64) @ signed.T.astype(np.int64)
    planes = [pack_dots(codes, low_bits(fmt))]
    planes += [pack_dots(codes >> low_bits(fmt), high_bits(fmt))] if high_bits(fmt) else []
    planes = [np.ascontiguousarray(plane.T) for plane in planes]  # (runs, 32)
    rows = [_in_words(row, form) for row in x]
    dot = _statement(fmt, form, 3).format(*["a", "b", "c", "d", "e", "f"][: 4 + len(planes)])
    unpack = unpack_statement(fmt, form, 64).format(*["a", "b", "f"][: 1 + len(planes)])
    add = add_statement(fmt, form, 3, 1, has_addend=True).format("g", "a", "h", "h", "c", "d", "e", "i", "i", "i")
    source = tmp_path / "statement.c"
    source.write_text(
        f"void dot(int* a, unsigned* b, short* c, short* d, short* e, unsigned* f) {{ {dot} }}\n"
        f"void unpack(unsigned* a, unsigned* b, unsigned* f) {{ {unpack} }}\n"
        f"void add(unsigned* a, short* c, short* d, short* e, float* g, float* h, float* i) {{ {add} }}\n"
    )
    flags = Path("/proc/cpuinfo").read_text().split()
    needs = {"haswell": "avx2", "skylake-avx512": "avx512bw", "icelake-server": "avx512_vnni", "alderlake": "avx_vnni"}
    for target in TARGETS:
        file = tmp_path / f"{target}.so"
        command = ["clang", "-shared", "-fPIC", "-O2", f"-march={target}", str(source), "-o", str(file)]
        subprocess.run(command, check=True)
        if target in needs and needs[target] not in flags:
            continue
        library, sums = ctypes.CDLL(str(file)), np.zeros((3, 32), np.int32)
        library.dot(*map(_pointer, [sums, planes[0], *rows, planes[-1]]))
        np.testing.assert_array_equal(sums, expected, err_msg=target)
        words, added = np.zeros((32, 32), np.uint32), np.ones((3, 32), np.float32)
        for half in (0, 16):
            library.unpack(*[_pointer(plane.reshape(-1)[half:]) for plane in (words, planes[0], planes[-1])])
        factors = np.array([0.5, 3.0], np.float32)  # the unit, and the sum of x
        library.add(*map(_pointer, [words, *rows, added, np.full(32, 2.0, np.float32), factors]))
        np.testing.assert_array_equal(added, 1 + expected.astype(np.float32) + 2 * 3.0, err_msg=target)


def _pointer(array: np.ndarray) -> Any:
    return array.ctypes.data_as(ctypes.c_void_p)


def test_a_table_of_many_shards_is_read_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel takes so many buffers and no more."""
    monkeypatch.setattr(cpu_backend, "MOST_PLANES", 4)
    backend = CpuBackend(open_device(3), None, [LayerKind(4, 2, 32)], x_bits=16)
    host, layout, ids = make_host("Q4_1", 96, COLS), StepLayout(4, 1, 1, 8), [95, 31, 32, 64]
    buffer = make_step(layout, [])
    layout.views(buffer)["token_ids"][:] = ids
    out = backend.embed(backend.matrix(host), make_step_of(backend, layout, buffer), 2.0)
    found = np.concatenate([part.numpy().reshape(4, -1) for part in backend.parts_of(out)], axis=1)
    np.testing.assert_allclose(found, 2 * to_float32(host)[ids], rtol=0, atol=1e-6)


def test_which_matrices_have_words() -> None:
    assert all(reads_dots(make_host(name, 32, COLS)) for name in (*USUAL, "Q5_0", "Q5_1"))
    assert not any(has_dots(fmt) for fmt in (BY_NAME["nf4-float32"], BY_NAME["FP8-float32"], Format("float16", 16)))


# -- cores -----------------------------------------------------------------------------------------------------------


def test_cores_beyond_the_kv_heads_are_used_where_heads_fill_panels() -> None:
    def cores(available: int, *layers: LayerKind) -> int:
        return count_cores(available, layers)

    assert cores(16, LayerKind(32, 8, 64)) == 16
    assert cores(16, LayerKind(9, 3, 64)) == 16
    assert cores(64, LayerKind(32, 8, 128)) == MOST_CORES
    assert cores(16, LayerKind(32, 8, 80)) == 4, "two KV heads of 80 fill panels"
    assert cores(16, replace(LayerKind(32, 8, 64), head_norm_eps=1e-6, head_norm_is_whole=True)) == 8
    assert cores(16, LayerKind(32, 8, 64), replace(LayerKind(32, 8, 64), has_output_gate=True)) == 8
    assert cores(64, replace(LayerKind(40, 40, 128), head_norm_eps=1e-6, head_norm_is_whole=True)) == MOST_CORES
    assert cores(16) == 1


def test_siblings_of_a_core_count_once(tmp_path: Path) -> None:
    for core in range(4):
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{core % 2},{core % 2 + 2}\n")
    assert count_physical([0, 1, 2, 3], tmp_path) == 2
    assert count_physical([0, 3], tmp_path) == 2
    assert count_physical([0, 2, 7], tmp_path) == 2, "of core 7 the system says nothing"
