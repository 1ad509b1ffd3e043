"""What templates can take is found by rendering, and conversations become what they can take.

The templates are small ones of our own, each with a habit of real models' templates.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.builders import CHATML
from tests.sweeps import examples
from tinyvllm.errors import RequestError
from tinyvllm.text import template_probes
from tinyvllm.text.chat import ChatTemplate
from tinyvllm.text.continuation import cut_at_mark, mark_end, render_continued

Message = dict[str, Any]


def turns(
    content: str = "{{ m.content }}",
    *,
    head: str = "[{{ m.role }}]",
    calls: str = "m.tool_calls or []",
    arguments: str = "call.function.arguments|tojson",
    tools: str = "{% if tools %}{{ tools|tojson }}{% endif %}",
) -> str:
    """`[role]content` for each message, with calls as `{name|arguments}`, and the definitions of tools at the end."""
    written = "{% for call in CALLS %}{{ '{' ~ call.function.name ~ '|' ~ ARGUMENTS ~ '}' }}{% endfor %}"
    written = written.replace("CALLS", calls).replace("ARGUMENTS", arguments)
    body = content.replace("CALLS", written) if "CALLS" in content else content + written
    return "{% for m in messages %}" + head + body + "{% endfor %}" + tools


TURNS = turns()
GEMMA = """{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
[{{ m.role }}]{{ m.content|trim }}<|end|>
{%- endfor %}"""
FIRST_ONLY = turns(
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"
)
MISTRAL = """{% set count = namespace(value=0) %}{% for m in messages if m.role != 'system' and m.role != 'tool' %}
{%- if not m.tool_calls %}
{%- if (m.role == 'user') != (count.value % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}
{%- set count.value = count.value + 1 %}{% endif %}{% endfor %}
{%- set users = messages|selectattr('role', 'equalto', 'user')|list %}
{%- for m in messages %}
{%- if m.role == 'user' %}[INST]{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}{{ m.content }}[/INST]{% if tools and m == users[-1] %}{{ tools|tojson }}{% endif %}
{%- elif m.role == 'tool' %}{% if m.tool_call_id|length != 9 %}{{ raise_exception('9') }}{% endif -%}
[RESULT]{{ m.tool_call_id }}:{{ m.content }}
{%- elif m.tool_calls %}{{ m.content }}{% for call in m.tool_calls %}
{%- if call.id|length != 9 %}{{ raise_exception('9') }}{% endif -%}
[CALL]{{ call.id }}{{ call.function|tojson }}{% endfor %}
{%- elif m.role == 'assistant' %}{{ m.content }}</s>
{%- elif not loop.first %}{{ raise_exception('role') }}{% endif %}{% endfor %}"""
PARTS_ONLY = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def said(text: str, *arguments: Any, **others: Any) -> Message:
    """An answer, with a call of `f` for each of the arguments."""
    calls = [
        {"id": f"call_{index}", "type": "function", "function": {"name": "f", "arguments": one}}
        for index, one in enumerate(arguments)
    ]
    return {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {}), **others}


def result(text: str, index: int = 0) -> Message:
    return {"role": "tool", "content": text, "tool_call_id": f"call_{index}"}


def template(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, {}, "tiny")


def render(source: str, *messages: Message, **variables: Any) -> str:
    return template(source).render(messages, **{"add_generation_prompt": False, **variables})


# ---- System messages ----


def test_a_template_that_takes_everything_gets_everything() -> None:
    chat = (system("a"), system("b"), user("c"), user("d"), said("", {"x": 1}, {"x": 2}), result("e"), system("f"))
    assert render(TURNS, *chat) == (
        '[system]a[system]b[user]c[user]d[assistant]{f|{"x": 1}}{f|{"x": 2}}[tool]e[system]f'
    )
    assert template(TURNS).abilities(has_tools=True).deviations() == [
        "no reasoning of earlier messages: the template leaves it out"
    ]


def test_system_messages_are_folded_where_there_may_be_none() -> None:
    assert (
        render(GEMMA, system("a"), system("b"), user("c"), said("d")) == "[user]a\n\nb\n\nc<|end|>[assistant]d<|end|>"
    )
    assert render(GEMMA, system("a")) == "[user]a<|end|>"
    assert render(GEMMA, system("a"), said("b"), user("c")) == "[user]a<|end|>[assistant]b<|end|>[user]c<|end|>"


def test_system_messages_are_joined_at_the_beginning_and_the_users_later() -> None:
    chat = (system("a"), {"role": "developer", "content": "b"}, user("c"), said("d"), system("e"), user("f"))
    assert render(FIRST_ONLY, *chat) == "[system]a\n\nb[user]c[assistant]d[user]e[user]f"


def test_a_system_message_is_not_lost_in_a_tool_loop() -> None:
    chat = (system("a"), user("b"), said("", {"x": 1}), result("c"))
    assert render(MISTRAL, *chat[:2]) == "[INST]a\n\nb[/INST]"
    assert render(MISTRAL, *chat).startswith("[INST]a\n\nb[/INST][CALL]")


# ---- Turns ----


def test_consecutive_messages_are_joined_where_roles_must_alternate() -> None:
    assert render(GEMMA, user("a"), user("b"), said("c"), said("d")) == "[user]a\n\nb<|end|>[assistant]c\n\nd<|end|>"
    assert render(GEMMA, said("a"), user("b")) == "[user]<|end|>[assistant]a<|end|>[user]b<|end|>"


def test_a_user_is_put_first_where_there_must_be_one() -> None:
    asks = turns(
        tools="{% if not messages|selectattr('role', 'eq', 'user')|list %}{{ raise_exception('ask') }}{% endif %}"
    )
    assert render(asks, system("a")) == "[user]a"
    assert render(asks, system("a"), said("b")) == "[user]a[assistant]b"
    assert render(asks, said("", {"x": 1}), result("b")) == '[user][assistant]{f|{"x": 1}}[tool]b'


def test_a_user_after_a_result_is_joined_to_it_where_it_is_refused() -> None:
    chat = (user("a"), said("", {"x": 1}), result("b"), user("c"), said("d"), user("e"))
    assert render(MISTRAL, *chat).endswith(":b\n\ncd</s>[INST]e[/INST]")
    assert render(TURNS, *chat).endswith("[tool]b[user]c[assistant]d[user]e")


def test_empty_messages_are_left_out_where_they_are_refused() -> None:
    picky = turns("{% if not m.content %}{{ raise_exception('empty') }}{% endif %}{{ m.content }}")
    assert render(picky, user("a"), said(""), user(""), user("b")) == "[user]a[user]b"


# ---- The form of content ----


@pytest.mark.parametrize("content", ["hi", [{"type": "text", "text": "hi"}]])
def test_a_template_of_parts_gets_parts(content: Any) -> None:
    chat = [system("Be brief."), {"role": "user", "content": content}]
    assert template(PARTS_ONLY).render(chat) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template(CHATML).render(chat[1:]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


# ---- Tools ----


@pytest.mark.parametrize("arguments", [{"x": "é"}, '{"x": "é"}'])
def test_arguments_have_the_form_that_the_template_expects(arguments: Any) -> None:
    chat = (user("a"), said("", arguments))
    concatenated = turns(arguments="('' + call.function.arguments)")
    items = turns(arguments="call.function.arguments.items()|map('join', '=')|join")
    for source in (TURNS, concatenated):
        assert render(source, *chat) == '[user]a[assistant]{f|{"x": "é"}}'
    assert render(items, *chat) == "[user]a[assistant]{f|x=é}"
    assert render(items, user("a"), said("", "oops")) == "[user]a[assistant]{f|arguments=oops}"


def test_ids_are_nine_letters_and_digits_where_others_are_refused() -> None:
    chat = (user("a"), said("", {"x": 1}, {"x": 2}), result("b", 1), result("c", 0))
    text = render(MISTRAL, *chat)
    first, second = (text.split("[CALL]")[n][:9] for n in (1, 2))
    assert first != second and first.isalnum() and second.isalnum()
    assert text.endswith(f"[RESULT]{second}:b[RESULT]{first}:c")
    assert render(MISTRAL, *chat) == text  # the prefix cache finds it again
    without = [{name: value for name, value in one.items() if name != "tool_call_id"} for one in chat]
    without[1]["tool_calls"] = [{**call, "id": None} for call in without[1]["tool_calls"]]
    assert render(MISTRAL, *without).endswith("[RESULT]call00000:b[RESULT]call00001:c")


def test_parallel_calls_are_separated_where_one_is_the_most() -> None:
    single = turns(calls="(m.tool_calls or [])[:1]")
    chat = (user("a"), said("b", {"x": 1}, {"x": 2}), result("c", 1), result("d", 0), user("e"))
    assert render(single, *chat) == ('[user]a[assistant]b{f|{"x": 1}}[tool]d[assistant]{f|{"x": 2}}[tool]c[user]e')


def test_content_beside_calls_is_null_or_left_out_where_it_hides_the_calls() -> None:
    hides = turns("{% if m.content is not none %}{{ m.content }}{% else %}CALLS{% endif %}")
    chat = (user("a"), said("b", {"x": 1}), said("", {"x": 2}))
    assert render(hides, *chat) == '[user]a[assistant]{f|{"x": 1}}[assistant]{f|{"x": 2}}'


def test_text_beside_calls_is_a_plan_or_left_out() -> None:
    dropped = "{% if m.tool_calls %}CALLS{% else %}{{ m.content }}{% endif %}"
    chat = (user("a"), said("b", {"x": 1}))
    assert render(turns(dropped), *chat) == '[user]a[assistant]{f|{"x": 1}}'
    assert render(turns("{{ m.tool_plan }}" + dropped), *chat) == '[user]a[assistant]b{f|{"x": 1}}'


def test_text_before_calls_does_not_hide_them_when_it_is_joined() -> None:
    follows = "m.tool_calls and loop.index0 and messages[loop.index0 - 1].role == 'assistant'"
    hides = turns(
        "{% if "
        + follows
        + " %}{{ m.none.x }}{% endif %}{% if m.content is not none %}{{ m.content }}{% else %}CALLS{% endif %}"
    )
    chat = (user("a"), said("b"), said("", {"x": 1}), result("c"))
    assert render(hides, *chat) == '[user]a[assistant]{f|{"x": 1}}[tool]c'


def test_calls_without_results_and_results_without_calls_are_text_where_they_are_refused() -> None:
    chat = (user("a"), said("", {"x": 1}), user("b"))
    text = '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]'
    assert render(MISTRAL + "{# [TOOL_CALLS] #}", *chat) == f"[INST]a[/INST]{text}</s>[INST]b[/INST]"
    check = (
        "{% if m.role == 'tool' and messages[loop.index0 - 1].role == 'user' %}{{ raise_exception('no') }}{% endif %}"
    )
    orphan = (user("a"), result("b"), said("", {"x": 1}), result("c"))
    assert render(turns(check + "{{ m.content }}"), *orphan) == (
        '[user]a[user]Result of the call call_0: b[assistant]{f|{"x": 1}}[tool]c'
    )
    assert render(TURNS, *orphan) == '[user]a[tool]b[assistant]{f|{"x": 1}}[tool]c'


def test_calls_of_consecutive_messages_are_joined_where_results_must_follow_at_once() -> None:
    before = "messages[loop.index0 - 1]"
    strict = "{% if m.tool_calls and " + before + ".tool_calls %}{{ raise_exception('results') }}{% endif %}"
    chat = (user("a"), said("", {"x": 1}), said("", {"x": 2}), result("b"), result("c", 1))
    assert render(turns(strict + "{{ m.content }}"), *chat) == (
        '[user]a[assistant]{f|{"x": 1}}{f|{"x": 2}}[tool]b[tool]c'
    )


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
def test_calls_and_results_are_text_where_the_template_knows_none(arguments: Any) -> None:
    chat = (user("a"), said("", arguments), result("b"))
    assert render(GEMMA, *chat) == (
        '[user]a<|end|>[assistant]{"name": "f", "arguments": {"x": 1}}<|end|>[user]Result of the call f: b<|end|>'
    )


def test_each_version_of_a_template_has_abilities_of_its_own() -> None:
    plain = "{% for m in messages if m.role != 'tool' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    both = ChatTemplate({"default": plain, "tool_use": TURNS}, {}, "tiny")
    chat = (user("a"), said("", {"x": 1}), result("b"))
    tool = {"type": "function", "function": {"name": "g", "description": "", "parameters": {"properties": {}}}}
    assert both.render(chat, tools=[tool]) == '[user]a[assistant]{f|{"x": 1}}[tool]b' + json.dumps([tool])
    assert both.render(chat) == '[user]a[assistant]{"name": "f", "arguments": {"x": 1}}[user]Result of the call f: b'


def test_results_are_named_where_the_name_is_missing() -> None:
    named = turns(head="[{{ m.role }}{% if m.role == 'tool' %} {{ m.name }}{% endif %}]")
    optional = turns(head="[{{ m.role }}{% if m.name %}, by {{ m.name }}{% endif %}]")
    chat = (user("a"), said("", {"x": 1}), result("b"))
    assert render(named, *chat).endswith("[tool f]b")
    assert render(optional, *chat).endswith("[tool]b")


def test_tools_are_bare_functions_where_the_template_looks_for_them() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"properties": {"x": {}}}}}
    bare = turns(tools="{% for tool in tools %}{{ tool.name }}({{ tool.parameters.properties|join }}){% endfor %}")
    assert render(bare, user("a"), tools=[tool]) == "[user]af(x)"
    assert json.dumps(tool) in render(TURNS, user("a"), tools=[tool])


def test_tools_are_text_of_the_system_message_where_the_template_looks_for_them_there() -> None:
    """As Phi-4-mini's."""
    source = turns("{{ m.content }}{% if m.tools %}<{{ m.tools }}>{% endif %}", tools="")
    tool = {"type": "function", "function": {"name": "f", "description": "é"}}
    assert (
        render(source, system("a"), user("b"), tools=[tool]) == '[system]a<[{"name": "f", "description": "é"}]>[user]b'
    )
    assert render(source, user("b"), tools=[tool]) == '[system]<[{"name": "f", "description": "é"}]>[user]b'


def test_definitions_are_completed_and_made_plain_where_the_template_fails_on_them() -> None:
    types = "{% for name, p in tool.function.parameters.properties|items %}{{ name ~ ':' + p.type + p.description }}"
    loop = (
        "{% for tool in tools %}{{ tool.function.name + tool.function.description }}"
        + types
        + ",{% endfor %}{% endfor %}"
    )
    schema = {"x": {"type": ["null", "integer"]}, "y": {"anyOf": [{"type": "array"}]}, "z": {"$ref": "#"}, "w": {}}
    tools = [
        {"type": "function", "function": {"name": "f"}},
        {"type": "function", "function": {"name": "g", "description": "d", "parameters": {"properties": schema}}},
    ]
    assert render(turns(tools=loop), user("a"), tools=tools) == "[user]afgdx:integer,y:array,z:object,w:string,"
    assert render(TURNS, user("a"), tools=tools) == "[user]a" + json.dumps(tools)


def test_the_variable_of_tools_is_what_the_template_can_do_without() -> None:
    for condition in ("tools is defined", "true"):
        source = turns(
            tools="{% if " + condition + " %}{% for tool in tools %}{{ tool|tojson }}{% endfor %}{% endif %}"
        )
        assert render(source, user("a")) == "[user]a"
    lists = turns(tools="{{ tools|length }}")
    assert render(lists, user("a")) == "[user]a0"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_the_templates_name(name: str) -> None:
    source = turns(f"{{% if m.{name} %}}<{{{{ m.{name} }}}}>{{% endif %}}{{{{ m.content }}}}")
    for given in ("reasoning_content", "thinking"):
        assert render(source, user("a"), said("c", **{given: "b"})) == "[user]a[assistant]<b>c"


def test_reasoning_may_be_a_part_of_the_content() -> None:
    part = "{% for p in m.content %}{% if p.type == 'thinking' %}<{{ p.thinking }}>{% else %}{{ p.text }}{% endif %}"
    source = turns("{% if m.content is string %}{{ m.content }}{% else %}" + part + "{% endfor %}{% endif %}")
    chat = (user("a"), said("c", reasoning_content="b"), said("", {"x": 1}, reasoning_content="d"))
    assert render(source, *chat) == '[user]a[assistant]<b>c[assistant]<d>{f|{"x": 1}}'


def test_tools_are_described_where_the_template_does_not() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "d"}}
    text = render(GEMMA, user("a"), said("", {"x": 1}), result("b"), tools=[tool])
    assert text.startswith("[user]You can call functions.") and '"name": "f", "description": "d"' in text
    assert "\n\na<|end|>[assistant]" in text


