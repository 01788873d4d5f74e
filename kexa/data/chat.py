"""The chat format: one Jinja template, one renderer, token ids with a loss mask, and the way back.

reported: a turn is role tag, newline, content, ``<|endofturn|>``, newline. Tools are declared
first, one JSON object a line. An assistant turn opens with a think block; reasoning is kept only
after the last user message, earlier turns get the empty block. Tool calls are JSON in
``<tool_call>``; consecutive tool results share one ``<|tool|>`` turn. The generation prompt ends
inside an open think block, or after an empty one with thinking off. chosen (not published): content
is trimmed where it meets a think block, a newline separates content from tool calls, a message's
reasoning is its ``reasoning_content``.

The loss mask is written into the template with the ``{% generation %}`` tag that ``transformers``
understands too: it covers exactly what the model has to produce, the closing ``<|endofturn|>``
included, and not the parts a generation prompt supplies.

Markup and content are kept apart. Every ``{{ expression }}`` of the template is content,
everything else is markup, and only markup can become special tokens: a user who types
``<|endofturn|>`` gets its characters. A tokenizer applied to the rendered string (the stock path)
gives the same ids whenever no content spells a special token.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

Message = Mapping[str, Any]

CHAT_TEMPLATE = """\
{% if tools %}
<|tool_declare|>
# Tools
{% for tool in tools %}
<tool>{{ tool | tojson }}</tool>
{% endfor %}
<|endofturn|>
{% endif %}
{% set last = namespace(user=-1) %}
{% for message in messages if message.role == "user" %}
{% set last.user = last.user + 1 %}
{% endfor %}
{% set seen = namespace(users=-1) %}
{% for message in messages %}
{% if message.role == "system" %}
<|system|>
{{ message.content }}<|endofturn|>
{% elif message.role == "user" %}
{% set seen.users = seen.users + 1 %}
<|user|>
{{ message.content }}<|endofturn|>
{% elif message.role == "assistant" %}
<|assistant|>
<think>
{% if message.reasoning_content and seen.users == last.user %}
{% generation %}
{{ message.reasoning_content | trim }}
</think>

{% endgeneration %}
{% else %}

</think>

{% endif %}
{% generation %}
{{ (message.content or "") | trim }}
{%- for call in message.tool_calls or [] %}
{% set function = call.function or call %}
{% if message.content or not loop.first %}

{% endif %}
<tool_call>{"name": {{ function.name | tojson }}, "arguments": {{ function.arguments \
if function.arguments is string else function.arguments | tojson }}}</tool_call>
{%- endfor %}
<|endofturn|>
{%- endgeneration %}

{% elif message.role == "tool" %}
{% if loop.previtem is not defined or loop.previtem.role != "tool" %}
<|tool|>
{% endif %}
<tool_result>{{ message.content }}</tool_result>
{%- if loop.nextitem is not defined or loop.nextitem.role != "tool" %}
<|endofturn|>
{%- endif %}

