"""Find a model's files, load them, and build the engine around them. Shared by LLM and AsyncEngine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tinyvllm.config import Capacity, EngineConfig, GenerationDefaults, ModelConfig, ModelFiles
from tinyvllm.engine.adapters import Adapters, EngineAdapters
from tinyvllm.engine.admission import RequestFactory
from tinyvllm.engine.constraints import GrammarCompiler
from tinyvllm.engine.core import Captures, EngineCore, Runner
from tinyvllm.engine.drafters import CapturesInTurn, find_draft_files, load_drafter, memory_beside
from tinyvllm.engine.hosts import Loaded
from tinyvllm.engine.output import TextEngine
from tinyvllm.errors import TinyvllmError
from tinyvllm.execution.early_start import begin_early, end_early
from tinyvllm.scheduling.adapter_slots import AdapterSlots
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.draft_rule import make_rule
from tinyvllm.scheduling.drafts import Drafter, Speculator
from tinyvllm.scheduling.scheduler import Scheduler
from tinyvllm.scheduling.step_pace import StepPace
from tinyvllm.scheduling.tiers import Tiers
from tinyvllm.storage.model_config import read_generation_defaults, read_model_config
from tinyvllm.storage.resolve import resolve_model
from tinyvllm.text.chat import ChatTemplate, end_of_turn_ids, load_chat_template
from tinyvllm.text.reasoning import find_reasoning_format
from tinyvllm.text.tokenizer import Tokenizer, load_tokenizer
from tinyvllm.text.tools import find_tool_format

if TYPE_CHECKING:
    from tinyvllm.execution.runner import ModelRunner

Progress = Callable[[str, int, int], None]  # stage ("load", "warm-up"), done, total


@dataclass(frozen=True, kw_only=True)
class LoadedEngine(Loaded):
    """A loaded model with all that answers requests for it. Runner and engine stay on their thread."""

    runner: Runner
    engine: TextEngine

    @property
    def core(self) -> EngineCore:
        return self.engine.core


def model_name(config: EngineConfig) -> str:
    """The name that clients use for the model: the served name if one is set, else that of its files."""
    if config.served_model_name is not None:
        return config.served_model_name
    try:
        return resolve_model(config.model).name
    except TinyvllmError:  # loading reports this error in full, to everyone who waits for the engine
        return config.model


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a model's files say about text: enough to turn requests into token ids and token ids into answers."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    generation_defaults: GenerationDefaults

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.eos_ids) | frozenset(self.generation_defaults.eos_ids)

    def for_callers(
        self, model_config: ModelConfig, capacity: Capacity, seed: int | str, grammars: GrammarCompiler | None = None
    ) -> Loaded:
        """All that a caller of an engine with these limits needs. grammars: a prepared compiler."""
        if grammars is None or grammars.vocab_size != model_config.vocab_size:
            grammars = GrammarCompiler(self.tokenizer, model_config.vocab_size, self.eos_ids)
        encode = functools.partial(self.tokenizer.encode, add_special_tokens=False)
        return Loaded(
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            generation_defaults=self.generation_defaults,
            factory=RequestFactory(model_config.vocab_size, capacity, self.eos_ids, seed, encode),
            grammars=grammars,
            model_config=model_config,
            capacity=capacity,
        )


def load_text(config: EngineConfig) -> Text:
    """Read the text part of a model's files. Raises for an unknown tool or reasoning parser too."""
    files = resolve_model(config.model)
    tokenizer, chat_template = load_tokenizer(files), load_chat_template(files, config.chat_template)
    defaults = read_generation_defaults(files)
    if chat_template is not None:
        ends = (*defaults.eos_ids, *end_of_turn_ids(chat_template, tokenizer))
        defaults = replace(defaults, eos_ids=tuple(dict.fromkeys(ends)))
    find_tool_format(config.tool_call_parser, "")  # raises for an unknown name
    find_reasoning_format(config.reasoning_parser, "")
    return Text(tokenizer=tokenizer, chat_template=chat_template, generation_defaults=defaults)


def prepare_grammars(config: EngineConfig, text: Text) -> GrammarCompiler | None:
    """A compiler of the model's grammars that has read its tokenizer, which takes seconds for 128,000 tokens, and would
    slow down every stream if the first grammar had to wait for it. None if the model's files cannot be read: loading
    reports that error."""
    try:
        grammars = _grammar_compiler(resolve_model(config.model), text)
        grammars.prepare()
    except TinyvllmError:
        return None
    return grammars


