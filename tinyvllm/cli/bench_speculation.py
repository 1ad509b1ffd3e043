"""`tinyvllm bench speculation`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, cast

from typer import Option

from tinyvllm.bench.prompts import make_ids
from tinyvllm.bench.speculation_tasks import TASKS, check_tasks, make_prompts
from tinyvllm.cli.bench_flags import SubjectFlags, parse_count, parse_counts, print_table, split_list
from tinyvllm.cli.flags import RunnerFlags
from tinyvllm.cli.terminal import Progress, progress_bars
from tinyvllm.config import EngineConfig, SpeculativeConfig
from tinyvllm.errors import TinyvllmError

if TYPE_CHECKING:
    from tinyvllm.bench.speculation import SpeculationCase
    from tinyvllm.bench.subject import Subject
    from tinyvllm.engine.hosts import Loaded
    from tinyvllm.execution.runner import ModelRunner
    from tinyvllm.scheduling.drafts import Drafter


@dataclasses.dataclass(frozen=True)
class CaseFlags:
    """What to measure: each task or acceptance, with each batch and each number of drafts."""

    tasks: Annotated[
        str,
        Option(metavar="NAMES", help=f"Real tasks: {', '.join(TASKS)}; none: skip. They need a model's files."),
    ] = ",".join(TASKS)
    acceptance: Annotated[
        str,
        Option(
            metavar="SHARES",
            help="Also draft the tokens that are known to come, each right with this probability, such as 0,0.5,0.95: "
            "what any drafter of that quality would gain, if drafting took no time. Prompts are random ids.",
        ),
    ] = "none"
    batch: Annotated[str, Option(metavar="COUNTS", help="Sequences that decode together, such as 1,4.")] = "1"
    drafts: Annotated[
        str,
        Option(
            metavar="COUNTS",
            help="Drafted tokens of a sequence and step, such as 1,4,8; auto: as many as pay, up to "
            "num_speculative_tokens.",
        ),
    ] = "auto"
    input_len: Annotated[int, Option(metavar="TOKENS", help="Tokens of a prompt, with --acceptance.")] = 128
    speculative_config: Annotated[
        str,
        Option(
            "--speculative-config",
            "-sc",
            metavar="JSON",
            help="As for `tinyvllm serve`: which drafter, and how many tokens.",
        ),
    ] = '{"method": "ngram"}'

    def parse(self, *, has_files: bool) -> Cases:
        """Raises TinyvllmError for a bad value, or if there is nothing to measure."""
        cases = Cases(
            tasks=split_list(self.tasks) if has_files else [],
            shares=[_parse_share(text) for text in split_list(self.acceptance)],
            batches=parse_counts("batch", self.batch),
            counts=[0 if text == "auto" else parse_count("drafts", text) for text in split_list(self.drafts)],
            config=SpeculativeConfig.of(self.speculative_config),
            input_len=self.input_len,
        )
        check_tasks(cases.tasks)
        if not cases.batches or not cases.counts or not (cases.tasks or cases.shares):
            raise TinyvllmError("there is nothing to measure: give --tasks (with a model) or --acceptance 0,0.5,0.95")
        return cases


@dataclasses.dataclass(frozen=True)
class Cases:
    """The parsed `CaseFlags`. counts: of drafts, fixed; 0: the rule chooses, up to `config`'s."""

    tasks: list[str]
    shares: list[float]
    batches: list[int]
    counts: list[int]
    config: SpeculativeConfig
    input_len: int  # of prompts of random ids

    @property
    def largest_config(self) -> SpeculativeConfig:
        """The settings of an engine that can run all cases."""
        most = max(self.config.num_drafts, *self.counts)
        return SpeculativeConfig.of(dataclasses.asdict(self.config) | {"num_speculative_tokens": most})