{% else %}
{{ raise_exception("unknown role " ~ message.role ~ "; use system, user, assistant or tool") }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
<think>
{% if enable_thinking is defined and not enable_thinking %}

</think>

{% endif %}
{% endif %}
"""

MARKUP = (
    *("<|system|>", "<|user|>", "<|assistant|>", "<|endofturn|>", "<|tool_declare|>", "<|tool|>"),
    *("<think>", "</think>", "<tool>", "</tool>", "<tool_call>", "</tool_call>"),
    *("<tool_result>", "</tool_result>"),
)

# In the rendered skeleton content is a numbered slot, so content cannot bring in these characters.
_SLOT, _OPEN, _CLOSE = "\0", "\1", "\2"
_PIECE = re.compile(f"{_SLOT}\\d+{_SLOT}|{_OPEN}|{_CLOSE}|" + "|".join(map(re.escape, MARKUP)))


def render_chat(
    messages: Sequence[Message],
    tools: Sequence[Mapping] | None = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool = True,
) -> str:
    """The conversation as text, for people. Models read :func:`encode_chat`.

    Args:
        messages: dicts with ``role`` (system, user, assistant or tool) and ``content``; assistant
            messages may have ``reasoning_content`` and ``tool_calls`` (``{"name", "arguments"}``,
            bare or under ``"function"``).
        tools: one JSON-serialisable description per tool.
        add_generation_prompt: end with the opening of an assistant turn.
        enable_thinking: whether that opening leaves the think block open.

    Raises:
        jinja2.TemplateError: a message has an unknown role.
    """
    return "".join(
        text for text, _, _ in _pieces(messages, tools, add_generation_prompt, enable_thinking)
    )


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping] | None = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool = True,
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and, for each, whether the model has to produce it.

    Arguments are those of :func:`render_chat`. The ids with ``add_generation_prompt`` are a prefix
    of the ids of the same conversation with the reply appended, and that reply's mask begins where
    the prefix ends.

    Raises:
        ValueError: the tokenizer lacks one of the template's special tokens.
    """
    ids: list[int] = []
    mask: list[bool] = []
    plain, plain_generated = "", False
    pieces = _pieces(messages, tools, add_generation_prompt, enable_thinking)
    for text, markup, generated in [*pieces, ("", True, False)]:
        if plain and (markup or generated != plain_generated):
            run = _encode_plain(tokenizer, plain)
            ids += run
            mask += [plain_generated] * len(run)
            plain = ""
        if not markup:
            plain, plain_generated = plain + text, generated
        elif text:
            ids.append(_markup_id(tokenizer, text))
            mask.append(generated)
    return ids, mask


def parse_reply(
    tokenizer: Tokenizer, tokens: Sequence[int], enable_thinking: bool = True
) -> dict[str, Any]:
    """Generated tokens as an assistant message.

    Works on ids, so text that merely looks like markup stays text. A think block that is never
    closed leaves ``content`` empty; a tool call that is not a JSON object with ``name`` and
    ``arguments`` stays in ``content``, where it can be seen.

    Returns:
        ``{"role", "content"}``, plus ``reasoning_content`` and ``tool_calls`` where there are any.
    """
    end, close, open_call, close_call = (
        _markup_id(tokenizer, text)
        for text in ("<|endofturn|>", "</think>", "<tool_call>", "</tool_call>")
    )
    tokens = list(tokens)
    if end in tokens:
        tokens = tokens[: tokens.index(end)]
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    if enable_thinking:
        cut = tokens.index(close) if close in tokens else len(tokens)
        message["reasoning_content"] = _decode(tokenizer, tokens[:cut]).strip()
        tokens = tokens[cut + 1 :]
    calls = []
    content: list[int] = []
    while tokens:
        if tokens[0] == open_call and close_call in tokens:
            cut = tokens.index(close_call)
            if call := _tool_call(_decode(tokenizer, tokens[1:cut])):
                calls.append(call)
            else:
                content += tokens[: cut + 1]
            tokens = tokens[cut + 1 :]
        else:
            content.append(tokens.pop(0))
    message["content"] = _decode(tokenizer, content).strip()
    if calls:
        message["tool_calls"] = calls
    return message


def _pieces(
    messages: Sequence[Message],
    tools: Sequence[Mapping] | None,
    add_generation_prompt: bool,
    thinking: bool,
) -> Iterator[tuple[str, bool, bool]]:
    """Yield (text, is it markup, is it produced by the model) in order."""
    slots: list[str] = []
    skeleton = _template().render(
        messages=messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=thinking,
        slots=slots,
    )
    generated, position = False, 0
    for match in _PIECE.finditer(skeleton):
        if match.start() > position:
            yield skeleton[position : match.start()], False, generated
        position = match.end()
        found = match.group()
        if found[0] == _SLOT:
            yield slots[int(found[1:-1])], False, generated
        elif found in (_OPEN, _CLOSE):
            generated = found == _OPEN
        else:
            yield found, True, generated
    if position < len(skeleton):
        yield skeleton[position:], False, generated


class _Generation(ext.Extension):
    """``{% generation %} ... {% endgeneration %}``: brackets its body with the mask characters."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_bracket"), [], [], body).set_lineno(line)

    def _bracket(self, caller) -> str:
        return _OPEN + caller() + _CLOSE


@functools.cache
def _template() -> jinja2.Template:
    @jinja2.pass_context
    def to_slot(context: jinja2.runtime.Context, value: Any) -> str:
        context["slots"].append(str(value))
        return f"{_SLOT}{len(context['slots']) - 1}{_SLOT}"

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation], finalize=to_slot
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(CHAT_TEMPLATE)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _markup_id(tokenizer: Tokenizer, text: str) -> int:
    token = tokenizer.token_to_id(text)
    if token is None:
        raise ValueError(f"the tokenizer has no token {text!r}; train it with kexa.tokenizer")
    return token


def _encode_plain(tokenizer: Tokenizer, text: str) -> list[int]:
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = (
        True  # special tokens in the text are split like any other text
    )
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = before


def _decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=False)


def _tool_call(text: str) -> dict[str, Any] | None:
    try:
        call = json.loads(text)
    except json.JSONDecodeError:
        return None
    if (
        isinstance(call, dict)
        and isinstance(call.get("name"), str)
        and isinstance(call.get("arguments"), dict)
    ):
        return {"name": call["name"], "arguments": call["arguments"]}
    return None
