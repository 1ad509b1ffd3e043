"""`tinyvllm profile`: a step's time kernel by kernel, from a run or a DEBUG=2 log, or predicted for another chip."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from typer import Option

from tinyvllm.cli.bench_flags import SubjectFlags, print_table, write_file
from tinyvllm.cli.flags import RunnerFlags, refuse_others
from tinyvllm.cli.terminal import progress_bars
from tinyvllm.config import EngineConfig
from tinyvllm.errors import TinyvllmError
from tinyvllm.profiling import measure
from tinyvllm.profiling.chips import CHIPS, Chip, find_chip, measured_chip
from tinyvllm.profiling.kernels import GROUPINGS
from tinyvllm.profiling.predict import MEASURED, predict, predict_prompt
from tinyvllm.profiling.trace import parse_trace


@dataclasses.dataclass(frozen=True)
class ProfileFlags:
    """What to profile, and how to show it."""

    batch: Annotated[int, Option(metavar="COUNT", help="Sequences that decode together.")] = 1
    context: Annotated[int, Option(metavar="TOKENS", help="Tokens already in each sequence.")] = 128
    prefill: Annotated[
        int | None,
        Option(
            metavar="TOKENS",
            help="Profile a prompt of this length, with all of its steps together, instead of a decode step.",
        ),
    ] = None
    tokens: Annotated[
        int | None,
        Option(
            metavar="COUNT",
            help="Timed repeats of the step; medians are reported. [default: 20, of a prompt 5]",
            show_default=False,
        ),
    ] = None
    warmup: Annotated[int, Option(metavar="COUNT", help="Untimed repeats first.")] = 3
    by: Annotated[str, Option(metavar="WHAT", help=f"One row for each: {', '.join(GROUPINGS)}.")] = "operation"
    chip: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help=f"The chip whose roofline applies: {', '.join(CHIPS)}. "
            "[default: from the device's name, else measured]",
            show_default=False,
        ),
    ] = None
    trace: Annotated[
        str | None, Option(metavar="FILE", help="Write host spans and kernels as a trace for Perfetto.")
    ] = None
    from_: Annotated[
        str | None,
        Option("--from", metavar="FILE", help="Read the output of DEBUG=2 instead of running anything; - reads stdin."),
    ] = None
    last_steps: Annotated[int | None, Option(metavar="COUNT", help="With --from: only the last steps of the log.")] = (
        None
    )
    predict: Annotated[
        str | None,
        Option(
            metavar="CHIP",
            help="Predict the step, or with --prefill the prompt, for this chip instead of running it; cpu: this "
            "machine's, measured in a short test.",
        ),
    ] = None


# the flags that a log and a prediction have a use for
OF_LOGS = ("from_", "last_steps", "by", "chip", "trace", "json", "markdown", "log_level")
OF_PREDICTIONS = (
    *("predict", "model", "shape", "weights", "layers", "batch", "context", "prefill", "json", "pull", "log_level"),
    *("max_num_batched_tokens", "cpu_cores"),
)
REPEATS, PROMPT_REPEATS = 20, 5


def profile(*, flags: ProfileFlags, subject: SubjectFlags, runner: RunnerFlags) -> None:
    """Time the kernels of one step, named by what they do.

    Or read a DEBUG=2 log of tinygrad's (--from), or predict the speed of a chip that is not here (--predict)."""
    if flags.from_ is not None and flags.predict is not None:
        raise TinyvllmError("--from reads a log and --predict calculates: give one of them")
    groups = (flags, subject, runner)
    if flags.from_ is not None:
        refuse_others(groups, OF_LOGS, "--from reads a log, and runs nothing")
    elif flags.predict is not None:
        refuse_others(groups, OF_PREDICTIONS, "--predict calculates a step from counts, and runs no kernel")
    elif flags.last_steps is not None:
        raise TinyvllmError("--last-steps chooses steps of a log: give --from FILE too")
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
    from tinyvllm.profiling.profile_report import SCHEMA, markdown_by, tables_as_json, trace_table
    from tinyvllm.profiling.trace_events import in_turn, trace_text

    text = _text(flags.from_ or "-")
    trace = parse_trace(text)
    kernels = trace.kernels(flags.last_steps)
    if not kernels:
        raise TinyvllmError(
            f"{flags.from_} has no line with a kernel's time: run the program with DEBUG=2 and keep all of its output"
        )
    chip = find_chip(flags.chip) if flags.chip else None
    if subject.markdown:
        print(markdown_by(flags.by, kernels, chip))
    else:
        print_table(trace_table(trace, flags.by, flags.last_steps, chip))
    rows = tables_as_json(kernels, chip, GROUPINGS)
    if flags.trace is not None:
        write_file(flags.trace, trace_text(None, in_turn(kernels)))
    counts = {"cut": trace.num_cut, "untimed": trace.num_untimed, "other_lines": trace.num_other_lines}
    subject.write_json({"schema": SCHEMA, "source": flags.from_, **counts, **rows})


