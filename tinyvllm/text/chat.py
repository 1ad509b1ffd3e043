"""Chat templates: from messages to the text format that a model was trained on.

Templates come from the model's files or the operator, never from a request, and run in Jinja's sandbox: no access to
Python's internals, no changes to their arguments. What a rendering takes is limited (template_limits.py): time,
iterations, the size of each value and of all together, and the output. A template is rendered once when it is loaded.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from tinyvllm.config import ModelFiles
from tinyvllm.errors import ModelError, RequestError
from tinyvllm.faults import reach
from tinyvllm.storage.gguf_file import GGUFFile
from tinyvllm.storage.regular_file import is_present, read_regular
from tinyvllm.storage.strict_json import read_json_if_present
from tinyvllm.storage.values import Values
from tinyvllm.text import gguf_tokenizer, hf_tokenizer
from tinyvllm.text.template_abilities import EFFORTS, Abilities
from tinyvllm.text.template_adapter import adapt
from tinyvllm.text.template_environment import BUDGET, make_environment
from tinyvllm.text.template_limits import MAX_CHARS, Budget, TemplateLimitError
from tinyvllm.text.template_probes import find_abilities, find_effort
from tinyvllm.text.template_tools import WITHOUT_TOOLS, bare, complete, describe_in_system, plain

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer
    from tinyvllm.text.tools.base import ToolFormat

logger = logging.getLogger(__name__)

MAX_TEMPLATE_BYTES = 1 << 18  # of a template's source, which takes a second to parse; the largest known have 40 kB
MAX_CHAT_CHARS = MAX_CHARS  # of a rendered chat


def load_chat_template(files: ModelFiles, override_path: str | Path | None = None) -> ChatTemplate | None:
    """The chat template in `override_path` if given, else the model's own; None if there is none.

    In a directory, chat_template.jinja takes precedence over tokenizer_config.json's chat_template. Raises ModelError
    for an unreadable file and for a template that does not parse.
    """
    if files.kind == "gguf":
        metadata = GGUFFile(files.path).metadata
        special_texts = gguf_tokenizer.read_special_texts(metadata, files.path)
        sources = read_gguf_templates(metadata, files.path)
    else:
        special_texts = hf_tokenizer.read_special_texts(files.path)
        sources = read_hf_templates(files.path)
    if override_path is not None:
        sources = {"default": read_template_file(Path(override_path))}
    if not sources:
        return None
    template = ChatTemplate(sources, special_texts, files.name)
    template.check()
    return template


def read_gguf_templates(metadata: Mapping[str, Any], source: Path) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    keys = {"default": prefix, "tool_use": f"{prefix}.tool_use"}
    values = Values(source, metadata)
    found = {name: values.optional_text(key) for name, key in keys.items()}
    return {name: text for name, text in found.items() if text is not None}


def read_hf_templates(directory: Path) -> dict[str, str]:
    path = directory / "chat_template.jinja"
    if is_present(path):
        return {"default": read_template_file(path)}
    path = directory / "tokenizer_config.json"
    settings = Values(path, read_json_if_present(path))
    if isinstance(settings.get("chat_template"), list):  # several named templates
        return {entry.text("name"): entry.text("template") for entry in settings.inners("chat_template")}
    text = settings.optional_text("chat_template")
    return {} if text is None else {"default": text}


def read_template_file(path: Path) -> str:
    try:
        return read_regular(path, MAX_TEMPLATE_BYTES).decode("utf-8")
    except (ModelError, UnicodeDecodeError) as error:
        raise ModelError(f"the chat template {path} cannot be read: {error}") from error


class ChatTemplate:
    """A model's templates by name: "default", and in some models "tool_use" for chats with tools."""

    def __init__(self, sources: Mapping[str, str], special_texts: Mapping[str, str], model_name: str) -> None:
        self.sources = dict(sources)
        # of all templates, in which the formats of tools and reasoning are recognized
        self.source = "\n".join(sources.values())
        self._name = model_name
        self._special_texts = dict(special_texts)
        self._abilities: dict[bool, Abilities] = {}  # by whether there are tools
        self._efforts: dict[str, str] = {}  # those that the template takes, by what was asked for
        self._logged: set[str] = set()
        environment = make_environment()
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in sources.items():
            if len(source) > MAX_TEMPLATE_BYTES:
                raise ModelError(
                    f"the chat template {name!r} of {model_name} has {len(source)} characters: it must have at most "
                    f"{MAX_TEMPLATE_BYTES}"
                )
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                where = f"the chat template {name!r} of {model_name}, line {error.lineno}"
                raise ModelError(f"{where}: it does not parse: {error.message}") from error
            except Exception as error:  # Jinja's parser and Python's compiler have limits of their own
                what = f"{type(error).__name__}: {str(error)[:200]}"
                raise ModelError(f"the chat template {name!r} of {model_name} cannot be compiled: {what}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        tool_format: ToolFormat | None = None,
        **kwargs: Any,
    ) -> str:
        """The chat as text, with special tokens written out: encode it with `Tokenizer.encode_chat`.

        Messages that the template cannot take are rewritten (`template_adapter`). tool_format: how tools, calls and
        results are written if the template does not render them; None: as its source suggests. `kwargs` are additional
        template variables. Raises RequestError(param="messages") if the template rejects the
        messages or fails on them, and for content that is not text.
        """
        reach("text.render")
        if tools and not self.renders_tools():
            messages, tools = self._describe(messages, tools, tool_format or self._tool_format()), None
        abilities = self.abilities(has_tools=bool(tools))
        adapted, changes = adapt(messages, abilities, lambda one: (tool_format or self._tool_format()).as_text(one))
        if tools and abilities.tools == "system":
            adapted, tools = describe_in_system(adapted, tools), None
        kwargs, refused = self._with_effort(kwargs)
        self._log([*changes, *refused])
        try:
            return self._write(
                adapted,
                tools=self._tools_variable(tools, abilities),
                add_generation_prompt=add_generation_prompt,
                has_tools=bool(tools),
                **kwargs,
            )
        except (RequestError, MemoryError):
            raise
        except TemplateLimitError as error:
            remedy = "send fewer or shorter messages, or set another template with --chat-template"
            raise refuse(f"{error}: {remedy}") from error
        except Exception as error:  # a template can raise anything
            raise refuse(f"rejected the messages: {error or type(error).__name__}") from error

    def check(self) -> None:
        """Render a short conversation. Raises ModelError if that takes too much; logs it if it fails otherwise, because
        the template may be for another kind of conversation."""
        for has_tools in (False, True) if "tool_use" in self._templates else (False,):
            reason = self._fault(has_tools)
            if reason is not None:
                logger.warning("the chat template of %s fails for a short conversation: %s", self._name, reason)

    def _fault(self, has_tools: bool) -> str | None:
        """Why a short conversation cannot be rendered, if neither form of its content can be."""
        reason = None
        for content in ("Hi.", [{"type": "text", "text": "Hi."}]):
            messages = [{"role": "user", "content": content}]
            try:
                self._write(messages, tools=None, add_generation_prompt=True, has_tools=has_tools)
                return None
            except TemplateLimitError as error:
                raise ModelError(
                    f"the chat template of {self._name} {error}, for a conversation of one short message: set another "
                    "with --chat-template"
                ) from error
            except Exception as error:  # a template can raise anything
                reason = str(error) or type(error).__name__
        return reason

    def abilities(self, *, has_tools: bool) -> Abilities:
        """What the template can take, with tools or without: probed at the first call."""
        if has_tools not in self._abilities:
            write = functools.partial(self._write, add_generation_prompt=False, has_tools=has_tools)
            self._abilities[has_tools] = find_abilities(write, has_tools=has_tools)
        return self._abilities[has_tools]

    def renders_tools(self) -> bool:
        """Whether the template itself describes tools to the model."""
        abilities = self.abilities(has_tools=True)
        return abilities.tools != "no" if abilities.is_known else "tools" in self.source

    def _with_effort(self, variables: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The variables, with a `reasoning_effort` that the template accepts, and the changes."""
        effort = variables.get("reasoning_effort")
        if effort not in EFFORTS:
            return variables, []
        if effort not in self._efforts:
            write = functools.partial(self._write, tools=None, add_generation_prompt=False, has_tools=False)
            self._efforts[effort] = find_effort(write, effort) or effort
        taken = self._efforts[effort]
        changes = [] if taken == effort else [f"reasoning_effort is {taken!r} for {effort!r}"]
        return {**variables, "reasoning_effort": taken}, changes

    def _tools_variable(self, tools: Sequence[Mapping[str, Any]] | None, abilities: Abilities) -> Any:
        if not tools:
            return WITHOUT_TOOLS[abilities.without_tools]
        tools = tools if abilities.incomplete_tools else complete(tools)
        tools = tools if abilities.any_schemas else plain(tools)
        return bare(tools) if abilities.tools == "bare" else tools

    def _write(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Any,
        add_generation_prompt: bool,
        has_tools: bool,
        **kwargs: Any,
    ) -> str:
        """The template's output for the messages unchanged. Raises whatever it raises."""
        variables = {
            **self._special_texts,
            **kwargs,
            BUDGET: Budget([*messages, *(tools if isinstance(tools, Sequence) else ())]),
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces, num_chars = [], 0
        for piece in self._choose(has_tools).generate(variables):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > MAX_CHAT_CHARS:
                raise refuse(f"produced more than {MAX_CHAT_CHARS} characters: send fewer or shorter messages")
        return "".join(pieces)

    def _describe(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], format: ToolFormat
    ) -> Sequence[Mapping[str, Any]]:
        """The messages with the tools, calls and results as text."""
        from tinyvllm.text.tools.base import Tool  # here: grammars load NumPy

        functions = [tool.get("function", tool) for tool in tools]
        described = [Tool(one["name"], one.get("description") or "", one.get("parameters")) for one in functions]
        return format.prepare(messages, described, has_template=False)

    def _tool_format(self) -> ToolFormat:
        from tinyvllm.text.tools import find_tool_format  # here: grammars load NumPy

        return find_tool_format(None, self.source)

    def _log(self, changes: Sequence[str]) -> None:
        """Log each kind of change once."""
        for change in changes:
            if change not in self._logged:
                self._logged.add(change)
                logger.info("the chat template of %s cannot take a conversation as it is: %s", self._name, change)

    def _choose(self, has_tools: bool) -> jinja2.Template:
        name = "tool_use" if has_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            known = ", ".join(sorted(self._templates))
            raise refuse(f"has no version named 'default' (it has {known}): set one with --chat-template")
        return self._templates[name]


PROBE_ANSWER = "Certainly 7413."  # an answer that no template contains


def end_of_turn_ids(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special token that the template writes after an answer, which ends a turn: (id,), or () if there is none.

    Models are trained to write it, but some files state another token as their end: that of a document. In harmony it
    only ends a message; turns end with <|return|> or <|call|>.
    """
    if "<|return|>" in template.source:
        ends = [tokenizer.encode_chat(text) for text in ("<|return|>", "<|call|>")]
        return tuple(ids[0] for ids in ends if len(ids) == 1 and ids[0] in tokenizer.special_ids)
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": PROBE_ANSWER}]
    try:
        rendered = template.render([*chat, chat[0]], add_generation_prompt=False)
    except RequestError:  # a template of another kind of chat
        return ()
    _, found, rest = rendered.partition(PROBE_ANSWER)
    if not found:
        return ()
    first = tokenizer.encode_chat(rest[:64].lstrip())[:1]
    return tuple(token_id for token_id in first if token_id in tokenizer.special_ids and token_id != tokenizer.bos_id)


def refuse(what: str) -> RequestError:
    return RequestError(f"the model's chat template {what}", param="messages")
