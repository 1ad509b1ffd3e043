"""What makes drafts, by `--speculative-config`: each method is a file, and a line here.

A draft model's files are found first and compared with the model that they are to draft for, since that is quick; its
weights are loaded after the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinyvllm.config import EngineConfig, ModelFiles
from tinyvllm.engine.core import Captures
from tinyvllm.errors import TinyvllmError
from tinyvllm.scheduling.drafts import Drafter
from tinyvllm.scheduling.ngram_drafter import NgramDrafter
from tinyvllm.storage.resolve import resolve_model
from tinyvllm.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from tinyvllm.execution.capacity import DraftMemory
    from tinyvllm.execution.captures import Progress
    from tinyvllm.execution.runner import ModelRunner


def memory_beside(config: EngineConfig, draft_files: ModelFiles | None) -> dict[str, DraftMemory]:
    """The argument by which `load_runner` leaves memory for a draft model; {} without one. Raises ModelError."""
    if draft_files is None:
        return {}

    from tinyvllm.execution.draft_model import measure_draft  # here, because it starts the device

    return {"draft": measure_draft(draft_files, config)}


def load_drafter(
    config: EngineConfig, draft_files: ModelFiles | None, runner: ModelRunner, progress: Progress | None = None
) -> tuple[Drafter | None, list[Captures]]:
    """The drafter that `config` asks for beside the loaded model, and what makes its graphs that are still to come.

    Raises TinyvllmError, CapacityError, DeviceError."""
    wanted = config.speculative_config
    if wanted is None:
        return None, []
    if wanted.method == "mtp":
        return _load_mtp(runner, progress), []
    if draft_files is None:
        return NgramDrafter(*wanted.lookup), []

    from tinyvllm.execution.draft_model import load_draft_model  # here, because it starts the device

    drafter = load_draft_model(draft_files, config, runner, progress)
    try:
        (drafter.warm_up if config.warm_up == "full" else drafter.warm_up_first)(progress)
    except BaseException:
        drafter.close()
        raise
    return drafter, [] if config.warm_up == "full" else [drafter.captures]


def _load_mtp(runner: ModelRunner, progress: Progress | None) -> Drafter:
    from tinyvllm.execution.mtp import MtpDrafter

    drafter = MtpDrafter(runner)
    drafter.warm_up(progress)
    return drafter


class CapturesInTurn:
    """The graphs of several models, one model after another."""

    def __init__(self, parts: Sequence[Captures]) -> None:
        self._parts = parts

    @property
    def num_to_come(self) -> int:
        return sum(part.num_to_come for part in self._parts)

    @property
    def num_failed(self) -> int:
        return sum(part.num_failed for part in self._parts)

    @property
    def _next(self) -> Captures | None:
        return next((part for part in self._parts if part.num_to_come), None)

    @property
    def is_next_compiled(self) -> bool:
        return self._next is not None and self._next.is_next_compiled

    def advance(self) -> None:
        if (part := self._next) is not None:
            part.advance()


def find_draft_files(config: EngineConfig, files: ModelFiles, tokenizer: Tokenizer) -> ModelFiles | None:
    """The files of the draft model that `config` asks for, beside the model of `files`; None: it asks for none.

    Raises ModelError if they cannot be read, TinyvllmError if the vocabularies differ."""
    wanted = config.speculative_config
    if wanted is None or wanted.model is None:
        return None
    draft_files = resolve_model(wanted.model)
    check_vocabulary(files.name, tokenizer, draft_files.name, load_tokenizer(draft_files))
    return draft_files


def check_vocabulary(name: str, tokenizer: Tokenizer, draft_name: str, draft: Tokenizer) -> None:
    """Raise TinyvllmError if an id stands for different texts in the two models."""
    different = tokenizer.first_difference(draft)
    if different is not None:
        raise TinyvllmError(
            f"draft model {draft_name} has another vocabulary than {name}: token {different} is "
            f"{draft.token_text(different)!r} in {draft_name} ({draft.vocab_size} tokens), and "
            f"{tokenizer.token_text(different)!r} in {name} ({tokenizer.vocab_size} tokens): choose a draft model of "
            "the same family"
        )