def test_an_effort_that_the_template_refuses_becomes_the_nearest_one() -> None:
    refusal = "{% if reasoning_effort not in ['low', 'high'] %}{{ raise_exception('effort') }}{% endif %}"
    source = refusal + "{{ reasoning_effort }}"
    efforts = {"none": "low", "minimal": "low", "medium": "low", "xhigh": "high"}
    for asked, taken in efforts.items():
        assert render(source + TURNS, user("a"), reasoning_effort=asked).startswith(taken)
    with pytest.raises(RequestError, match="effort"):
        render(source + TURNS, user("a"), reasoning_effort="little")


# ---- All at once ----

NUMBERED = re.compile(r"<\d+>")
TURN = st.sampled_from(["system", "user", "assistant", "call", "calls", "result", "empty answer", "empty question"])
COMPILED = [
    template(source)
    for source in (TURNS, GEMMA, FIRST_ONLY, MISTRAL, PARTS_ONLY, turns(calls="(m.tool_calls or [])[:1]"))
]


def conversation(turns: list[str]) -> list[Message]:
    """A message for each turn, with a text for each but the empty ones."""
    chat: list[Message] = []
    for index, turn in enumerate(turns):
        text = f"<{index}>"
        if turn in ("system", "user", "assistant"):
            chat.append({"role": turn, "content": text})
        elif turn == "result":
            chat.append(result(text))
        elif turn in ("call", "calls"):
            arguments = [{"x": text}, {"x": f"<{index}0>"}][: 2 if turn == "calls" else 1]
            chat.append(said("", *arguments))
        else:
            chat.append(said("") if turn == "empty answer" else user(""))
    return chat


