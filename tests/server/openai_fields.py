"""What becomes of every field of OpenAI's and vLLM's requests for chats and responses, each with a value to send.

"taken": it has an effect, or asks for what is so anyway. "ignored": it cannot have one here. "refused": by name.
"""

from __future__ import annotations

from typing import Any, Literal

Fate = Literal["taken", "ignored", "refused"]

_TOOL = {"type": "function", "function": {"name": "f"}}
_MESSAGES = [{"role": "user", "content": "a"}]

# Of both routes.
SHARED: dict[str, tuple[Fate, Any]] = {
    "model": ("taken", "tiny"),
    "temperature": ("taken", 0.5),
    "top_p": ("taken", 0.5),
    "top_k": ("taken", 5),
    "min_p": ("taken", 0.1),
    "seed": ("taken", 1),
    "stop": ("taken", ["x"]),
    "stop_token_ids": ("taken", [1]),
    "frequency_penalty": ("taken", 0.5),
    "presence_penalty": ("taken", 0.5),
    "repetition_penalty": ("taken", 1.1),
    "logit_bias": ("taken", {"5": 1}),
    "bad_words": ("taken", ["x"]),
    "allowed_token_ids": ("taken", [1, 2]),
    "min_tokens": ("taken", 1),
    "ignore_eos": ("taken", True),
    "skip_special_tokens": ("taken", False),
    "spaces_between_special_tokens": ("taken", True),
    "include_stop_str_in_output": ("taken", True),
    "structured_outputs": ("taken", {"regex": "a+"}),
    "priority": ("taken", 1),
    "chat_template_kwargs": ("taken", {"a": 1}),
    "enable_thinking": ("taken", False),
    "thinking": ("taken", {"type": "disabled"}),
    "parallel_tool_calls": ("taken", False),
    "tool_choice": ("taken", "none"),
    "top_logprobs": ("taken", 0),
    "stream_options": ("refused", {"include_usage": True}),  # without a stream, as OpenAI does
    "metadata": ("ignored", {"a": "b"}),
    "user": ("ignored", "u"),
    "store": ("ignored", False),
    "service_tier": ("ignored", "flex"),
    "safety_identifier": ("ignored", "s"),
    "prompt_cache_key": ("ignored", "k"),
    "prompt_cache_options": ("ignored", {"mode": "explicit"}),
    "prompt_cache_retention": ("ignored", "24h"),
    "request_id": ("ignored", "r"),
    "session_id": ("ignored", "s"),
    "stream_interval": ("ignored", 2),
    "mm_processor_kwargs": ("ignored", {"a": 1}),
    "moderation": ("refused", {"model": "m"}),
    "cache_salt": ("taken", "salt"),
    "vllm_xargs": ("refused", {"a": 1}),
    "kv_transfer_params": ("refused", {"a": 1}),
    "ec_transfer_params": ("refused", {"a": 1}),
    "repetition_detection": ("refused", {"max_pattern_size": 2}),
    "watermarking": ("refused", True),
    "thinking_token_budget": ("refused", 10),
}

