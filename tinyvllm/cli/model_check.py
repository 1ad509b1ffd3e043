"""`tinyvllm models --check`: what a file or directory is, whether it runs here, and what it needs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from tinyvllm.cli.terminal import out
from tinyvllm.config import DEVICE_VARIABLE, ModelFiles
from tinyvllm.errors import DeviceError, ModelError, TinyvllmError

if TYPE_CHECKING:
    from tinyvllm.execution.model_check import Fit, ModelReport

SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmgt]i?b?)?", re.IGNORECASE)
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
ADAPTER, PIPELINE = "adapter_config.json", "model_index.json"
CONTEXTS = (4096, 32768, 131072)  # tokens for which the KV cache's size is shown


@dataclass(frozen=True)
class CheckResult:
    """`problem`: why it does not run, and what to do; empty if it does."""

    name: str
    problem: str = ""
    report: ModelReport | None = None
    fitting: Fit | None = None
    has_chat_template: bool | None = None
    warning: str = ""
    template_limits: tuple[str, ...] = ()  # what the chat template cannot take, and what becomes of it

    @property
    def runs(self) -> bool:
        return not self.problem

    def as_json(self) -> dict[str, Any]:
        from tinyvllm.execution.model_check import as_json

        found = {} if self.report is None else as_json(self.report, self.fitting)
        return {
            "name": self.name,
            "runs": self.runs,
            "problem": self.problem or None,
            "warning": self.warning or None,
            "has_chat_template": self.has_chat_template,
            "chat_template_limits": list(self.template_limits),
        } | found


def check_model(name_or_path: str, device: str | None, memory_bytes: int | None) -> CheckResult:
    """Look at the headers. Never raises for what is in the files: a problem is a part of the result."""
    from tinyvllm.storage.resolve import resolve_model

    try:
        if problem := odd_thing(Path(name_or_path).expanduser()):
            return CheckResult(name_or_path, problem)
        files = resolve_model(name_or_path)
        return _check_files(files, device or os.environ.get(DEVICE_VARIABLE), memory_bytes)
    except TinyvllmError as error:
        return CheckResult(name_or_path, " ".join(str(error).split()))
    except Exception as error:  # damaged files fail in the libraries that read them, in as many ways as there are
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return CheckResult(name_or_path, f"cannot be read ({reason}): download it again, or report the file as a bug")


def odd_thing(path: Path) -> str:
    """What something is that is no model, and what to do; "" if it may be one."""
    if path.is_dir():
        return "".join(_odd_directory(path))
    if path.suffix == ".safetensors":
        return (
            f"is one file of a model: give its directory, {path.parent}, which needs config.json and tokenizer.json too"
        )
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _odd_gguf(path)
    return ""


def _odd_directory(path: Path) -> Iterator[str]:
    if (path / ADAPTER).is_file():
        base = _json(path / ADAPTER).get("base_model_name_or_path") or "its base model"
        yield (
            f"is a LoRA adapter of {base}, not a model: serve that model with --enable-lora --lora-modules "
            f"{path.name}={path}"
        )
    elif (path / PIPELINE).is_file():
        kind = _json(path / PIPELINE).get("_class_name") or "diffusers"
        yield f"is a {kind} pipeline, which makes images or video: only language models run here"
    elif not any(path.iterdir()):
        yield "is an empty directory: download the model into it, or give another path"


def _odd_gguf(path: Path) -> str:
    from tinyvllm.storage.gguf_file import GGUFFile

    metadata = GGUFFile(path).metadata
    if metadata.get("general.type") == "adapter":
        return "is a LoRA adapter in GGUF format, not a model: merge it with llama.cpp's llama-export-lora"
    if metadata.get("general.architecture") == "clip" or metadata.get("general.type") == "mmproj":
        return "is the image encoder of a model (mmproj), not the model: give the other file; images are not supported"
    return ""


def _json(path: Path) -> dict[str, Any]:
    from tinyvllm.storage.values import read_json

    return read_json(path)


def _check_files(files: ModelFiles, device: str | None, memory_bytes: int | None) -> CheckResult:
    from tinyvllm.execution.model_check import default_device, examine_files, fit
    from tinyvllm.text.chat import load_chat_template
    from tinyvllm.text.tokenizer import load_tokenizer

    device = (device or default_device()).upper()
    report = examine_files(files, device)
    load_tokenizer(files)
    try:
        template = load_chat_template(files)
    except ModelError:
        template = None
    limits = () if template is None else tuple(template.abilities(has_tools=True).deviations())
    result = CheckResult(files.name, "", report, None, template is not None, template_limits=limits)
    try:
        fitting = fit(report, device, memory_bytes)
    except DeviceError as error:
        return replace(result, warning=str(error))
    return replace(result, problem=fitting.problem, fitting=fitting)


def parse_size(text: str | None) -> int | None:
    """Bytes of "16GiB", "16 GB" or a plain number. Raises TinyvllmError."""
    if text is None:
        return None
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise TinyvllmError(f"--device-memory is {text!r}: give a size such as 16GiB or 24GB")
    unit = (found["unit"] or "").lower().removesuffix("b")
    return int(float(found["number"]) * UNITS[unit])


# --- For people ----------------------------------------------------------------------------------------------------


def print_check(result: CheckResult) -> None:
    report = result.report
    if report is not None:
        _print_report(report, result)
    if result.warning:
        out.print(f"[yellow]note[/] {escape(result.warning)}", highlight=False)
    if result.runs:
        out.print("[green]it runs[/]", highlight=False)
    else:
        # our own errors name the file
        problem = result.problem if result.name in result.problem else f"{result.name} {result.problem}"
        out.print(f"[red]it does not run[/]: {escape(problem)}", highlight=False)


def _print_report(report: ModelReport, result: CheckResult) -> None:
    config = report.config
    lines = [
        f"{result.name}: {report.source}, family {report.architecture}, {_parameters(report)}",
        f"{config.num_layers} layers, {config.max_position} tokens of context, "
        + ("with a chat template" if result.has_chat_template else "without a chat template"),
        *(f"chat template: {limit}" for limit in result.template_limits),
        *report.left_out,
    ]
    for line in lines:
        out.print(escape(line), highlight=False)
    device = "DEVICE" if result.fitting is None else result.fitting.device
    table = Table("PART", "FORMAT", "TENSORS", "WEIGHTS", "IN THE FILE", f"ON {device}", box=None, pad_edge=False)
    for one in report.classes:
        sizes = (_mib(one.file_bytes), _mib(one.device_bytes))
        table.add_row(one.part, one.format_name, str(one.num_tensors), _count(one.num_weights), *sizes)
    out.print(table, soft_wrap=False)
    for line in [*_memory_lines(report, result.fitting), *_kernel_lines(report)]:
        out.print(escape(line), highlight=False)


def _memory_lines(report: ModelReport, fitting: Fit | None) -> Iterator[str]:
    yield f"weights: {_mib(report.device_bytes)}"
    for cost in report.kv:
        kept = "for every token" if cost.window is None else f"for each of the last {cost.window} tokens"
        yield f"KV cache of {cost.num_layers} layers: {cost.bytes_per_token / 1024:g} KiB {kept}"
    if report.config.state_bytes:
        num_layers = sum(kind.state is not None for kind in report.config.layers)
        state_bytes = report.config.state_bytes
        size = _mib(state_bytes) if state_bytes >= 2**20 else f"{state_bytes / 1024:g} KiB"
        yield f"state of {num_layers} recurrent layers: {size} for every sequence, and for each checkpoint of a prefix"
    contexts = [length for length in CONTEXTS if length < report.config.max_position]
    sizes = [f"{_mib(report.kv_bytes(length))} for {length} tokens" for length in contexts]
    longest = report.config.max_position
    yield f"KV cache of one sequence: {', '.join([*sizes, f'{_mib(report.kv_bytes(longest))} for {longest} tokens'])}"
    if fitting is not None and not fitting.problem:
        yield (
            f"on {fitting.device} with {_mib(fitting.memory_bytes)} free, of which {fitting.share:.0%} may be used: a "
            f"context of {fitting.context} tokens fits"
        )


def _kernel_lines(report: ModelReport) -> Iterator[str]:
    for device in ("METAL", "CUDA", "CPU"):
        general = report.general.get(device, ())
        yield (
            f"{device}: fused kernels for every format"
            if not general
            else (f"{device}: fused kernels, but for {'; '.join(general)}: right, but slower")
        )


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _parameters(report: ModelReport) -> str:
    """How many, and of sparse models how many a token passes through."""
    active = "" if report.config.experts is None else f" ({_count(report.num_active)} active)"
    return f"{_count(report.num_weights)}{active} parameters"


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def print_json(result: CheckResult) -> None:
    print(json.dumps(result.as_json()))