@examples(40, 150)
@hypothesis.given(st.lists(TURN, min_size=1, max_size=9))
def test_no_conversation_is_refused_and_no_text_is_lost(turns: list[str]) -> None:
    chat = conversation(turns)
    wanted = sorted(NUMBERED.findall(json.dumps(chat)))
    for one in COMPILED:
        assert sorted(NUMBERED.findall(one.render(chat))) == wanted


# ---- Continued messages ----

FORMS = {"plain": CHATML, "trimmed": CHATML.replace("['content']", "['content']|trim"), "parts": PARTS_ONLY}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("content", ["i", "<", "end", "|", "\n", "im", " a b ", "assistant", ""])
def test_a_prompt_ends_where_the_last_message_does(form: str, content: str) -> None:
    chat = [user("im_end"), said(content)]
    text = render_continued(template(FORMS[form]), chat)
    ends = content.strip() if form == "trimmed" else content
    assert text.endswith(f"<|im_start|>assistant\n{ends}")


def test_what_cannot_be_continued_is_refused() -> None:
    for last in (said("a", {"x": 1}), user(""), {"role": "user", "content": None}, {"role": "user", "content": []}):
        with pytest.raises(RequestError, match="continue_final_message") as caught:
            mark_end([user("a"), last])
        assert caught.value.param == "continue_final_message"
    with pytest.raises(RequestError, match="does not render the content of a last message of the role 'assistant'"):
        cut_at_mark("other", [said("a")])


# ---- Probing ----


def test_a_template_that_fails_on_probes_is_used_as_it_is() -> None:
    source = "{% if not secret %}{{ raise_exception('secret') }}{% endif %}" + TURNS
    assert not template(source).abilities(has_tools=False).is_known
    chat = (system("a"), user("b"), system("c"), said("", {"x": 1}, thinking="t"))
    assert render(source, *chat, secret=1) == '[system]a[user]b[system]c[assistant]{f|{"x": 1}}'


def test_a_slow_template_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(template_probes, "PROBE_BUDGET_S", -1)
    assert not template(GEMMA).abilities(has_tools=False).is_known
    assert "too slow" in caplog.text


def test_changes_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    gemma = template(GEMMA)
    for _ in range(2):
        gemma.render([system("a"), user("b")])
    assert [record.message for record in caplog.records] == [
        "the chat template of tiny cannot take a conversation as it is: the system message becomes part of the user's"
    ]
