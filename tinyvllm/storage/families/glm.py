"""GLM-4-9B-hf and GLM-Edge (GlmForCausalLM): GLM-4's layers without the norms after."""

from __future__ import annotations

from dataclasses import replace

from tinyvllm.storage.families import glm4

FILES = replace(glm4.FILES, hf_classes=("GlmForCausalLM",), hf_types=("glm",), gguf=())