def _text(path: str) -> str:
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise TinyvllmError(f"{path} cannot be read: {error}") from error


def _run(flags: ProfileFlags, subject: SubjectFlags, runner: RunnerFlags) -> None:
    config = EngineConfig(model=subject.model or "", max_num_seqs=1, **runner.settings())

    from tinyvllm.bench.kernel_profile import one_case, profile_case
    from tinyvllm.bench.latency import Case, fit_config
    from tinyvllm.execution.inspector import RunnerInspector
    from tinyvllm.profiling.profile_report import markdown_by, profile_table
    from tinyvllm.profiling.trace_events import trace_text

    chip = find_chip(flags.chip) if flags.chip else None
    case = Case("decode", flags.batch, flags.context) if flags.prefill is None else Case("prefill", 1, flags.prefill)
    usual = REPEATS if flags.prefill is None else PROMPT_REPEATS
    repeats = usual if flags.tokens is None else flags.tokens
    work = one_case(case, repeats=repeats, warmup=flags.warmup, seed=runner.seed)
    found = subject.find(pull=runner.pull)
    with progress_bars() as report:
        loaded = found.load(fit_config(config, work, found.model_config), report)
    with contextlib.closing(loaded), _recorded() as recorded:
        result = profile_case(RunnerInspector(loaded), found, work, chip)
    if subject.markdown:
        print(markdown_by(flags.by, result.profile.kernels, result.chip))
    else:
        print_table(profile_table(result, flags.by))
    if flags.trace is not None:
        write_file(flags.trace, trace_text(recorded[0], result.profile.launches))
    subject.write_json(result.as_json())


@contextlib.contextmanager
def _recorded() -> Iterator[list[measure.Recording]]:
    """A list that holds the recording once the block ends."""
    recordings: list[measure.Recording] = []
    measure.start()
    try:
        yield recordings
    finally:
        recordings.append(measure.stop())


def _predict(flags: ProfileFlags, subject: SubjectFlags, runner: RunnerFlags) -> None:
    """Predict from the counts of the model's shape, without weights or graphs."""
    from tinyvllm.bench.shapes import find_shape
    from tinyvllm.execution.stored_weights import stored_weights
    from tinyvllm.profiling.profile_report import prediction_table
    from tinyvllm.profiling.roofline import WeightBytes

    chip = _chip_to_predict(flags.predict or "", runner)
    found = subject.find(pull=runner.pull)
    weights = (
        WeightBytes.of_kind(found.kind) if found.files is None else stored_weights(found.files, found.model_config)
    )
    if flags.prefill is None:
        prediction = predict(found.model_config, weights, chip, flags.batch, flags.context)
    else:
        step_tokens = runner.max_num_batched_tokens or _step_tokens(chip)
        prediction = predict_prompt(found.model_config, weights, chip, flags.prefill, step_tokens)
    checks = [(measured, measured.predict(find_shape(measured.shape))) for measured in MEASURED]
    print_table(prediction_table(found.name, weights.name, prediction, checks))
    document = prediction.as_json() | {
        "model": found.name,
        "dtype": weights.name,
        "checked": [
            {"what": m.title, "tok_s": m.tok_s, "predicted_tok_s": p.tok_s, "error": m.error_of(p)} for m, p in checks
        ],
    }
    subject.write_json(document)


def _step_tokens(chip: Chip) -> int:
    """Tokens of a prompt in one step, by default."""
    from tinyvllm.execution.limits import limits_of_kind

    return limits_of_kind(chip.device).max_num_batched_tokens


def _chip_to_predict(name: str, runner: RunnerFlags) -> Chip:
    if name.lower() != "cpu":
        return find_chip(name)
    from tinyvllm.execution.hardware import measure_device

    return measured_chip("cpu", *measure_device(runner.cpu_cores), "CPU")
