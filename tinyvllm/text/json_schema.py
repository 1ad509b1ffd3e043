"""The subset of JSON Schema that can be enforced. Every keyword is either enforced, or known to be an annotation, or
refused with the path of the property that has it.

What is enforced: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md. It differs from draft 2020-12
in two ways: properties are generated in the schema's order, and `format` is enforced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tinyvllm.errors import RequestError
from tinyvllm.text.regex_size import MAX_SIZE, expanded_size

MAX_DEPTH = 64  # of nested schemas; the compiler's JSON parser stops at 128 levels of brackets
MAX_PROPERTIES = 5000  # in one schema, on all levels together: OpenAI's limit

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")

# fmt: off
ENFORCED = frozenset((
    "anyOf", "oneOf", "allOf", "$ref", "const", "enum", "type", "items", "additionalItems", "prefixItems", "minItems",
    "maxItems", "properties", "additionalProperties", "patternProperties", "required", "minProperties",
    "maxProperties", "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "multipleOf",
))
# Annotations: of JSON Schema, of OpenAPI, and of libraries that generate schemas.
ANNOTATIONS = frozenset((
    "$anchor", "$defs", "definitions", "$schema", "$id", "id", "$comment", "title", "description", "default",
    "readOnly", "writeOnly", "examples", "example", "contentMediaType", "contentEncoding", "deprecated",
    "discriminator", "externalDocs", "markdownDescription", "$vocabulary", "strict",
))
# fmt: on
# Values that hold for every instance, and so need no enforcement: {"nullable": false, "uniqueItems": false}.
ALWAYS_TRUE: dict[str, tuple[object, ...]] = {
    "nullable": (False,),
    "uniqueItems": (False,),
    "minContains": (0,),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "unevaluatedProperties": (True,),
    "unevaluatedItems": (True,),
    "propertyNames": ({}, True, {"type": "string"}),
}

_MAPS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalItems", "additionalProperties")

# One space, or a newline and its indentation. With unlimited whitespace, a small model can get stuck generating it.
_GUIDANCE = {"whitespace_pattern": r"[ ]|\n[ \t]{0,32}", "lenient": False, "coerce_one_of": False}


def parse_schema(text: str, param: str) -> Any:
    """The schema in a JSON text. Raises RequestError(param)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{param} is not a JSON schema: {error or 'it is nested too deeply'}", param=param) from None


def prepare_schema(schema: Any, param: str) -> Any:
    """A copy for the compiler: checked, without annotations, and with our whitespace rule.

    An object whose schema lists properties and does not mention others is closed to others. The output is valid all the
    same, and a small model that may invent properties does so until it runs out of tokens.
    Raises RequestError, whose message and param name the keyword's path, beginning with `param`.
    """
    preparation = _Preparation(param)
    prepared = preparation.copy(schema, param, 0)
    preparation.close_objects()
    if isinstance(prepared, dict):
        return {"x-guidance": _GUIDANCE, **prepared}
    return prepared


