"""Tools: what a model may call, how the call is checked, and what it gets back.

A tool is a name, a description, a JSON schema of its arguments and a function. ``Toolbox.call``
never raises for what a model did wrong: an unknown tool, arguments that do not fit the schema and a
refusal by the tool itself all come back as a result that starts with ``error:``, as a real tool
server would answer, so that the model can react and the episode can count it.

chosen: the part of JSON schema that these tools need: an object of string, integer, number or
boolean properties, with ``enum`` and ``required``, and no others allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool}


class Refused(Exception):
    """Raised by a tool's function for a call that it understands and will not carry out."""


@dataclass(frozen=True)
class Tool:
    """``properties`` maps argument names to their schemas; all are required unless ``optional``."""

    name: str
    description: str
    properties: Mapping[str, Mapping[str, Any]]
    function: Callable[..., str]
    optional: tuple[str, ...] = ()

    @property
    def declaration(self) -> dict[str, Any]:
        """The tool as chat templates and OpenAI-compatible servers declare it."""
        parameters = {
            "type": "object",
            "properties": {name: dict(schema) for name, schema in self.properties.items()},
            "required": [name for name in self.properties if name not in self.optional],
        }
        return {"name": self.name, "description": self.description, "parameters": parameters}


@dataclass(frozen=True)
class Result:
    """What a call returned; ``ok`` is false when ``content`` is an error."""

    content: str
    ok: bool


class Toolbox:
    """The tools of one episode."""

    def __init__(self, tools: Sequence[Tool]):
        self._tools = {tool.name: tool for tool in tools}
        if len(self._tools) != len(tools):
            raise ValueError(f"two tools share a name: {', '.join(tool.name for tool in tools)}")

    @property
    def declarations(self) -> list[dict[str, Any]]:
        return [tool.declaration for tool in self._tools.values()]

    def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Check the call, make it, and report; see the module header."""
        tool = self._tools.get(name)
        if tool is None:
            return _error(f"no tool {name!r}; use one of {', '.join(self._tools)}")
        if problem := check_arguments(tool, arguments):
            return _error(problem)
        try:
            return Result(tool.function(**arguments), True)
        except Refused as refusal:
            return _error(str(refusal))


def check_arguments(tool: Tool, arguments: Mapping[str, Any]) -> str:
    """What is wrong with the arguments of a call, in words; empty when they fit the schema."""
    for name in arguments:
        if name not in tool.properties:
            known = ", ".join(tool.properties) or "none"
            return f"{tool.name} has no argument {name!r}; arguments: {known}"
    for name, schema in tool.properties.items():
        if name not in arguments:
            if name in tool.optional:
                continue
            return f"{tool.name} needs the argument {name!r}"
        value, kind = arguments[name], schema["type"]
        if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
            return f"{name!r} must be of type {kind}, not {value!r}"
        if "enum" in schema and value not in schema["enum"]:
            return f"{name!r} must be one of {', '.join(map(str, schema['enum']))}, not {value!r}"
    return ""


def _error(message: str) -> Result:
    return Result(f"error: {message}", False)
