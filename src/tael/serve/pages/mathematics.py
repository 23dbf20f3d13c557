r"""TeX in text, as MathML, without any request: `$x$`, `\(x\)`, `$$x$$`, `\[x\]`.

latex2mathml reads the TeX; what it makes is written out here, by a list of allowed elements and attributes, because
the TeX comes from a model (its own writer leaves entities unescaped, and `\href` would make links).
"""

from __future__ import annotations

import html
import re
from xml.etree.ElementTree import Element

from latex2mathml.converter import Converter
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

MAX_TEX = 4000
MAX_NESTING = 60
_ELEMENTS = re.compile(
    "math mrow mi mn mo mtext ms mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mmultiscripts "
    "mprescripts none mtable mtr mtd mlabeledtr mstyle mpadded mphantom menclose".replace(" ", "|")
)
_ATTRIBUTES = re.compile(
    "display stretchy fence form accent accentunder mathvariant displaystyle scriptlevel linethickness columnalign "
    "rowspacing columnspacing columnlines rowlines frame lspace rspace width height depth minsize maxsize notation "
    "separator symmetric largeop movablelimits".replace(" ", "|")
)
_VALUE = re.compile(r"[\w .%+-]{0,80}")


def mathml(tex: str, block: bool) -> str:
    """`tex` as safe MathML; as code where it cannot be read."""
    try:
        if len(tex) > MAX_TEX or _nesting(tex) > MAX_NESTING:
            raise ValueError("too long")
        tree = Converter(display="block" if block else "inline").convert_to_element(tex)
        return _written(tree, tex)
    except Exception:  # whatever a stranger's TeX does to the library, its source is shown instead
        return f'<code class="tex">{escapeHtml(tex)}</code>'


def _nesting(tex: str) -> int:
    depth = deepest = 0
    for character in tex:
        depth += (character in "{(") - (character in "})")
        deepest = max(deepest, depth)
    return deepest + tex.count("\\left") + tex.count("\\begin")


def _written(element: Element, tex: str | None = None) -> str:
    text = escapeHtml(html.unescape(element.text or ""))
    inner = text + "".join(_written(child) + escapeHtml(html.unescape(child.tail or "")) for child in element)
    if not _ELEMENTS.fullmatch(element.tag):
        return f"<mrow>{inner}</mrow>"
    kept = {name: html.unescape(value) for name, value in element.attrib.items() if _ATTRIBUTES.fullmatch(name)}
    attributes = "".join(f' {name}="{value}"' for name, value in kept.items() if _VALUE.fullmatch(value))
    if tex is not None:
        attributes += f' aria-label="{escapeHtml(tex)}"'
    return f"<{element.tag}{attributes}>{inner}</{element.tag}>"


def add_mathematics(markdown: MarkdownIt) -> None:
    """Teach a parser the four ways to write TeX."""
    markdown.inline.ruler.before("escape", "mathematics", _inline)
    markdown.block.ruler.before("fence", "mathematics", _block, {"alt": ["paragraph", "blockquote", "list"]})
    markdown.add_render_rule("math_inline", lambda _, tokens, i, *rest: mathml(tokens[i].content, False))
    markdown.add_render_rule("math_block", lambda _, tokens, i, *rest: mathml(tokens[i].content, True) + "\n")


_PAIRS = (("$$", "$$", "math_block"), ("\\[", "\\]", "math_block"), ("\\(", "\\)", "math_inline"))


def _inline(state: StateInline, silent: bool) -> bool:
    for opening, closing, kind in _PAIRS:
        if state.src.startswith(opening, state.pos):
            start = state.pos + 2
            end = state.src.find(closing, start, state.posMax)
            return end > start and _push(state, silent, kind, start, end, 2)
    if state.src[state.pos] != "$":
        return False
    start = state.pos + 1
    end = _closing_dollar(state.src, start, state.posMax)
    return end > start and _push(state, silent, "math_inline", start, end, 1)


def _closing_dollar(text: str, start: int, limit: int) -> int:
    """As pandoc has it, so that prices stay prices: no space inside the dollars, no digit after them."""
    if start >= limit or text[start].isspace():
        return -1
    end = text.find("$", start, limit)
    while end > 0 and text[end - 1] == "\\":
        end = text.find("$", end + 1, limit)
    if end < 0 or text[end - 1].isspace() or "\n\n" in text[start:end]:
        return -1
    return -1 if end + 1 < limit and text[end + 1].isdigit() else end


def _push(state: StateInline, silent: bool, kind: str, start: int, end: int, width: int) -> bool:
    if not silent:
        state.push(kind, "math", 0).content = state.src[start:end]
    state.pos = end + width
    return True


def _block(state: StateBlock, first: int, last: int, silent: bool) -> bool:
    """`$$` or `\\[` at the start of a line, closed at the end of one, with no blank line between."""
    if state.is_code_block(first):
        return False
    begin = state.bMarks[first] + state.tShift[first]
    opening = state.src[begin : begin + 2]
    if opening not in ("$$", "\\["):
        return False
    closing, lines = ("$$" if opening == "$$" else "\\]"), []
    for line in range(first, last):
        start = state.bMarks[line] + state.tShift[line] + (2 if line == first else 0)
        if state.isEmpty(line) or (line > first and state.sCount[line] < state.blkIndent):
            return False
        text = state.src[start : state.eMarks[line]].rstrip()
        if text.endswith(closing) and (line > first or len(text) > 2):
            lines.append(text[:-2])
            if not silent:
                token = state.push("math_block", "math", 0)
                token.block, token.content, token.map = True, "\n".join(lines), [first, line + 1]
            state.line = line + 1
            return True
        if closing in text:
            return False
        lines.append(text)
    return False
