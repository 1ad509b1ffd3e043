"""The draft model's files: found, and compared with the model that they are to draft for."""

from __future__ import annotations

from tinyvllm.config import EngineConfig, ModelFiles
from tinyvllm.errors import TinyvllmError
from tinyvllm.storage.resolve import resolve_model
from tinyvllm.text.tokenizer import Tokenizer, load_tokenizer


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
