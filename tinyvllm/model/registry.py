"""Which class runs which architecture. A new family is one file next to llama.py and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tinyvllm.config import ModelConfig
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.model.decoder import Decoder
from tinyvllm.model.gemma2 import Gemma2
from tinyvllm.model.gemma3 import Gemma3
from tinyvllm.model.gemma4 import Gemma4
from tinyvllm.model.glm4 import Glm, Glm4
from tinyvllm.model.glm4_moe_lite import Glm4MoeLite
from tinyvllm.model.gpt_oss import GptOss
from tinyvllm.model.granite import Granite
from tinyvllm.model.llama import Llama
from tinyvllm.model.mistral import Ministral3, Mistral
from tinyvllm.model.olmo2 import Olmo2
from tinyvllm.model.olmoe import Olmoe
from tinyvllm.model.phi3 import Phi3
from tinyvllm.model.qwen2 import Qwen2
from tinyvllm.model.qwen3 import Qwen3
from tinyvllm.model.smollm3 import SmolLM3
from tinyvllm.model.weights.checkpoint import WeightSource
from tinyvllm.ops.backend import Backend

Model = Decoder  # what execution calls it

FAMILIES: dict[str, type[Decoder]] = {
    "llama": Llama,
    "mistral": Mistral,
    "ministral": Mistral,
    "ministral3": Ministral3,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "lfm2": Qwen3,
    "qwen3_5": Qwen3,
    "qwen3_5_moe": Qwen3,
    "qwen3_next": Qwen3,
    "gemma2": Gemma2,
    "gemma3": Gemma3,
    "gemma4": Gemma4,
    "gemma4_unified": Gemma4,
    "phi3": Phi3,
    "smollm3": SmolLM3,
    "olmo2": Olmo2,
    "olmo3": Olmo2,
    "granite": Granite,
    "glm": Glm,
    "glm4": Glm4,
    "glm4_moe_lite": Glm4MoeLite,
    "deepseek_v2": Glm4MoeLite,
    "deepseek_v3": Glm4MoeLite,
    "qwen3_moe": Qwen3,
    "mixtral": Mistral,
    "olmoe": Olmoe,
    "gpt_oss": GptOss,
}


def find_family(config: ModelConfig) -> type[Decoder]:
    """Raises UnsupportedModelError."""
    family = FAMILIES.get(config.architecture)
    if family is None:
        raise UnsupportedModelError(
            f"architecture {config.architecture!r} is not known; known: {', '.join(sorted(FAMILIES))}"
        )
    return family


def complete_config(config: ModelConfig) -> ModelConfig:
    """The config with the kinds of its layers, as its family has them. Raises UnsupportedModelError."""
    return replace(config, layer_kinds=find_family(config).layer_kinds(replace(config, layer_kinds=())))


def make_model(
    config: ModelConfig,
    checkpoint: WeightSource,
    backend: Backend,
    num_positions: int,
    progress: Callable[[int, int], None],
) -> Model:
    """Load a model's weights onto the backend's device. Raises UnsupportedModelError, WeightMismatchError."""
    return find_family(config)(config, checkpoint, backend, num_positions, progress)
