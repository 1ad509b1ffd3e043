"""Find a model's files, load them, and build the engine around them. Shared by LLM and AsyncEngine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tinyvllm.config import Capacity, EngineConfig, GenerationDefaults, ModelConfig
from tinyvllm.engine.admission import RequestFactory
from tinyvllm.engine.constraints import GrammarCompiler
from tinyvllm.engine.core import Captures, EngineCore, Runner
from tinyvllm.engine.hosts import Loaded
from tinyvllm.engine.output import TextEngine
from tinyvllm.errors import TinyvllmError
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.scheduler import Scheduler
from tinyvllm.storage.model_config import read_generation_defaults
from tinyvllm.storage.resolve import resolve_model
from tinyvllm.text.chat import ChatTemplate, load_chat_template
from tinyvllm.text.reasoning import find_reasoning_format
from tinyvllm.text.tokenizer import Tokenizer, load_tokenizer
from tinyvllm.text.tools import find_tool_format

Progress = Callable[[str, int, int], None]  # stage ("load", "warm-up"), done, total


@dataclass(frozen=True, kw_only=True)
class LoadedEngine:
    """A loaded model with all that answers requests for it. Bound to the thread that made it."""

    runner: Runner
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    generation_defaults: GenerationDefaults
    factory: RequestFactory
    grammars: GrammarCompiler
    engine: TextEngine

    @property
    def core(self) -> EngineCore:
        return self.engine.core

    @property
    def model_config(self) -> ModelConfig:
        return self.runner.model_config

    @property
    def capacity(self) -> Capacity:
        return self.runner.capacity

    def for_callers(self) -> Loaded:
        """The part that may be used on other threads than the one that made this."""
        return Loaded(
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            generation_defaults=self.generation_defaults,
            factory=self.factory,
            grammars=self.grammars,
            model_config=self.model_config,
            capacity=self.capacity,
        )


def model_name(config: EngineConfig) -> str:
    """The name that clients use for the model: the served name if one is set, else that of its files."""
    if config.served_model_name is not None:
        return config.served_model_name
    try:
        return resolve_model(config.model).name
    except TinyvllmError:  # loading reports this error in full, to everyone who waits for the engine
        return config.model


def load_engine(config: EngineConfig, progress: Progress | None = None) -> LoadedEngine:
    """Find the model's files, load them and warm up: all graphs, or only those needed to serve any request.

    Whatever is quick to check is checked before the weights are loaded."""
    files = resolve_model(config.model)
    tokenizer = load_tokenizer(files)
    chat_template = load_chat_template(files, config.chat_template)
    find_tool_format(config.tool_call_parser, "")  # raises for an unknown name
    find_reasoning_format(config.reasoning_parser, "")
    generation_defaults = read_generation_defaults(files)

    from tinyvllm.execution.runner import load_runner  # here, because it starts the device

    runner = load_runner(files, config, progress)
    try:
        (runner.warm_up if config.warm_up == "full" else runner.warm_up_first)(progress)
    except BaseException:
        runner.close()
        raise
    captures = None if config.warm_up == "full" else runner.captures
    return assemble_engine(config, runner, tokenizer, chat_template, generation_defaults, captures)


def assemble_engine(
    config: EngineConfig,
    runner: Runner,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None,
    generation_defaults: GenerationDefaults,
    captures: Captures | None = None,
) -> LoadedEngine:
    """Build scheduler, core and text engine around a runner. `captures` makes the graphs that the runner lacks."""
    capacity = runner.capacity
    block_manager = BlockManager(capacity.num_blocks, capacity.block_size, config.enable_prefix_caching)
    scheduler = Scheduler(block_manager, capacity, config.scheduling_policy)
    eos_ids = frozenset(tokenizer.eos_ids) | frozenset(generation_defaults.eos_ids)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    factory = RequestFactory(runner.model_config.vocab_size, capacity, eos_ids, config.seed, encode)
    grammars = GrammarCompiler(tokenizer, runner.model_config.vocab_size, eos_ids)
    engine = TextEngine(EngineCore(runner, scheduler, captures), tokenizer)
    return LoadedEngine(
        runner=runner,
        tokenizer=tokenizer,
        chat_template=chat_template,
        generation_defaults=generation_defaults,
        factory=factory,
        grammars=grammars,
        engine=engine,
    )