def _grammar_compiler(files: ModelFiles, text: Text) -> GrammarCompiler:
    return GrammarCompiler(text.tokenizer, read_model_config(files).vocab_size, text.eos_ids)


def load_for_clients(config: EngineConfig, progress: Progress | None = None) -> LoadedEngine:
    """`load_engine` with a prepared compiler of grammars, as `prepare_grammars` gives. It reads the tokenizer while
    weights are copied and kernels are compiled, because it holds the interpreter lock."""
    return load_engine(config, progress, prepares_grammars=True)


def load_engine(
    config: EngineConfig, progress: Progress | None = None, *, prepares_grammars: bool = False
) -> LoadedEngine:
    """Find the model's files, load them and warm up: all graphs, or only those needed to serve any request.

    Whatever is quick to check is checked before the weights are loaded."""
    files = resolve_model(config.model)
    begin_early(config, read_model_config(files).num_layers)
    try:
        return _load_files(config, files, progress, prepares_grammars)
    except BaseException:
        end_early()
        raise


def _load_files(
    config: EngineConfig, files: ModelFiles, progress: Progress | None, prepares_grammars: bool
) -> LoadedEngine:
    text = load_text(config)
    draft_files = find_draft_files(config, files, text.tokenizer)

    from tinyvllm.execution.runner import load_runner  # here, because it starts the device

    grammars = _grammar_compiler(files, text) if prepares_grammars else None
    with ThreadPoolExecutor(1) as beside:

        @functools.cache
        def prepare() -> None:
            if grammars is not None:
                beside.submit(grammars.prepare)  # whoever asks for a grammar gets its error

        def report(stage: str, done: int, total: int) -> None:
            prepare()
            if progress is not None:
                progress(stage, done, total)

        runner = load_runner(files, config, report, **memory_beside(config, draft_files))
        try:
            (runner.warm_up if config.warm_up == "full" else runner.warm_up_first)(report)
            drafter, more_captures = load_drafter(config, draft_files, runner, report)
            tiers = _load_tiers(config, runner, files)
        except BaseException:
            runner.close()
            raise
    captures = None if config.warm_up == "full" else CapturesInTurn([runner.captures, *more_captures])
    return assemble_engine(
        config,
        runner,
        text.tokenizer,
        text.chat_template,
        text.generation_defaults,
        captures,
        drafter,
        adapters=runner.adapters,
        tiers=tiers,
        grammars=grammars,
    )


def _load_tiers(config: EngineConfig, runner: ModelRunner, files: ModelFiles) -> Tiers | None:
    if not config.has_kv_tiers:
        return None

    from tinyvllm.execution.kv_tiers.build import make_tiers  # here, because it starts the device

    return make_tiers(config, runner, files)


def assemble_engine(
    config: EngineConfig,
    runner: Runner,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None,
    generation_defaults: GenerationDefaults,
    captures: Captures | None = None,
    drafter: Drafter | None = None,
    adapters: Adapters | None = None,
    tiers: Tiers | None = None,
    grammars: GrammarCompiler | None = None,
) -> LoadedEngine:
    """Build scheduler, core and text engine around a runner. `captures` makes the graphs that the runner lacks.
    `drafter`: what makes the drafts that steps verify; None: there are none. `adapters`: the runner's; None: off.
    `tiers`: where blocks are kept that fall out of the pool; None: nowhere. `grammars`: None: a new compiler."""
    capacity = runner.capacity
    block_manager = BlockManager.of(capacity, config.enable_prefix_caching)
    if tiers is not None:
        block_manager.attach(tiers)
    pace = StepPace(config.max_step_stretch) if config.max_step_stretch else None
    name = runner.model_config.name or "the model"
    speculator = None
    if drafter is not None and config.speculative_config is not None:
        rule = make_rule(config.speculative_config, drafter, runner.verify_sizes)
        speculator = Speculator(drafter, rule, config.speculative_config.num_drafts)
    slots = None if adapters is None else AdapterSlots(config.max_loras, adapters)
    scheduler = Scheduler(block_manager, capacity, config.scheduling_policy, name, pace, speculator, slots)
    text = Text(tokenizer=tokenizer, chat_template=chat_template, generation_defaults=generation_defaults)
    loaded = text.for_callers(runner.model_config, capacity, config.seed, grammars)
    own_adapters = None if adapters is None else EngineAdapters(adapters, scheduler)
    is_idle = config.warm_up == "idle"
    core = EngineCore(runner, scheduler, captures, captures_when_idle=is_idle, adapters=own_adapters)
    engine = TextEngine(core, tokenizer)
    return LoadedEngine(runner=runner, engine=engine, **vars(loaded))
