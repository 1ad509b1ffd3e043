"""Templates that take too much time or memory: each ends soon, with an error that says what it does."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.builders import write_byte_tokenizer, write_json
from tinyvllm.config import ModelFiles
from tinyvllm.errors import ModelError, RequestError
from tinyvllm.text import template_limits
from tinyvllm.text.chat import ChatTemplate, load_chat_template
from tinyvllm.text.template_limits import MAX_RENDER_S

USER = {"role": "user", "content": "hello"}
LOOP = "{% for i in range(100000) %}"
END = "{% endfor %}"
NS = "{% set ns = namespace(a='xxxxxxxxxxxxxxxx', l=[], n=9) %}"

HOSTILE = {
    "nested loops": LOOP * 4 + END * 4,
    "a loop whose condition is never met": LOOP + LOOP + "{% for i in range(100000) if i > 1000000 %}" + END * 3,
    "a loop over a text": "{% set a = 'x' * 10000000 %}" + LOOP + "{% for i in a if false %}{% endfor %}" + END,
    "macros that call themselves": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}"
    ),
    "recursive loops": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a product": "{{ 'a' * 1000000000 }}",
    "a product the other way": "{{ 1000000000 * 'a' }}",
    "a product of lists": "{{ [messages] * 100000000 }}",
    "a power": "{{ 10 ** 1000000000 }}",
    "squares": NS + LOOP + "{% set ns.n = ns.n * ns.n %}" + END,
    "a sum that doubles": NS + LOOP + "{% set ns.a = ns.a + ns.a %}" + END,
    "a text that doubles": NS + LOOP + "{% set ns.a = ns.a ~ ns.a %}" + END,
    "a list that doubles": NS + "{% set ns.l = [1] %}" + LOOP + "{% set ns.l = ns.l + ns.l %}" + END,
    "a list of itself": NS + LOOP + "{% set ns.l = [ns.l, ns.l] %}" + END + "{{ ns.l }}",
    "a mapping of itself": NS + LOOP + "{% set ns.l = {'a': ns.l, 'b': ns.l} %}" + END + "{{ ns.l|tojson }}",
    "a tuple of itself": NS + LOOP + "{% set ns.l = (ns.l, ns.l) %}" + END + "{{ ns.l == ns.l }}",
    "arguments of itself": (
        NS + "{% macro m() %}{% set ns.l = varargs %}{% endmacro %}" + LOOP + "{{ m(ns.l, ns.l) }}" + END
    ),
    "a mapping made by a call": NS + LOOP + "{% set ns.l = dict(a=ns.l, b=ns.l) %}" + END,
    "batches": NS + "{% set ns.l = [1] %}" + LOOP + "{% set ns.l = (ns.l + ns.l)|batch(2)|list %}" + END,
    "different texts kept": NS + LOOP + "{% set ns.l = ns.l + ['x' * (1000000 + i)] %}" + END,
    "a block that is captured": "{% set a = 'x' * 1000000 %}{% set b %}" + LOOP + "{{ a }}" + END + "{% endset %}",
    "numbers that are captured": "{% set b %}" + LOOP + LOOP + "{{ i }}" + END * 2 + "{% endset %}",
    "output": LOOP + LOOP + "{{ i }}" + END * 2,
    "padding by %": "{{ '%1000000000d' % 1 }}",
    "padding by an argument": "{{ '%*d' % (1000000000, 1) }}",
    "a precision": "{{ '%.1000000000f' % 1 }}",
    "padding by the filter format": "{{ '%1000000000d'|format(1) }}",
    "padding by format": "{{ '{:1000000000}'.format(1) }}",
    "padding by format's argument": "{{ '{:{}}'.format(1, 1000000000) }}",
    "a text repeated by format": "{{ ('{0}' * 100000).format('x' * 1000000) }}",
    "center": "{{ 'a'|center(1000000000) }}",
    "a method that pads": "{{ 'a'.ljust(1000000000) }}",
    "zfill of what is known": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ ('\\t' * 1000000).expandtabs(10000) }}",
    "indent": "{{ ('\\n' * 10000000)|indent(9999) }}",
    "join": "{{ range(100000)|join('x' * 1000000) }}",
    "join by the method": "{{ ('x' * 1000000).join(['a'] * 100000) }}",
    "replace": "{{ ('a' * 1000000)|replace('a', 'b' * 1000000) }}",
    "replace by the method": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "split": NS + LOOP + "{% set ns.l = ns.l + [('a ' * 5000000).split()] %}" + END,
    "slices in a macro": (
        "{% macro m(t, n) %}{% set u = t[1:] %}{{ m(u, n - 1) if n }}{% endmacro %}{{ m('x' * 10000000, 500) }}"
    ),
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "rounding": "{{ 1.5|round(1000000000, 'ceil') }}",
    "slice": "{{ [1]|slice(1000000000)|list }}",
    "sums of lists": "{{ ([[1]] * 1000000)|sum(start=[]) }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "indented JSON": (
        NS + "{% for i in range(400) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ([ns.l] * 9999)|tojson(indent=16) }}"
    ),
    "an endless list of texts": LOOP + "{% set a = range(100000)|map('string')|map('center', 9999)|list %}" + END,
    "a pattern's filter": "{{ ('<a ' * 5000000)|striptags }}",
    "namespaces of themselves": (
        NS + LOOP + "{% set ns.a = namespace(a=ns.a, b=ns.a) %}" + END + "{{ ns.a }}" + LOOP * 3 + END * 3
    ),
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_takes_too_much_is_refused_soon(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_TICKS", 20_000)  # a fiftieth, so that the test is quick
    monkeypatch.setattr(template_limits, "MAX_ITEMS", 30_000)
    before_kb, start_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(RequestError, match="the model's chat template") as caught:
        ChatTemplate({"default": "{% if messages %}" + source + "{% endif %}"}, {}, "tiny").render([USER])
    assert time.thread_time() - start_s < 4 * MAX_RENDER_S  # of processor time, with the probes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 700_000
    assert caught.value.param == "messages"


USUAL = {
    "{{ 'a' * 3 ~ 'b' + 'c' }}": "aaabc",
    "{{ '%5d|%-4s|%%' % (7, 'x') }}": "    7|x   |%",
    "{{ '{:>4}|{}|{a}'.format(1, 2, a=3) }}": "   1|2|3",
    "{{ [1, 'a'] + [2.5] }}": "[1, 'a', 2.5]",
    "{{ messages[0:1]|map(attribute='role')|join(', ') }}": "user",
    "{{ ['a', 'b']|join('-') ~ '.'.join(['c', 'd']) }}": "a-bc.d",
    "{{ 'abc'|replace('b', 'xx') ~ 'abc'.replace('c', '') }}": "axxcab",
    "{% for x in range(5) if x % 2 %}{{ loop.index }}:{{ x }} {% else %}none{% endfor %}": "1:1 2:3 ",
    "{% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is iterable else x }},{% endfor %}": "1,2,,,3,,",
    "{% macro m(a, b=2) %}<{{ a }}{{ b }}{{ caller() if caller }}>{% endmacro %}{{ m(1) }}": "<12>",
    "{% set x %}a{{ 1 }}{% endset %}{{ x|upper ~ x|length }}": "A12",
    "{{ {'a': [1, none, true], 'b': 'ü'}|tojson }}": '{"a": [1, null, true], "b": "ü"}',
    "{{ {'a': [1]}|tojson(indent=2) }}": '{\n  "a": [\n    1\n  ]\n}',
    "{{ (1, 2) ~ 2 ** 10 ~ 7 % 4 ~ 6 * 7 }}": "(1, 2)1024342",
    "{{ 'x'|center(5) ~ 'a\\nb'|indent(2) ~ 2.567|round(1) ~ [1, 2]|sum }}": "  x  a\n  b2.63",
    "{% filter upper %}abc{% endfilter %}{{ ['b', 'a']|sort|first }}": "ABCa",
}


@pytest.mark.parametrize(("source", "text"), USUAL.items())
def test_what_templates_usually_do_is_as_in_jinja(source: str, text: str) -> None:
    template = ChatTemplate({"default": source}, {}, "tiny")
    assert template._write([USER], tools=None, add_generation_prompt=True, has_tools=False) == text


@pytest.mark.parametrize(
    "template",
    [LOOP * 4 + END * 4, "{{ 'a' * 1000000000 }}", "{{" + "(" * 100_000 + ")" * 100_000 + "}}", "{% for %}"],
)
def test_a_template_that_never_ends_is_known_when_it_is_loaded(tmp_path: Any, template: str) -> None:
    write_byte_tokenizer(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": template})
    with pytest.raises(ModelError, match=r"the chat template .*tiny"):
        load_chat_template(ModelFiles("hf", tmp_path, "tiny"))


def test_a_template_that_fails_is_logged_when_it_is_loaded(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    write_byte_tokenizer(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": "{{ raise_exception('give a language') }}"})
    assert load_chat_template(ModelFiles("hf", tmp_path, "tiny")) is not None
    assert "the chat template of tiny fails for a short conversation: give a language" in caplog.text


def test_a_conversation_as_long_as_a_body_may_be_is_rendered() -> None:
    source = "{% for m in messages %}{{ '<' + m.role + '>' + m['content'] | trim + '\\n' }}{% endfor %}"
    chat = [{"role": ("user", "assistant")[index % 2], "content": "word " * 800} for index in range(4000)]
    assert len(ChatTemplate({"default": source}, {}, "tiny").render(chat)) > 15_900_000


SEVEN = """
import os, signal, sys, threading, time
from tinyvllm.errors import RequestError
from tinyvllm.text import template_limits
from tinyvllm.text.chat import ChatTemplate
template_limits.MAX_TICKS //= 5
template = ChatTemplate({"default": "%s"}, {}, "tiny")
ended, heard = [], []
begin = threading.Event()
def render():
    begin.wait()
    try: template.render([{"role": "user", "content": "x"}])
    except RequestError: ended.append(1)
threads = [threading.Thread(target=render) for _ in range(7)]
for thread in threads: thread.start()
signal.signal(signal.SIGTERM, lambda *_: heard.append(len(ended)))
begin.set()
os.kill(os.getpid(), signal.SIGTERM)
for thread in threads: thread.join()
print(len(ended), heard)
""" % (LOOP * 4 + END * 4)


def test_seven_endless_renderings_end_and_a_signal_is_heard_before() -> None:
    done = subprocess.run([sys.executable, "-c", SEVEN], capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout == "7 [0]\n", done.stderr
