"""Flags that several commands share, as dataclasses, and how they become settings. Names are vLLM's."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

from typer import Argument, Option

from tinyvllm.cli.terminal import LOG_LEVELS, set_up_logging
from tinyvllm.config import (
    CACHE_DIR_VARIABLE,
    DTYPES,
    MODELS_DIR_VARIABLE,
    EngineConfig,
    GenerationDefaults,
    SamplingParams,
)
from tinyvllm.errors import TinyvllmError

DEVICE_VARIABLE = "DEV"  # tinygrad's, which it reads once, when it is imported
_STANDARD = EngineConfig(model="")  # for its defaults
_DTYPES = ", ".join(("auto", *DTYPES))

Model = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="A catalog name (see `tinyvllm models`), a pulled org/name, a .gguf file or a directory in Hugging Face "
        f"format. Pulled models lie in ${MODELS_DIR_VARIABLE}.",
    ),
]


@dataclasses.dataclass(frozen=True)
class RunnerFlags:
    """Of every command that loads a model: the device, memory and number formats."""

    max_num_batched_tokens: Annotated[
        int | None,
        Option(
            metavar="TOKENS",
            help="Most tokens in one step; longer prompts are computed in pieces. More: prompts are computed at a "
            "higher rate; fewer: those who are being answered wait less beside them. "
            "[default: 256 on a CPU, 512 on METAL, 2048 on CUDA, 8192 there with 40 GiB free]",
            show_default=False,
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float | None,
        Option(
            metavar="SHARE",
            help="Share of the device's free memory, above 0 to 1, for weights and KV cache. "
            "[default: 0.9 on a GPU of its own memory, 0.5 where host and device share it]",
            show_default=False,
        ),
    ] = None
    block_size: Annotated[int, Option(metavar="TOKENS", help="Tokens in a block of the KV cache: 8, 16, 32 or 64.")] = (
        _STANDARD.block_size
    )
    dtype: Annotated[
        str, Option(metavar="TYPE", help=f"Of activations and of weights that are not quantised: {_DTYPES}.")
    ] = _STANDARD.dtype
    kv_cache_dtype: Annotated[str, Option(metavar="TYPE", help=f"Of the KV cache: {_DTYPES}.")] = (
        _STANDARD.kv_cache_dtype
    )
    cpu_cores: Annotated[
        int | None,
        Option(metavar="NUMBER", help="Cores that a CPU device uses.  [default: all there are, one a KV head at most]"),
    ] = _STANDARD.cpu_cores
    dequantize: Annotated[
        bool, Option("--dequantize", help="Unpack quantised weights at load: more memory, no unpacking in the kernels.")
    ] = False
    seed: Annotated[int, Option(metavar="INTEGER", help="Base of the seeds of requests that bring none.")] = (
        _STANDARD.seed
    )
    compile_cache: Annotated[
        bool,
        Option(
            help="Keep compiled programs for the next start, in "
            f"${CACHE_DIR_VARIABLE}/programs or the user's cache directory."
        ),
    ] = _STANDARD.compile_cache
    device: Annotated[
        str | None,
        Option(metavar="DEVICE", help="tinygrad's device: METAL, CUDA, CPU. [default: METAL on a Mac, CUDA, else CPU]"),
    ] = None
    async_scheduling: Annotated[
        bool | None,
        Option(
            help="Plan and enqueue a step while the one before runs. [default: on GPUs, where the device would wait]",
            show_default=False,
        ),
    ] = None
    pull: Annotated[bool, Option("--pull", help="Download the model first if it is not here.")] = False
    log_level: Annotated[str, Option(metavar="LEVEL", help=f"What is logged on stderr: {', '.join(LOG_LEVELS)}.")] = (
        "info"
    )

    def settings(self) -> dict[str, Any]:
        """The fields of EngineConfig that these flags, and those of a subclass, give as they are."""
        known = {field.name for field in dataclasses.fields(EngineConfig)}
        return {name: value for name, value in dataclasses.asdict(self).items() if name in known}

    def apply(self) -> None:
        """Set up logging and the device: before anything imports tinygrad."""
        set_up_logging(self.log_level)
        if self.device is not None:
            os.environ[DEVICE_VARIABLE] = self.device


@dataclasses.dataclass(frozen=True)
class EngineFlags(RunnerFlags):
    """Of the commands that generate."""

    max_model_len: Annotated[
        str,
        Option(metavar="TOKENS", help="Most tokens of prompt and output together; auto: the model's own, if they fit."),
    ] = "auto"
    max_num_seqs: Annotated[
        int | None,
        Option(
            metavar="COUNT",
            help="Most sequences in one step. [default: for serve 16, on CUDA 128, there with 40 GiB free 256; else as "
            "asked for]",
            show_default=False,
        ),
    ] = None
    warm_up: Annotated[
        str | None,
        Option(
            metavar="WHEN",
            help="background: answer as soon as the first graphs are captured, in which everything can run, and "
            "capture the others between steps: the first answer comes soonest, but for some seconds steps may be "
            "slower than they will be. full: capture all graphs before anything is answered, as a benchmark wants. "
            "/ready and /metrics say how many are to come. [default: background for serve and chat, else full]",
            show_default=False,
        ),
    ] = None
    num_gpu_blocks_override: Annotated[
        int | None, Option(metavar="BLOCKS", help="Blocks of the KV cache, instead of what the memory allows.")
    ] = None
    enable_prefix_caching: Annotated[bool, Option(help="Reuse the KV blocks of prompts that begin alike.")] = (
        _STANDARD.enable_prefix_caching
    )
    scheduling_policy: Annotated[
        str, Option(metavar="POLICY", help="fcfs: in order of arrival; priority: by the request's priority, low first.")
    ] = _STANDARD.scheduling_policy
    chat_template: Annotated[
        str | None, Option(metavar="FILE", help="A Jinja file that replaces the model's own chat template.")
    ] = None
    tool_call_parser: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="How the model writes tool calls: hermes (Qwen too), llama3_json, mistral, json. "
            "[default: by its chat template]",
        ),
    ] = None
    reasoning_parser: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="How the model marks reasoning: think (or qwen3, deepseek_r1), mistral, none. "
            "[default: by its chat template]",
        ),
    ] = None

    def make_config(
        self,
        model: str,
        *,
        num_seqs: int | None = None,
        warm_up: str = _STANDARD.warm_up,
        served_model_name: str | None = None,
    ) -> EngineConfig:
        """The engine's settings; num_seqs and warm_up where the user says nothing of them.

        Raises TinyvllmError for a bad value."""
        resolved = {
            "max_model_len": _parse_model_len(self.max_model_len),
            "max_num_seqs": num_seqs if self.max_num_seqs is None else self.max_num_seqs,
            "warm_up": self.warm_up or warm_up,
            "served_model_name": served_model_name,
        }
        return EngineConfig(model=model, **(self.settings() | resolved))


def _parse_model_len(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise TinyvllmError(f"--max-model-len is {text!r}: give a number of tokens, or auto") from None


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """Of the commands that generate in the terminal."""

    max_tokens: Annotated[
        int | None,
        Option(metavar="TOKENS", help="Most tokens of an answer. [default: as many as fit]", show_default=False),
    ] = None
    temperature: Annotated[
        float | None,
        Option(metavar="NUMBER", help="0: always the likeliest token. [default: the model's own, else 1]"),
    ] = None
    top_p: Annotated[
        float | None, Option(metavar="SHARE", help="Sample from the likeliest tokens that make up this probability.")
    ] = None
    top_k: Annotated[int | None, Option(metavar="COUNT", help="Sample from this many of the likeliest tokens.")] = None
    min_p: Annotated[
        float | None, Option(metavar="SHARE", help="Drop tokens less likely than this share of the likeliest one's.")
    ] = None
    min_tokens: Annotated[int, Option(metavar="TOKENS", help="Fewest tokens before an answer may end.")] = 0
    stop: Annotated[
        list[str] | None, Option(metavar="TEXT", help="End the answer before this text. May be given several times.")
    ] = None
    ignore_eos: Annotated[bool, Option("--ignore-eos", help="Go on after the model's end of text.")] = False

    def make_params(self, defaults: GenerationDefaults, **more: Any) -> SamplingParams:
        """The sampling settings: flags, else the model's defaults, else vLLM's. Raises RequestError for a bad value."""
        settings: dict[str, Any] = {}
        for name in ("temperature", "top_p", "top_k", "min_p"):
            given = getattr(self, name)
            value = getattr(defaults, name) if given is None else given
            if value is not None:
                settings[name] = value
        return SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            stop=tuple(self.stop or ()),
            ignore_eos=self.ignore_eos,
            **settings,
            **more,
        )


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as typer can read it: a parameter that is a dataclass of flags becomes its flags, one by one."""
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

    @functools.wraps(command)
    def spread_command(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        command(**values)

    spread_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    spread_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return spread_command


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