CHAT: dict[str, tuple[Fate, Any]] = SHARED | {
    "messages": ("taken", _MESSAGES),
    "n": ("taken", 2),
    "max_tokens": ("taken", 5),
    "max_completion_tokens": ("taken", 5),
    "logprobs": ("taken", True),
    "prompt_logprobs": ("taken", 1),
    "response_format": ("taken", {"type": "json_object"}),
    "tools": ("taken", [_TOOL]),
    "functions": ("taken", [{"name": "f"}]),
    "function_call": ("taken", "auto"),
    "reasoning_effort": ("taken", "low"),
    "reasoning": ("taken", {"effort": "low"}),
    "include_reasoning": ("taken", False),
    "use_beam_search": ("taken", True),
    "length_penalty": ("taken", 1.0),
    "add_generation_prompt": ("taken", False),
    "continue_final_message": ("taken", False),
    "truncate_prompt_tokens": ("taken", 100),
    "truncation_side": ("taken", "left"),
    "return_token_ids": ("taken", True),
    "return_tokens_as_token_ids": ("taken", False),
    "verbosity": ("ignored", "low"),
    "prediction": ("ignored", {"type": "content", "content": "a"}),  # of speed alone
    "web_search_options": ("ignored", {}),
    "media_io_kwargs": ("ignored", {"image": {}}),
    "return_mm_kwargs": ("ignored", True),
    "return_token_offsets": ("ignored", True),  # vLLM has them on other routes
    "routed_experts_prompt_start": ("ignored", 0),
    "add_special_tokens": ("refused", True),
    "audio": ("refused", {"voice": "v", "format": "wav"}),
    "modalities": ("refused", ["audio"]),
    "echo": ("refused", True),
    "documents": ("refused", [{"text": "a"}]),
    "chat_template": ("refused", "{{ messages }}"),
    "logprob_token_ids": ("refused", [1]),
    "return_prompt_text": ("refused", True),
}

RESPONSES: dict[str, tuple[Fate, Any]] = SHARED | {
    "input": ("taken", "a"),
    "instructions": ("taken", "Be brief."),
    "previous_response_id": ("taken", None),
    "max_output_tokens": ("taken", 5),
    "include": ("taken", ["web_search_call.action.sources", "reasoning.encrypted_content"]),
    "tools": ("taken", [{"type": "function", "name": "f"}, {"type": "web_search"}]),
    "text": ("taken", {"format": {"type": "json_object"}, "verbosity": "low"}),
    "reasoning": ("taken", {"effort": "low", "summary": "auto", "generate_summary": "auto"}),
    "background": ("taken", False),
    "truncation": ("taken", "auto"),
    "max_tool_calls": ("ignored", 3),
    "context_management": ("ignored", [{"type": "compaction", "compact_threshold": 1000}]),
    "background_options": ("ignored", {"completion_window": "2h"}),
    "access_programs": ("ignored", {"cyber": "standard"}),
    "image": ("ignored", {"context_compression": "auto"}),
    "client_metadata": ("ignored", {"a": "b"}),  # Codex's
    "conversation": ("refused", {"id": "conv_1"}),
    "prompt": ("refused", {"id": "pmpt_1"}),
    "previous_response": ("refused", {"id": "resp_1"}),
    "previous_input_messages": ("refused", [{"role": "user", "content": "a"}]),
    "enable_response_messages": ("refused", True),
}

# vLLM's fields at c0bc596 (responses) and 002032e (chats) that OpenAI does not have
# fmt: off
VLLM_CHAT = (
    "thinking_token_budget", "include_reasoning", "use_beam_search", "top_k", "min_p", "repetition_penalty",
    "watermarking", "length_penalty", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
    "skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens", "truncation_side",
    "prompt_logprobs", "logprob_token_ids", "allowed_token_ids", "bad_words", "echo", "add_generation_prompt",
    "continue_final_message", "add_special_tokens", "documents", "chat_template", "chat_template_kwargs",
    "media_io_kwargs", "mm_processor_kwargs", "structured_outputs", "priority", "request_id", "session_id",
    "return_tokens_as_token_ids", "return_token_ids", "routed_experts_prompt_start", "return_token_offsets",
    "return_prompt_text", "return_mm_kwargs", "cache_salt", "kv_transfer_params", "ec_transfer_params", "vllm_xargs",
    "repetition_detection", "stream_interval",
)
VLLM_RESPONSES = (
    "logit_bias", "top_k", "skip_special_tokens", "include_stop_str_in_output", "request_id", "mm_processor_kwargs",
    "priority", "cache_salt", "enable_response_messages", "previous_input_messages", "previous_response",
    "structured_outputs", "repetition_penalty", "seed", "stop", "ignore_eos", "vllm_xargs",
)
# fmt: on