def speculation(
    *,
    flags: CaseFlags,
    tokens: Annotated[int, Option(metavar="COUNT", help="Maximum tokens of an answer.")] = 256,
    temperature: Annotated[float, Option(metavar="NUMBER", help="0: greedy. Tokens are equal in any case.")] = 0.0,
    repeats: Annotated[int, Option(metavar="COUNT", help="Timed repeats, with drafts and without in turn.")] = 3,
    warmup: Annotated[int, Option(metavar="COUNT", help="Untimed repeats first.")] = 1,
    subject: SubjectFlags,
    runner: RunnerFlags,
) -> None:
    """Time decoding with drafts and without, and compare the tokens.

    The prefix cache is off, and prompts are not timed."""
    runner.apply()
    cases = flags.parse(has_files=subject.shape is None)
    config = EngineConfig(
        model=subject.model or "",
        max_num_seqs=max(cases.batches),
        speculative_config=cases.largest_config,
        **runner.settings(),
    )

    from tinyvllm.bench.speculation import SpeculationWork, measure_speculation
    from tinyvllm.bench.speculation_table import speculation_table

    found = subject.find(pull=runner.pull)
    work = SpeculationWork(tokens, repeats, warmup, temperature, runner.seed)
    with _opened(found, config) as (opened, report):
        machine = found.describe(opened.runner, None, runner.seed)
        rows = measure_speculation(opened.runner, machine, _make_cases(cases, opened, runner.seed), work, report)
    if not subject.markdown:
        print_table(speculation_table(rows))
    subject.write(rows)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A warm runner. Without a model's files there is neither a drafter nor text."""

    runner: ModelRunner
    drafter: Drafter | None = None
    text: Loaded | None = None
    eos_ids: frozenset[int] = frozenset()


@contextlib.contextmanager
def _opened(subject: Subject, config: EngineConfig) -> Iterator[tuple[Opened, Progress]]:
    """The subject, loaded, and a function that reports further stages as progress bars on stderr."""
    from tinyvllm.engine.loading import load_engine, load_text

    with progress_bars() as report:
        if subject.files is None:
            opened = Opened(subject.load(config, report))
        else:
            config = dataclasses.replace(config, model=str(subject.files.path))
            loaded = load_engine(config, report)
            speculator = loaded.core.scheduler.speculator
            drafter = None if speculator is None else speculator.drafter
            opened = Opened(cast("ModelRunner", loaded.runner), drafter, loaded, load_text(config).eos_ids)
        try:
            yield opened, report
        finally:
            opened.runner.close()


def _make_cases(cases: Cases, opened: Opened, seed: int) -> list[SpeculationCase]:
    from tinyvllm.bench.speculation import REPLAY_TEMPERATURE, ReplayDrafter, SpeculationCase

    vocab_size = opened.runner.model_config.vocab_size
    made = []
    for batch, task in itertools.product(cases.batches, cases.tasks):
        assert opened.drafter is not None
        prompts = [_tokenize(opened, prompt) for prompt in make_prompts(task, batch)]
        made.append(SpeculationCase(task, tuple(prompts), opened.drafter, opened.eos_ids))
    for batch, share in itertools.product(cases.batches, cases.shares):
        prompts = [tuple(make_ids(cases.input_len, vocab_size, seed + number)) for number in range(batch)]
        drafter = ReplayDrafter(share, vocab_size, seed)
        made.append(SpeculationCase(f"{share:.0%} right", tuple(prompts), drafter, temperature=REPLAY_TEMPERATURE))
    return [
        case.with_rule(cases.config, count, opened.runner.verify_sizes)
        for case, count in itertools.product(made, cases.counts)
    ]


def _tokenize(opened: Opened, prompt: str) -> tuple[int, ...]:
    """A chat of one message; the text alone if the model has no chat template."""
    assert opened.text is not None
    if opened.text.chat_template is None:
        return tuple(opened.text.tokenizer.encode(f"{prompt}\n\n"))
    text = opened.text.chat_template.render([{"role": "user", "content": prompt}])
    return tuple(opened.text.tokenizer.encode_chat(text))


def _parse_share(text: str) -> float:
    """Raises TinyvllmError unless the text is a number from 0 to 1."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise TinyvllmError(f"--acceptance has {text!r}: give probabilities from 0 to 1, such as 0,0.5,0.95")
    return share
