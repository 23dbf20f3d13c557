"""A model's Markdown as HTML that cannot do harm, all at once or as it comes.

What a model writes is a stranger's text: no HTML of its own gets through, no picture is fetched (its place shows the
address), links are http(s) or mailto and open elsewhere, without the page's address. Everything is rendered here;
the browser asks no other host for anything.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

from tael.serve.pages.mathematics import add_mathematics

MAX_COLOURED = 20_000
"""Characters of code that are coloured; longer code is shown plain, for colouring takes time."""
_LANGUAGES = {
    "python": "python", "py": "python", "python3": "python", "pycon": "pycon", "bash": "bash", "sh": "bash",
    "shell": "bash", "zsh": "bash", "console": "console", "c": "c", "h": "c", "cpp": "cpp", "c++": "cpp",
    "cuda": "cuda", "java": "java", "kotlin": "kotlin", "javascript": "javascript", "js": "javascript",
    "jsx": "javascript", "typescript": "typescript", "ts": "typescript", "tsx": "typescript", "rust": "rust",
    "rs": "rust", "go": "go", "ruby": "ruby", "rb": "ruby", "php": "php", "swift": "swift", "lua": "lua", "r": "r",
    "julia": "julia", "haskell": "haskell", "sql": "sql", "json": "json", "yaml": "yaml", "yml": "yaml",
    "toml": "toml", "ini": "ini", "html": "html", "xml": "xml", "css": "css", "diff": "diff", "makefile": "make",
    "dockerfile": "docker", "tex": "latex", "latex": "latex", "csharp": "csharp", "cs": "csharp",
}  # fmt: skip


def render(text: str) -> str:
    """The whole of `text` as HTML."""
    return "".join(blocks(text))


def blocks(text: str) -> list[str]:
    """`text` as HTML, one string for each block (paragraph, list, piece of code ..)."""
    return [_html(group) for group in _groups(_parser().parse(_one_end(text)))]


class Growing:
    """Text that grows at its end, rendered block by block: only what may still change is rendered again."""

    def __init__(self) -> None:
        self._done = 0  # characters whose blocks are final
        self._final = 0  # and how many blocks these are

    def extend(self, text: str) -> tuple[int, list[str]]:
        """`text` has grown to this: from which block on the page changes, and the blocks from there."""
        tail = _one_end(text)[self._done :]
        groups = _groups(_parser().parse(tail))
        first, last = self._final, _last_begun(groups, tail)
        if last > 0:
            self._done += sum(len(line) + 1 for line in tail.split("\n")[: _line(groups[last])])
            self._final += last
        return first, [_html(group) for group in groups]


def _last_begun(groups: list[list[Token]], tail: str) -> int:
    """The last block whose first line is whole: the blocks before it can change no more."""
    whole = tail.count("\n")
    for place in range(len(groups) - 1, 0, -1):
        if _line(groups[place]) < whole:
            return place
    return 0


def _line(group: list[Token]) -> int:
    """Where a block begins."""
    place = group[0].map
    return place[0] if place else 0


def _one_end(text: str) -> str:
    """One way to end a line, as markdown-it counts them."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _groups(tokens: Sequence[Token]) -> list[list[Token]]:
    """Tokens by block at the top level."""
    groups: list[list[Token]] = []
    depth = 0
    for token in tokens:
        if depth == 0:
            groups.append([])
        groups[-1].append(token)
        depth += token.nesting
    return groups


def _html(tokens: list[Token]) -> str:
    parser = _parser()
    return parser.renderer.render(tokens, parser.options, {})


@functools.lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "linkify": False, "breaks": True, "maxNesting": 40})
    parser.enable(["table", "strikethrough"])
    # Definitions of links would change blocks that were sent long ago; models hardly write them.
    parser.disable(["reference", "html_block", "html_inline"])
    parser.validateLink = _safe_link  # type: ignore[method-assign]
    add_mathematics(parser)
    parser.add_render_rule("fence", _code)
    parser.add_render_rule("code_block", _code)
    parser.add_render_rule("image", _image)
    parser.add_render_rule("link_open", _link)
    parser.add_render_rule("table_open", lambda *rest: '<div class="table"><table>\n')
    parser.add_render_rule("table_close", lambda *rest: "</table></div>\n")
    return parser


def _safe_link(url: str) -> bool:
    return url.strip().lower().startswith(("http://", "https://", "mailto:"))


def _link(_: Any, tokens: Sequence[Token], place: int, *rest: Any) -> str:
    address = escapeHtml(str(tokens[place].attrGet("href") or ""))
    return f'<a href="{address}" title="{address}" target="_blank" rel="noopener noreferrer nofollow">'


def _image(_: Any, tokens: Sequence[Token], place: int, *rest: Any) -> str:
    """Fetching a picture would tell another host that, and what, was asked."""
    token = tokens[place]
    words = token.content or "picture"
    return f'<span class="picture" title="{escapeHtml(str(token.attrGet("src") or ""))}">[{escapeHtml(words)}]</span>'


def _code(_: Any, tokens: Sequence[Token], place: int, *rest: Any) -> str:
    token = tokens[place]
    language = token.info.split()[0].lower() if token.info.split() else ""
    name = escapeHtml(language[:30]) or "text"
    return (
        f'<div class="code"><div class="code-head"><span>{name}</span>'
        f'<button type="button" class="quiet" data-copy aria-label="Copy this {name} code">Copy</button></div>'
        f'<pre tabindex="0"><code>{_coloured(token.content, language)}</code></pre></div>\n'
    )


def _coloured(code: str, language: str) -> str:
    lexer = _LANGUAGES.get(language)
    if lexer is None or len(code) > MAX_COLOURED:
        return escapeHtml(code)
    return highlight(code, get_lexer_by_name(lexer, stripnl=False, ensurenl=False), HtmlFormatter(nowrap=True))
