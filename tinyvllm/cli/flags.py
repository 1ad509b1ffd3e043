"""Flags that several commands share, as dataclasses, and how they become settings. The names are vLLM's."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from typer import Argument, Option
from typer.models import OptionInfo

from tinyvllm.cli.terminal import LOG_LEVELS, set_up_logging
from tinyvllm.config import (
    CACHE_DIR_VARIABLE,
    CAPTURE_VARIABLE,
    CORES_VARIABLE,
    DEFAULT_KV_DISK_GIB,
    DEVICE_VARIABLE,
    DTYPES,
    KV_FORMATS,
    LORA_RANKS,
    MAX_TIER_GIB,
    MODELS_DIR_VARIABLE,
    EngineConfig,
    GenerationDefaults,
    KVFormats,
    LoraModule,
    SamplingParams,
)
from tinyvllm.errors import TinyvllmError
from tinyvllm.server.sampling import sampling_params
from tinyvllm.storage.adapter_config import read_adapter_config
from tinyvllm.text.reasoning import ALIASES, FORMATS
from tinyvllm.text.tools import FAMILIES

_STANDARD = EngineConfig(model="")  # for its defaults
SERVED_STRETCH = 3.0  # of `max_step_stretch`, for servers, whose requests wait for each other
MAX_NUMBER = 1e9  # of a flag that takes fractions: as seconds, 30 years
LARGEST = {"SHARE": 1.0, "GIB": float(MAX_TIER_GIB)}  # by the flag's metavar, instead of MAX_NUMBER
KV_FLAGS = ("kv_cache_dtype", "kv_cache_dtype_k", "kv_cache_dtype_v")
_DTYPES = ", ".join(("auto", *DTYPES))

Model = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="A catalog name (see `tinyvllm models`), a downloaded org/name, a .gguf file, or a directory in Hugging "
        f"Face format. Downloads are kept in ${MODELS_DIR_VARIABLE}.",
    ),
]


@dataclasses.dataclass(frozen=True)
class RunnerFlags:
    """Flags of every command that loads a model: device, memory and number formats."""

    max_num_batched_tokens: Annotated[
        int | None,
        Option(
            metavar="TOKENS",
            help="Maximum tokens per step; longer prompts are computed in pieces. A larger value computes prompts "
            "faster; a smaller one delays running requests less. "
            "[default: 256 on CPU, 512 on METAL, 2048 on CUDA, or 8192 with 40 GiB free]",
            show_default=False,
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float | None,
        Option(
            metavar="SHARE",
            help="Share of the device's free memory for weights and KV cache, above 0 and up to 1. "
            "[default: 0.9 on a GPU with its own memory, 0.8 on METAL, else 0.5]",
            show_default=False,
        ),
    ] = None
    block_size: Annotated[int, Option(metavar="TOKENS", help="Tokens per block of the KV cache: 8, 16, 32 or 64.")] = (
        _STANDARD.block_size
    )
    dtype: Annotated[
        str, Option(metavar="TYPE", help=f"Data type of activations and unquantized weights: {_DTYPES}.")
    ] = _STANDARD.dtype
    kv_cache_dtype: Annotated[
        str,
        Option(
            metavar="TYPE",
            help="Data type of the KV cache: auto (float16 on most devices), "
            f"{', '.join(KV_FORMATS)}. With 8 bits (fp8_e4m3, also called fp8, or q8_0, which is more exact) it holds "
            "about twice as many tokens as in float16, and long contexts decode faster; with q4_0 3.6 times as many, "
            "for outputs that differ more (docs/KV_CACHE.md).",
        ),
    ] = _STANDARD.kv_cache_dtype
    kv_cache_dtype_k: Annotated[
        str | None,
        Option(
            "--kv-cache-dtype-k",
            "--cache-type-k",
            "-ctk",
            metavar="TYPE",
            help="Data type of the keys alone, which are more sensitive than values: q8_0 keys with q4_0 values are "
            "the usual compromise. [default: --kv-cache-dtype]",
        ),
    ] = _STANDARD.kv_cache_dtype_k
    kv_cache_dtype_v: Annotated[
        str | None,
        Option(
            "--kv-cache-dtype-v",
            "--cache-type-v",
            "-ctv",
            metavar="TYPE",
            help="Data type of the values alone. [default: --kv-cache-dtype]",
        ),
    ] = _STANDARD.kv_cache_dtype_v
    activation_bits: Annotated[
        int | None,
        Option(
            metavar="BITS",
            help="Bits to which an x86 CPU rounds activations where they multiply weights of less than 8 bits: "
            "16, or 8, with which prompts are up to 1.9 times as fast, and outputs less exact (docs/KERNELS.md). "
            "[default: 16]",
        ),
    ] = _STANDARD.activation_bits
    cpu_cores: Annotated[
        int | None,
        Option(
            metavar="NUMBER",
            help="Cores that the CPU device uses. [default: all physical cores, up to 32]"
            f" [env var of the maximum: {CORES_VARIABLE}]",
        ),
    ] = _STANDARD.cpu_cores
    dequantize: Annotated[
        bool,
        Option(
            "--dequantize", help="Unpack quantized weights at load: needs more memory, saves unpacking in the kernels."
        ),
    ] = False
    seed: Annotated[int, Option(metavar="INTEGER", help="Base seed for requests that set none.")] = _STANDARD.seed
    capture: Annotated[
        str,
        Option(
            metavar="HOW",
            help="How steps are captured and run: replay, or tinyjit for tinygrad's own TinyJit, which is slower and "
            f"needs more memory (docs/CAPTURE.md). [env var: {CAPTURE_VARIABLE}]",
        ),
    ] = _STANDARD.capture
    compile_cache: Annotated[
        bool,
        Option(
            help=f"Keep compiled programs for later starts, in ${CACHE_DIR_VARIABLE}/programs or the user's cache "
            "directory."
        ),
    ] = _STANDARD.compile_cache
    device: Annotated[
        str | None,
        Option(
            metavar="DEVICE",
            help="tinygrad's device: METAL, CUDA, CL (OpenCL) or CPU. [default: METAL on a Mac, else CUDA if present, "
            "else CPU]",
        ),
    ] = None
    async_scheduling: Annotated[
        bool | None,
        Option(
            help="Plan and enqueue a step while the previous one runs. [default: on for GPUs, off for CPU]",
            show_default=False,
        ),
    ] = None
    pull: Annotated[bool, Option("--pull", help="Download the model first if it is missing.")] = False
    log_level: Annotated[
        str, Option(metavar="LEVEL", help=f"Least severe level to log on stderr: {', '.join(LOG_LEVELS)}.")
    ] = "info"

    def settings(self) -> dict[str, Any]:
        """The fields of EngineConfig that flags set under the same name, those of a subclass included."""
        known = {field.name for field in dataclasses.fields(EngineConfig)}
        return {name: value for name, value in dataclasses.asdict(self).items() if name in known}

    @property
    def planned_kv(self) -> KVFormats:
        """As in EngineConfig. Raises TinyvllmError for an unknown format."""
        return EngineConfig("", **{name: self.settings()[name] for name in KV_FLAGS}).planned_kv

    def apply(self) -> None:
        """Set up logging and the device. Must run before anything imports tinygrad."""
        set_up_logging(self.log_level)
        if self.device is not None:
            os.environ[DEVICE_VARIABLE] = self.device


def refuse_others(groups: Sequence[Any], allowed: Container[str], reason: str) -> None:
    """Raise TinyvllmError for the first flag that was given but is not among the `allowed` ones. `groups`: a command's
    dataclasses of flags. `reason`: why it would have no effect."""
    for group in groups:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if value != field.default and field.name not in allowed:
                name = "MODEL" if field.name == "model" else f"--{field.name.strip('_').replace('_', '-')}"
                given = name if value is True else f"{name} {value}"
                raise TinyvllmError(f"{given} would have no effect: {reason}. Leave it out")


@dataclasses.dataclass(frozen=True)
class EngineFlags(RunnerFlags):
    """Flags of the commands that generate."""

    max_model_len: Annotated[
        str,
        Option(
            metavar="TOKENS",
            help="Maximum tokens per request, prompt plus output; auto: as many as the model and the memory allow.",
        ),
    ] = "auto"
    max_num_seqs: Annotated[
        int | None,
        Option(
            metavar="COUNT",
            help="Maximum sequences per step. [default: for serve 16; on CUDA 128, or 256 with 40 GiB free; for other "
            "commands what they need]",
            show_default=False,
        ),
    ] = None
    warm_up: Annotated[
        str | None,
        Option(
            metavar="WHEN",
            help="background: answer once the first graphs are captured, which can run every request, and capture the "
            "rest between steps; the first answer comes soonest, but steps may be slower for some seconds. idle: the "
            "same, but capture the rest only while no request runs. full: capture all graphs before the first answer, "
            "as benchmarks need. /ready and /metrics show how many are left. "
            "[default: background for serve, idle for generate and chat, else full]",
            show_default=False,
        ),
    ] = None
    num_gpu_blocks_override: Annotated[
        int | None, Option(metavar="BLOCKS", help="Number of KV cache blocks, instead of as many as the memory allows.")
    ] = None
    enable_prefix_caching: Annotated[bool, Option(help="Reuse the KV blocks of prompts with a common beginning.")] = (
        _STANDARD.enable_prefix_caching
    )
    kv_offloading_size: Annotated[
        float | None,
        Option(
            metavar="GIB",
            help="Host memory for cached KV blocks that fall out of the pool, per engine process. A prompt that begins "
            "with them is copied back instead of computed. [default: none]",
            show_default=False,
        ),
    ] = None
    kv_disk_cache: Annotated[
        str | None,
        Option(
            metavar="DIR",
            help="Keep cached KV blocks in files under this folder, so that a prompt's beginning is not computed again "
            "after a restart. Servers may share it. [default: none]",
            show_default=False,
        ),
    ] = None
    kv_disk_size: Annotated[
        float | None,
        Option(
            metavar="GIB",
            help="Maximum size of --kv-disk-cache; the files used least recently are deleted. "
            f"[default: {DEFAULT_KV_DISK_GIB:g}]",
            show_default=False,
        ),
    ] = None
    scheduling_policy: Annotated[
        str,
        Option(
            metavar="POLICY",
            help="fcfs: in order of arrival; priority: by each request's priority, lowest number first.",
        ),
    ] = _STANDARD.scheduling_policy
    max_step_stretch: Annotated[
        float | None,
        Option(
            metavar="FACTOR",
            help="How many times as long a step may take because of prompts while other requests get their next token. "
            "The part of the prompts that it computes is chosen from measured times. A larger factor computes prompts "
            "faster, a smaller one delays running requests less; 0: no limit but --max-num-batched-tokens. "
            "[default: 3 for serve, else 0]",
            show_default=False,
        ),
    ] = None
    speculative_config: Annotated[
        str | None,
        Option(
            "--speculative-config",
            "-sc",
            metavar="JSON",
            help="Speculative decoding: guess tokens, and verify several in one step; the output stays the same. "
            """'{"method": "ngram"}' guesses that the text repeats itself or the prompt, as in edits and summaries; """
            """'{"model": "NAME"}' has a small model of the same vocabulary guess; '{"method": "mtp"}' has the """
            "model's own layer for it. Further keys: num_speculative_tokens, prompt_lookup_max, prompt_lookup_min, "
            "disable_by_batch_size, adaptive. See docs/SPECULATION.md.",
        ),
    ] = None
    enable_lora: Annotated[
        bool,
        Option(
            "--enable-lora",
            help="Take low-rank adapters beside the model: --lora-modules, or /v1/load_lora_adapter. Requests choose "
            "one by its name as `model`. See docs/ADAPTERS.md.",
        ),
    ] = _STANDARD.enable_lora
    lora_modules: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=PATH",
            help="An adapter to load at the start: its name, and a directory that peft or mlx-lm wrote. Or as JSON: "
            """'{"name": "NAME", "path": "PATH"}'. Repeatable.""",
        ),
    ] = None
    max_loras: Annotated[
        int, Option(metavar="COUNT", help="Different adapters in one step. The device holds so many.")
    ] = _STANDARD.max_loras
    max_lora_rank: Annotated[
        int,
        Option(
            metavar="RANK",
            help=f"The largest rank of an adapter, for which memory is reserved: {', '.join(map(str, LORA_RANKS))}.",
        ),
    ] = _STANDARD.max_lora_rank
    max_cpu_loras: Annotated[
        int | None,
        Option(
            metavar="COUNT",
            help="Adapters in host memory; others are read from their files when needed. [default: --max-loras]",
            show_default=False,
        ),
    ] = _STANDARD.max_cpu_loras
    chat_template: Annotated[
        str | None, Option(metavar="FILE", help="A Jinja file to use instead of the model's own chat template.")
    ] = None
    tool_call_parser: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help=f"Format of the model's tool calls: {', '.join(FAMILIES)}. Qwen 2.5 and 3 use hermes. "
            "[default: from its chat template]",
        ),
    ] = None
    reasoning_parser: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help=f"How the model marks its reasoning: {', '.join(FORMATS)}, none; or another name of one of them: "
            f"{', '.join(ALIASES)}. [default: from its chat template]",
        ),
    ] = None

    def make_config(
        self,
        model: str,
        *,
        num_seqs: int | None = None,
        warm_up: str = _STANDARD.warm_up,
        max_step_stretch: float = _STANDARD.max_step_stretch,
        served_model_name: str | None = None,
    ) -> EngineConfig:
        """The engine's settings. num_seqs, warm_up, max_step_stretch: defaults for flags that the user did not give.

        Raises TinyvllmError for a bad value."""
        resolved = {
            "max_model_len": _parse_model_len(self.max_model_len),
            "max_num_seqs": num_seqs if self.max_num_seqs is None else self.max_num_seqs,
            "warm_up": self.warm_up or warm_up,
            "max_step_stretch": max_step_stretch if self.max_step_stretch is None else self.max_step_stretch,
            "served_model_name": served_model_name,
            "lora_modules": tuple(self.lora_modules or ()),
        }
        return EngineConfig(model=model, **(self.settings() | resolved))


@dataclasses.dataclass(frozen=True)
class TerminalEngineFlags(EngineFlags):
    """For commands whose answers are read in a terminal, where log lines would interrupt them."""

    log_level: Annotated[
        str, Option(metavar="LEVEL", help=f"Least severe level to log on stderr: {', '.join(LOG_LEVELS)}.")
    ] = "warning"
    lora: Annotated[
        str | None,
        Option(metavar="PATH", help="Answer with this low-rank adapter: a directory that peft or mlx-lm wrote."),
    ] = None

    def make_config(self, model: str, **defaults: Any) -> EngineConfig:
        """As that of EngineFlags, with room for the adapter of --lora."""
        if self.lora is None:
            return super().make_config(model, **defaults)
        flags = dataclasses.replace(self, enable_lora=True)
        return with_adapter(EngineFlags.make_config(flags, model, **defaults), self.lora)


def with_adapter(config: EngineConfig, path: str) -> EngineConfig:
    """The settings with an adapter more, which is the last of `lora_modules`, and slots of its rank. Raises ModelError
    if it cannot be read."""
    needed = read_adapter_config(Path(path).expanduser()).max_rank
    rank = next((rank for rank in LORA_RANKS if rank >= needed), LORA_RANKS[-1])
    name = (Path(path).name or path).replace(",", " ")  # as names may have no comma
    modules = (*config.lora_modules, LoraModule(name, path))
    return dataclasses.replace(
        config, enable_lora=True, lora_modules=modules, max_lora_rank=max(config.max_lora_rank, rank)
    )


def _parse_model_len(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise TinyvllmError(f"--max-model-len is {text!r}: give a number of tokens, or auto") from None


# Used if the model's files recommend no sampling: at the APIs' temperature of 1, small models write nonsense.
TERMINAL_DEFAULTS = GenerationDefaults(temperature=0.7, top_p=0.95)


def _default(value: float | None) -> str:
    return f"[default: the model's own; {value} if its files recommend no sampling at all, else 1]"


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """Flags of the commands that generate in the terminal."""

    max_tokens: Annotated[
        int | None,
        Option(metavar="TOKENS", help="Maximum tokens per answer. [default: as many as fit]", show_default=False),
    ] = None
    temperature: Annotated[
        float | None,
        Option(
            metavar="NUMBER",
            help=f"0: greedy, always the most likely token. {_default(TERMINAL_DEFAULTS.temperature)}",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        Option(
            metavar="SHARE",
            help="Sample from the most likely tokens that make up this probability. "
            f"{_default(TERMINAL_DEFAULTS.top_p)}",
        ),
    ] = None
    top_k: Annotated[
        int | None,
        Option(metavar="COUNT", help="Sample from this many most likely tokens. [default: the model's own, else all]"),
    ] = None
    min_p: Annotated[
        float | None,
        Option(
            metavar="SHARE",
            help="Drop tokens less likely than this share of the most likely one's probability. "
            "[default: the model's own, else 0]",
        ),
    ] = None
    min_tokens: Annotated[int, Option(metavar="TOKENS", help="Minimum tokens per answer.")] = 0
    stop: Annotated[list[str] | None, Option(metavar="TEXT", help="End the answer before this text. Repeatable.")] = (
        None
    )
    ignore_eos: Annotated[bool, Option("--ignore-eos", help="Continue past the model's end-of-text token.")] = False

    def make_params(self, defaults: GenerationDefaults, **more: Any) -> SamplingParams:
        """Sampling settings from flags, else the model's, else TERMINAL_DEFAULTS if the model recommends none, else
        vLLM's. Raises RequestError for a bad value."""
        recommends_none = dataclasses.replace(defaults, eos_ids=()) == GenerationDefaults()
        names = ("temperature", "top_p", "top_k", "min_p", "min_tokens", "ignore_eos")
        given = {name: getattr(self, name) for name in names} | {"stop": self.stop, **more}
        return sampling_params(given, TERMINAL_DEFAULTS if recommends_none else defaults, max_tokens=self.max_tokens)


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap `command` for typer: each parameter that is a dataclass of flags is replaced by its individual flags."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            groups[name] = hints[name]
            field_hints = get_type_hints(hints[name], include_extras=True)
            for field in dataclasses.fields(hints[name]):
                parameters.append(_keyword(field.name, field.default, field_hints[field.name]))
        else:
            parameters.append(_keyword(name, parameter.default, hints[name]))

    largest = {parameter.name: _largest(parameter.annotation) for parameter in parameters}

    @functools.wraps(command)
    def spread_command(**values: Any) -> None:
        for name, value in values.items():
            _check_number(name, value, largest[name])
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        command(**values)

    spread_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    spread_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return spread_command


def _largest(annotation: Any) -> float:
    """The largest fraction that a flag may be."""
    metavars = [one.metavar for one in get_args(annotation) if isinstance(one, OptionInfo)]
    return LARGEST.get(metavars[0] or "", MAX_NUMBER) if metavars else MAX_NUMBER


def _check_number(name: str, value: Any, largest: float) -> None:
    """Raises TinyvllmError for a number that is valid for no flag, and would cause a less clear error much later. No
    flag that takes fractions may be negative; `largest` is what it may be."""
    flag = name.replace("_", "-")
    if isinstance(value, int) and abs(value) >= (limit := 2**63):
        raise TinyvllmError(
            f"--{flag} is a number of more than 64 bits: give a number between {1 - limit} and {limit - 1}"
        )
    if isinstance(value, float) and not abs(value) <= MAX_NUMBER:  # so is nan
        raise TinyvllmError(f"--{flag} is {value}: give a number between 0 and {largest:.7g}")


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
