"""`tinyvllm profile`: where a step's time goes, kernel by kernel; what a trace says; what another chip would do."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from tinyvllm.cli.bench_flags import SubjectFlags, print_table, write_file
from tinyvllm.cli.flags import RunnerFlags
from tinyvllm.cli.terminal import progress_bars
from tinyvllm.config import EngineConfig
from tinyvllm.errors import TinyvllmError
from tinyvllm.profiling import measure
from tinyvllm.profiling.chips import CHIPS, Chip, find_chip, measured_chip
from tinyvllm.profiling.kernels import GROUPINGS, tabulate
from tinyvllm.profiling.predict import MEASURED, predict, predict_prompt
from tinyvllm.profiling.trace import parse_trace

if TYPE_CHECKING:
    from tinyvllm.bench.subject import Subject


@dataclasses.dataclass(frozen=True)
class ProfileFlags:
    """What is profiled, and how it is shown."""

    batch: Annotated[int, Option(metavar="COUNT", help="Sequences that decode at once.")] = 1
    context: Annotated[int, Option(metavar="TOKENS", help="That each sequence has behind it.")] = 128
    prefill: Annotated[
        int | None, Option(metavar="TOKENS", help="The step of a prompt this long instead of a decode step.")
    ] = None
    tokens: Annotated[int, Option(metavar="COUNT", help="Repeats of the step: the median counts.")] = 20
    warmup: Annotated[int, Option(metavar="COUNT", help="Untimed repeats before them.")] = 3
    by: Annotated[str, Option(metavar="WHAT", help=f"A line for each: {', '.join(GROUPINGS)}.")] = "operation"
    chip: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help=f"Whose roofline: {', '.join(CHIPS)}. [default: what the device names, else measured]",
            show_default=False,
        ),
    ] = None
    trace: Annotated[str | None, Option(metavar="FILE", help="Write host and kernels as a trace for Perfetto.")] = None
    from_: Annotated[
        str | None,
        Option("--from", metavar="FILE", help="Read a text of DEBUG=2 instead of running anything; - is stdin."),
    ] = None
    last_steps: Annotated[
        int | None, Option(metavar="COUNT", help="With --from: only so many steps before the text's end.")
    ] = None
    predict: Annotated[
        str | None,
        Option(
            metavar="CHIP",
            help="Predict the step, or with --prefill the prompt, on a chip instead of running; cpu is measured by a "
            "short test.",
        ),
    ] = None


def profile(*, flags: ProfileFlags, subject: SubjectFlags, runner: RunnerFlags) -> None:
    """Time the kernels of a step, named by what they do; read a DEBUG=2 text; predict another chip."""
    chosen = [name for name in ("from_", "predict") if getattr(flags, name) is not None]
    if len(chosen) > 1:
        raise TinyvllmError("--from reads a text and --predict calculates: give one of them")
    if flags.predict is not None and subject.markdown:
        raise TinyvllmError("--markdown is of kernels, and --predict runs none: give --json, or leave it out")
    if flags.by not in GROUPINGS:
        raise TinyvllmError(f"--by is {flags.by!r}: give one of {', '.join(GROUPINGS)}")
    runner.apply()
    if flags.from_ is not None:
        _read(flags, subject)
    elif flags.predict is not None:
        _predict(flags, subject, runner)
    else:
        _run(flags, subject, runner)


def _read(flags: ProfileFlags, subject: SubjectFlags) -> None:
    from tinyvllm.profiling.report import kernel_markdown, trace_table

    text = _text(flags.from_ or "-")
    trace = parse_trace(text)
    kernels = trace.kernels(flags.last_steps)
    if not kernels:
        raise TinyvllmError(
            f"{flags.from_} has no line of a kernel with a time: run the program with DEBUG=2 and keep all it prints"
        )
    chip = find_chip(flags.chip) if flags.chip else None
    if subject.markdown:
        print(kernel_markdown(tabulate(kernels, flags.by, chip)))
    else:
        print_table(trace_table(trace, flags.by, flags.last_steps, chip))
    rows = {f"by_{by}": [row.as_json() for row in tabulate(kernels, by, chip)] for by in GROUPINGS}
    counts = {"cut": trace.num_cut, "untimed": trace.num_untimed, "other_lines": trace.num_other_lines}
    subject.write_json({"schema": 1, "source": flags.from_, **counts, **rows})


def _text(path: str) -> str:
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise TinyvllmError(f"{path} cannot be read: {error}") from error


def _run(flags: ProfileFlags, subject: SubjectFlags, runner: RunnerFlags) -> None:
    config = EngineConfig(model=subject.model or "", max_num_seqs=1, **runner.settings())

    from tinyvllm.bench.kernels import one_case, profile_case
    from tinyvllm.bench.latency import Case, fit_config
    from tinyvllm.profiling.report import kernel_markdown, profile_table
    from tinyvllm.profiling.trace_events import trace_text

    chip = find_chip(flags.chip) if flags.chip else None
    case = Case("decode", flags.batch, flags.context) if flags.prefill is None else Case("prefill", 1, flags.prefill)
    work = one_case(case, repeats=flags.tokens, warmup=flags.warmup, seed=runner.seed)
    found = subject.find(pull=runner.pull)
    with progress_bars() as report:
        loaded = found.load(fit_config(config, work, found.model_config), report)
    with contextlib.closing(loaded), _recorded() as recorded:
        result = profile_case(loaded, found, work, chip)
    if subject.markdown:
        print(kernel_markdown(result.rows(flags.by)))
    else:
        print_table(profile_table(result, flags.by))
    if flags.trace is not None:
        write_file(flags.trace, trace_text(recorded[0], result.profile.launches))
    subject.write_json(result.as_json())


@contextlib.contextmanager
def _recorded() -> Iterator[list[measure.Recording]]:
    """A list that has the recording once the block is left."""
    recordings: list[measure.Recording] = []
    measure.start()
    try:
        yield recordings
    finally:
        recordings.append(measure.stop())


def _predict(flags: ProfileFlags, subject: SubjectFlags, runner: RunnerFlags) -> None:
    """Without weights or a graph: the counts are the shape's."""
    from tinyvllm.bench.shapes import find_shape
    from tinyvllm.profiling.report import prediction_table

    chip = _chip_to_predict(flags.predict or "", runner)
    found = subject.find(pull=runner.pull)
    kind = found.kind or _kind_of(found)
    if flags.prefill is None:
        prediction = predict(found.model_config, kind, chip, flags.batch, flags.context)
    else:
        step_tokens = runner.max_num_batched_tokens or _step_tokens(chip)
        prediction = predict_prompt(found.model_config, kind, chip, flags.prefill, step_tokens)
    checks = [(measured, measured.predict(find_shape(measured.shape))) for measured in MEASURED]
    print_table(prediction_table(found.name, kind, prediction, checks))
    document = prediction.as_json() | {
        "model": found.name,
        "dtype": kind,
        "checked": [
            {"what": m.title, "tok_s": m.tok_s, "predicted_tok_s": p.tok_s, "error": m.error_of(p)} for m, p in checks
        ],
    }
    subject.write_json(document)


def _step_tokens(chip: Chip) -> int:
    """Of a prompt in one step, where nobody says so."""
    from tinyvllm.execution import limits

    of_device = {"CPU": limits.CPU, "METAL": limits.SHARED_GPU, "CUDA": limits.CUDA}
    return of_device[chip.device].max_num_batched_tokens


def _chip_to_predict(name: str, runner: RunnerFlags) -> Chip:
    if name.lower() != "cpu":
        return find_chip(name)
    from tinyvllm.execution.hardware import measure_device

    return measured_chip("cpu", *measure_device(runner.cpu_cores), "CPU")


def _kind_of(subject: Subject) -> str:
    """The kind of weights whose size is closest to that of the model's files."""
    from tinyvllm.profiling.roofline import BYTES_PER_WEIGHT, weights_of

    assert subject.files is not None, subject.name
    path = subject.files.path
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    in_layers, in_table = weights_of(subject.model_config)
    num_weights = in_layers + in_table * (1 if subject.model_config.tie_embeddings else 2)
    size = sum(file.stat().st_size for file in files) / num_weights
    return min(BYTES_PER_WEIGHT, key=lambda kind: abs(BYTES_PER_WEIGHT[kind] - size))