class _Preparation:
    """One traversal of a schema. Owns the count of its properties, and the objects to close afterwards."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._num_properties = 0
        self._open_objects: list[dict[str, Any]] = []
        self._has_intersections = False  # of schemas, each of which must then allow the other's properties

    def close_objects(self) -> None:
        if not self._has_intersections:
            for copied in self._open_objects:
                copied["additionalProperties"] = False

    def copy(self, schema: Any, path: str, depth: int) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise refuse(path, f"is a {type(schema).__name__}", "a schema is an object, true or false")
        if depth > MAX_DEPTH:
            raise refuse(self._root, f"is nested more than {MAX_DEPTH} schemas deep", "flatten it")
        copied: dict[str, Any] = {}
        for keyword, value in schema.items():
            if self._has_meaning(keyword, value, path):
                copied[keyword] = self._copy_value(keyword, value, f"{path}.{keyword}", depth + 1)
        self._note_object(copied)
        return copied

    def _note_object(self, copied: dict[str, Any]) -> None:
        properties = copied.get("properties")
        if "allOf" in copied or (properties and not {"anyOf", "oneOf", "$ref"}.isdisjoint(copied)):
            self._has_intersections = True
        if not isinstance(properties, dict) or not properties:
            return
        required = copied.get("required", [])
        is_listed = isinstance(required, list) and all(
            isinstance(name, str) and name in properties for name in required
        )
        others = {"additionalProperties", "patternProperties", "minProperties"}
        if is_listed and others.isdisjoint(copied):
            self._open_objects.append(copied)

    def _has_meaning(self, keyword: str, value: Any, path: str) -> bool:
        """Whether a keyword must be enforced. Raises RequestError if it must be and cannot."""
        if keyword in ENFORCED or keyword in ("$defs", "definitions", "$id", "id", "$anchor", "$schema"):
            return True
        is_extension = keyword.startswith("x-") and keyword != "x-guidance"
        if keyword in ANNOTATIONS or is_extension or value in ALWAYS_TRUE.get(keyword, ()):
            return False
        known = ", ".join(sorted(ENFORCED))
        raise refuse(f"{path}.{keyword}", "cannot be enforced", f"omit it. Supported keywords: {known}")

    def _copy_value(self, keyword: str, value: Any, path: str, depth: int) -> Any:
        if keyword == "pattern" or (keyword == "patternProperties" and isinstance(value, Mapping)):
            for pattern in [value] if keyword == "pattern" else value:
                _check_pattern(pattern, path)
        if keyword in _MAPS_OF_SCHEMAS and isinstance(value, Mapping):
            self._num_properties += len(value)
            if self._num_properties > MAX_PROPERTIES:
                raise refuse(self._root, f"has more than {MAX_PROPERTIES} properties", "split it")
            return {name: self.copy(schema, f"{path}.{name}", depth) for name, schema in value.items()}
        if keyword in _LISTS_OF_SCHEMAS and isinstance(value, list):
            return [self.copy(schema, f"{path}.{index}", depth) for index, schema in enumerate(value)]
        if keyword == "items" and isinstance(value, list):
            return [self.copy(schema, f"{path}.{index}", depth) for index, schema in enumerate(value)]
        if keyword in _SCHEMAS:
            return self.copy(value, path, depth)
        if keyword == "type":
            for kind in value if isinstance(value, list) else [value]:
                if kind not in TYPES:
                    raise refuse(path, f"is {kind!a:.60}", f"choose from {', '.join(TYPES)}")
        if keyword == "format" and value not in FORMATS:
            raise refuse(path, f"is {value!a:.60}", f"choose from {', '.join(FORMATS)}, or omit it")
        return value


def _check_pattern(pattern: object, path: str) -> None:
    if isinstance(pattern, str) and (size := expanded_size(pattern)) > MAX_SIZE:
        what = f"has {size} characters with its repetitions written out"
        raise refuse(path, what, f"the limit is {MAX_SIZE}, lower its counts")


def refuse(path: str, what: str, remedy: str) -> RequestError:
    path = ascii(path)[1:-1]  # names come from clients
    shown = path if len(path) <= 300 else f"{path[:140]}...{path[-140:]}"
    return RequestError(f"{shown} {what}: {remedy}", param=shown)


def subschemas(schema: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, schema) of the schemas directly inside a prepared one, definitions excluded."""
    if not isinstance(schema, Mapping):
        return
    for keyword, value in schema.items():
        if keyword in ("properties", "patternProperties") and isinstance(value, Mapping):
            yield from ((f"{path}.{keyword}.{name}", inner) for name, inner in value.items())
        elif keyword in (*_LISTS_OF_SCHEMAS, "items") and isinstance(value, list):
            yield from ((f"{path}.{keyword}.{index}", inner) for index, inner in enumerate(value))
        elif keyword in _SCHEMAS:
            yield f"{path}.{keyword}", value
