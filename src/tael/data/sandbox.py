"""A jinja2 sandbox for chat templates, which come with models and are strangers' programs.

jinja2's ImmutableSandboxedEnvironment keeps them from Python's internals. On top: loops and calls are counted,
strings and lists are measured before an operation makes them grow, and filters that only pad or fill are gone. So a
template renders, or is refused; it does not fill the memory. Helpers and settings are those of transformers'
`apply_chat_template`, so that the templates written for it render alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from tael.errors import TaelError

LONGEST_TEMPLATE = 256 * 1024
"""Characters; the longest known today (tool use) have some ten thousand."""
LARGEST = 1024 * 1024
"""Characters or items of any one value, the rendered text included; messages' texts are not in it, see `template`."""
MOST_STEPS = 200_000
_LARGEST_NUMBER = 10_000
_REMOVED_FILTERS = (
    "batch",
    "center",
    "filesizeformat",
    "format",
    "pprint",
    "random",
    "slice",
    "urlize",
    "wordwrap",
    "xmlattr",
)
_REMOVED_GLOBALS = ("cycler", "lipsum")
_WIDE = re.compile(r"\d{4}|\*|:[^}]*\{")
"""In a format: a width of four digits, or one that comes from elsewhere."""

_steps: ContextVar[list[int]] = ContextVar("steps")


class _RefusedError(Exception):
    """The template asks for more than it may have."""


def render(template: str, variables: dict[str, Any]) -> str:
    """`template` rendered with `variables`: plain strings, numbers, lists and dicts.

    Raises TaelError, naming the line where it is known, when the template is wrong, refuses the conversation
    (`raise_exception`), or takes more than it may.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise TaelError(f"the model's chat template is longer than {LONGEST_TEMPLATE} characters; it is not run")
    token = _steps.set([MOST_STEPS])
    try:
        pieces, size = [], 0
        for piece in _compiled(template).generate(**variables):
            size += len(piece)
            if size > LARGEST:
                raise _RefusedError(f"writes more than {LARGEST} characters")
            pieces.append(piece)
        return "".join(pieces)
    except jinja2.TemplateSyntaxError as error:
        raise TaelError(
            f"the model's chat template is wrong in line {error.lineno}: {_short(error.message)}"
        ) from None
    except _Raised as error:
        raise TaelError(f"the model's chat template refuses this conversation: {_short(str(error))}") from None
    except (
        jinja2.TemplateError,
        _RefusedError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise TaelError(f"the model's chat template cannot be rendered: {_short(str(error))}") from None
    except (RecursionError, MemoryError, OverflowError, NotImplementedError):
        raise TaelError("the model's chat template cannot be rendered: it goes too deep") from None
    finally:
        _steps.reset(token)


def _short(message: str | None) -> str:
    return " ".join((message or "no reason given").split())[:200]


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _Environment().from_string(template)


# ------------------------------------------------------------------- measuring


def _spend(count: int = 1) -> None:
    left = _steps.get()
    left[0] -= count
    if left[0] < 0:
        raise _RefusedError(f"takes more than {MOST_STEPS} steps")


def _fits(size: int) -> None:
    if size > LARGEST:
        raise _RefusedError(f"makes a value of more than {LARGEST} characters")


def _measure(value: Any) -> int:
    """About how long `value` is as text; stops where it is too long. A list may hold another many times over."""
    size, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
        size += 1
        _fits(size + len(waiting))
    return size


def _checked(value: Any) -> Any:
    """`value` as it is to be written out."""
    if not isinstance(value, str):
        _measure(value)
    return value


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spend()
        yield value


def _joined_parts(parts: list[Any]) -> str:
    _measure(parts)
    return "".join(map(str, parts))


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _fits(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _join(value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        raise _RefusedError("uses join with an attribute")
    parts = [str(_checked(part)) for part in _counted(value)]
    _fits(sum(map(len, parts)) + len(str(d)) * len(parts))
    return str(d).join(parts)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    space = width if isinstance(width, str) else " " * min(int(width), 100)
    lines = str(text).splitlines(keepends=True)
    _fits(len(text) + len(space) * len(lines))
    return "".join((space if (i or first) and (blank or line.strip()) else "") + line for i, line in enumerate(lines))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    _measure(value)
    indent = None if indent is None else min(int(indent), 16)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# ----------------------------------------------------------------- environment


class _Raised(jinja2.TemplateError):
    """What a template says with raise_exception."""


def _raise_exception(message: str) -> None:
    raise _Raised(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 100 or _WIDE.search(form):
        raise _RefusedError("asks for a date in too many characters")
    return datetime.now().strftime(form)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's, without names that begin with an underscore."""

    def __init__(self, /, *args: Any, **values: Any) -> None:
        table = dict(*args, **values)
        for name in table:
            _check_name(name)
        super().__init__(table)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)  # a function: a namespace answers every attribute itself
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise _RefusedError(f"sets '{str(name)[:40]}' on a namespace")


def _dict(*args: Any, **values: Any) -> dict[Any, Any]:
    return dict(*args, **values)


class _Generation(Extension):
    """`{% generation %}..{% endgeneration %}` marks what a model is trained on: for rendering, its content."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own interface

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Counting(NodeTransformer):
    """Loops go through `_counted`, joins by ~ through `_joined_parts`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "joined_parts", [], [], None, None, lineno=node.lineno)


def _check_product(operator: str, left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            _fits(len(value) * max(times, 0))
    numbers = [abs(side) for side in (left, right) if isinstance(side, int | float)]
    if any(number > _LARGEST_NUMBER**3 for number in numbers) or (operator == "**" and numbers and max(numbers) > 64):
        raise _RefusedError("multiplies numbers that are too large")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_checked
        )
        for name in _REMOVED_FILTERS:
            self.filters.pop(name, None)
        for name in _REMOVED_GLOBALS:
            self.globals.pop(name, None)
        own: dict[str, Callable[..., Any]] = {
            "counted": _counted,
            "indent": _indent,
            "join": _join,
            "joined_parts": _joined_parts,
            "replace": _replace,
            "string": lambda value: str(_checked(value)),
            "tojson": _to_json,
        }
        self.filters.update(own)
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace, dict=_dict
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counting().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _spend()
        sizes = [len(side) if isinstance(side, str | list | tuple) else None for side in (left, right)]
        if operator == "+" and None not in sizes:
            _fits(sum(size or 0 for size in sizes))
        elif operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise _RefusedError("formats a value in too many characters")
        elif operator in ("*", "**"):
            _check_product(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        form = getattr(value, "__self__", None)
        if (
            isinstance(form, str)
            and getattr(value, "__name__", "") in ("format", "format_map")
            and _WIDE.search(form)
        ):
            raise _RefusedError("formats a value in too many characters")
        return super().wrap_str_format(value)

    def call(__self, __context: Any, __obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _spend()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if name == "replace" and len(args) >= 2:
                return _replace(owner, *args[:3])
            if name == "join" and len(args) == 1:
                return _join(args[0], owner)
            if any(isinstance(a, int) and a > _LARGEST_NUMBER for a in args) and name not in ("split", "rsplit"):
                raise _RefusedError(f"calls {name} with a number that is too large")
        return super().call(__context, __obj, *args, **kwargs)
