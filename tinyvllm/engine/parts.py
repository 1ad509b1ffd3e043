"""What an engine is made of, and how it is found, loaded and put together. Shared by LLM and AsyncEngine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tinyvllm.config import Capacity, EngineConfig, GenerationDefaults, ModelConfig
from tinyvllm.engine.admission import RequestFactory
from tinyvllm.engine.constraints import GrammarCompiler
from tinyvllm.engine.core import Captures, EngineCore, Runner
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


@dataclass(frozen=True)
class EngineParts:
    """A model that is ready to answer. Bound to the thread that made it."""

    runner: Runner
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    generation_defaults: GenerationDefaults
    factory: RequestFactory
    grammars: GrammarCompiler
    engine: TextEngine

    @property
    def model_config(self) -> ModelConfig:
        return self.runner.model_config

    @property
    def capacity(self) -> Capacity:
        return self.runner.capacity


def model_name(config: EngineConfig) -> str:
    """What callers call the model: the name that was chosen for it, else that of its files."""
    if config.served_model_name is not None:
        return config.served_model_name
    try:
        return resolve_model(config.model).name
    except TinyvllmError:  # loading says it better, and to those who wait
        return config.model


def load_parts(config: EngineConfig, progress: Progress | None = None) -> EngineParts:
    """Find the model's files, load them and warm up: every graph, or in the background those that serve everything.

    What can be wrong and is quickly read comes first."""
    files = resolve_model(config.model)
    tokenizer = load_tokenizer(files)
    chat_template = load_chat_template(files, config.chat_template)
    find_tool_format(config.tool_call_parser, "")  # raises for a name that is not known
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
    return assemble(config, runner, tokenizer, chat_template, generation_defaults, captures)


def assemble(
    config: EngineConfig,
    runner: Runner,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None,
    generation_defaults: GenerationDefaults,
    captures: Captures | None = None,
) -> EngineParts:
    """Put a scheduler, a core and a text side around a runner. `captures`: what makes the graphs that it lacks."""
    capacity = runner.capacity
    block_manager = BlockManager(capacity.num_blocks, capacity.block_size, config.enable_prefix_caching)
    scheduler = Scheduler(block_manager, capacity, config.scheduling_policy)
    eos_ids = frozenset(tokenizer.eos_ids) | frozenset(generation_defaults.eos_ids)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    factory = RequestFactory(runner.model_config.vocab_size, capacity, eos_ids, config.seed, encode)
    grammars = GrammarCompiler(tokenizer, runner.model_config.vocab_size, eos_ids)
    engine = TextEngine(EngineCore(runner, scheduler, captures), tokenizer)
    return EngineParts(runner, tokenizer, chat_template, generation_defaults, factory, grammars, engine)
