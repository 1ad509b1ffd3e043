"""A scripted conversation over the wire: the template, the parser of calls and the recorder are the real ones."""

from __future__ import annotations

from typing import Any

import httpx

from tests.agents.scripted_engine import call, loop, scripted_server

READ = {"type": "function", "function": {"name": "read", "parameters": {"type": "object", "properties": {}}}}


def test_a_tool_loop_follows_the_script() -> None:
    script = loop("count the lines", call("read", path="notes.txt"), lambda prompt: f"{prompt.count('line')} lines.")
    with scripted_server(script) as server, httpx.Client(base_url=server.url) as client:

        def chat(*messages: dict[str, Any]) -> dict[str, Any]:
            body = {"model": "tiny", "messages": messages, "tools": [READ]}
            answer: dict[str, Any] = client.post("/v1/chat/completions", json=body).raise_for_status().json()
            return answer

        question = {"role": "user", "content": "Please count the lines."}
        message = chat(question)["choices"][0]["message"]
        [made] = message["tool_calls"]
        assert made["function"] == {"name": "read", "arguments": '{"path": "notes.txt"}'}
        result = {"role": "tool", "tool_call_id": made["id"], "content": "line one\nline two"}
        answer = chat(question, message, result)
        assert answer["choices"][0]["message"]["content"] == "3 lines."  # the task has one as well
        num_tokens = len(server.engine.prompts[0])
        assert num_tokens - 16 < answer["usage"]["prompt_tokens_details"]["cached_tokens"] <= num_tokens
        assert chat({"role": "user", "content": "A title?"})["choices"][0]["message"]["content"] == "All right."
    assert [(request.method, request.path, request.status) for request in server.requests] == [
        ("POST", "/v1/chat/completions", 200)
    ] * 3
    assert server.requests[1].body["messages"] == [question, message, result]
    assert '"3 lines."' in server.requests[1].answer
    assert server.requests[0].headers.keys() == {"accept", "content-type", "user-agent"}
