"""What pages make of text: Markdown and TeX as HTML, messages, files in questions, settings, figures."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tael.errors import TaelError
from tael.serve.history import Node
from tael.serve.pages.figures import add_figures, duration, figures_line, money, thought_line
from tael.serve.pages.markdown import Growing, blocks, render
from tael.serve.pages.mathematics import mathml
from tael.serve.pages.turns import calls, question_text, raw_text, turn
from tael.serve.pages.wishes import File, Settings, request_body, split_files, title_of, with_files

TAGS = {
    "p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "em", "strong", "s", "code", "pre", "blockquote",
    "hr", "br", "a", "div", "span", "button", "table", "thead", "tbody", "tr", "th", "td", "math", "mrow", "mi",
    "mn", "mo", "mtext", "ms", "mspace", "mfrac", "msqrt", "mroot", "msub", "msup", "msubsup", "munder", "mover",
    "munderover", "mtable", "mtr", "mtd", "mlabeledtr", "mstyle", "mpadded", "mphantom", "menclose",
    "mmultiscripts", "mprescripts", "none",
}  # fmt: skip


class Finder(HTMLParser):
    """Everything in HTML that is not on the list."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        if tag not in TAGS:
            self.found.append(tag)
        for name, value in attrs:
            if name.startswith("on") or name in ("src", "style", "srcset", "action", "formaction", "xlink:href"):
                self.found.append(name)
            if name == "href" and not value.startswith(("http://", "https://", "mailto:")):
                self.found.append(value)


def harm(html: str) -> list[str]:
    finder = Finder()
    finder.feed(html)
    return finder.found


PIECES = st.sampled_from(
    [
        "# a", "- b", "1. c", "> d", "```", "```python", "~~~", "$$", "\\[", "\\]", "\\(", "\\)", "$x$",
        "|a|b|", "|-|-|", "---", "===", "    e", "\n", "\n\n", " ", "*f*", "**", "_", "`", "[g](h)", "![i](j)",
        "<b>", "</b>", "&lt;", "\\", "[k]: http://l", "\r\n", "\r", "\t", "text", "$", "$5", "<script>",
        "\x00", "\u2028", "<!--", "😀", "-", "``` `x`",
    ]
)  # fmt: skip
MARKDOWN = st.lists(PIECES, max_size=40).map("".join) | st.text(max_size=80)


@settings(max_examples=400, deadline=None)
@given(MARKDOWN)
@example("<script>alert(1)</script><img src=x onerror=alert(1)>")
@example("[a](javascript:alert(1)) [b](&#106;avascript:x) <javascript:alert(1)> ![c](http://x/y.png)")
@example("```html\n<img src=x onerror=alert(1)>\n```")
@example('[a](http://x/"onmouseover="alert(1))')
def test_no_markdown_makes_harmful_html(text):
    assert harm(render(text)) == []


TEX = st.lists(
    st.sampled_from(
        [
            "\\frac", "{", "}", "x", "^", "_", "\\text", "\\href", "javascript:alert(1)", "<img src=x>", "&lt;",
            "\\\\", "&", "\\begin{matrix}", "\\end{matrix}", "\\left(", "\\right)", "\\sqrt", "\\color{red}", '"',
            "\\style", "\\sum", "\\newcommand", "\\def", "\\unicode", "\\operatorname", "\\hspace{1em}", "\\class",
            "&#x3c;script",
        ]
    ),
    max_size=20,
).map("".join)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(TEX | st.text(max_size=40), st.booleans())
def test_no_tex_makes_harmful_html(tex, block):
    assert harm(mathml(tex, block)) == []


@settings(max_examples=400, deadline=None)
@given(MARKDOWN, st.lists(st.integers(1, 9), min_size=1, max_size=30))
@example("para\n``` `x`\nmore", [6, 3, 9])
@example("a\r\n\r\nb\r\rc", [1])
@example("- a\n\n\n- b\n\npara\n- c", [2])
def test_text_that_grows_ends_as_it_would_have_begun(text, steps):
    growing, shown, end, place = Growing(), [], 0, 0
    while end < len(text):
        end += steps[place % len(steps)]
        place += 1
        first, changed = growing.extend(text[:end])
        shown[first:] = changed
    assert shown == blocks(text)


def test_only_the_end_of_a_growing_text_is_rendered_again():
    growing = Growing()
    text = "".join(f"Paragraph {i}.\n\n" for i in range(100))
    growing.extend(text)
    first, changed = growing.extend(text + "More")
    assert (first, len(changed)) == (99, 2)


def test_a_hundred_levels_of_quotes_or_braces_are_survived():
    assert render("> " * 5000 + "x")
    assert mathml("{" * 3000 + "}" * 3000, False).startswith("<code")
    assert render("[" * 20_000)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("$x^2$", "<msup>"),
        ("\\(x^2\\)", "<msup>"),
        ("$$x^2$$", 'display="block"'),
        ("\\[\nx^2\n\\]", 'display="block"'),
        ("costs $5 and $6", "<p>costs $5 and $6</p>"),
        ("`$x$`", "<code>$x$</code>"),
        ("\\$x\\$", "<p>$x$</p>"),
        ("$\\frac$", '<code class="tex">'),
        ("~~a~~", "<s>a</s>"),
        ("one\ntwo", "one<br />"),
        ("|a|\n|-|\n|b|", "<td>b</td>"),
        ("```python\ndef f(): pass\n```", '<span class="k">def</span>'),
        ("```nonsense\n<b>\n```", "&lt;b&gt;"),
        ("![cat](http://x/y.png)", '<span class="picture" title="http://x/y.png">[cat]</span>'),
    ],
)
def test_markdown(text, wanted):
    assert wanted in render(text)


# --------------------------------------------------------------------- messages


HOSTILE = "<img src=x onerror=alert(1)>\"'"


def test_messages_are_escaped():
    call = {"id": "1", "function": {"name": HOSTILE, "arguments": HOSTILE}}
    tool = Node(3, 1, 2, "tool", HOSTILE, tool_calls=[{"id": "1"}])
    node = Node(2, 1, 1, "assistant", HOSTILE, HOSTILE, [call], HOSTILE, state="error", error=HOSTILE)
    whole = turn(node, 1, 2, True, [tool]) + turn(Node(1, 1, None, "user", HOSTILE), 1, 1, False) + raw_text(node)
    assert "<img" not in whole and whole.count("&lt;img") >= 8


def test_calls_that_are_not_whole_have_no_field_for_a_result():
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a"'}}
    assert "textarea" in calls([call], []) and "textarea" not in calls([call], [], whole=False)


# ------------------------------------------------------------------------ files


NAMES = st.text(min_size=1, max_size=20).map(lambda name: " ".join(name.split())).filter(bool)
FILES = st.lists(st.builds(File, NAMES, st.text(max_size=60)), max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), FILES)
@example("q", [File("a", "```\n````\n"), File("b", "\n\nFile c:\n\n```\nx\n```")])
def test_files_in_a_question_are_found_again(question, files):
    try:
        joined = with_files(question, files)
    except TaelError:
        return
    words, found = split_files(joined)
    assert with_files(words, found) == joined
    if "File " not in question and all(file.name.isprintable() for file in files):
        assert (words, found) == (question, files)


@pytest.mark.parametrize(
    "file, line",
    [
        (File("a", "x" * 200_001), "larger than"),
        (File("b", "a\0b"), "not a text file"),
        (File("c", "\ufffd" * 10), "not a text file"),
    ],
)
def test_files_that_are_no_text_or_too_large_are_refused(file, line):
    with pytest.raises(TaelError, match=line):
        with_files("q", [file])


def test_a_question_made_of_many_headings_of_files_takes_no_time():
    assert split_files("\n\nFile x:\n\n```\n" * 20_000)[1] == []


def test_titles_are_short():
    assert title_of("one\ntwo") == "one two" and len(title_of("word " * 100)) <= 60
    assert title_of(with_files("", [File("a", "b")])) == "Files"
    assert "b" in question_text(with_files("", [File("a", "b")]))


# --------------------------------------------------------------------- settings


def test_a_request_is_made_of_the_branch_and_the_settings():
    path = [
        Node(1, 1, None, "user", "q"),
        Node(2, 1, 1, "assistant", "", "why", [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]),
        Node(3, 1, 2, "tool", "r", tool_calls=[{"id": "c"}]),
        Node(4, 1, 3, "assistant", "old", "forgotten"),
        Node(5, 1, 4, "user", "and?"),
    ]
    body = request_body("m", True, " ", Settings(thinking="disabled", effort="high", temperature=0.5), path)
    assert body == {
        "model": "m",
        "messages": [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}],
                "reasoning_content": "why",
            },
            {"role": "tool", "tool_call_id": "c", "content": "r"},
            {"role": "assistant", "content": "old"},
            {"role": "user", "content": "and?"},
        ],
        "temperature": 0.5,
        "thinking": {"type": "disabled"},
    }
    going_on = request_body("m", None, "s", Settings(effort="low", budget=5), path[:4])
    assert going_on["messages"][0] == {"role": "system", "content": "s"}
    assert going_on["messages"][-1] == {
        "role": "assistant",
        "content": "old",
        "prefix": True,
        "reasoning_content": "forgotten",
    }
    assert going_on["thinking"] == {"type": "auto", "budget_tokens": 5} and going_on["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    "form, line",
    [
        ({"temperature": "9"}, "temperature"),
        ({"temperature": "nan"}, "temperature"),
        ({"max_tokens": "1.5"}, "max tokens"),
        ({"thinking": "perhaps"}, "thinking"),
        ({"tools": "x"}, "tools: not JSON"),
        ({"tools": "[1]"}, "tools: a list like"),
        ({"tools": "[" * 100_000}, "tools: not JSON"),
        ({"stop": "\n".join("abcdefghijklmnopqrst")}, "stop"),
    ],
)
def test_settings_that_make_no_sense_name_their_field(form, line):
    with pytest.raises(TaelError, match=line):
        Settings.of_form(form)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*Settings.model_fields, "else"]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.lists(st.integers(), max_size=2),
    )
)
def test_kept_settings_are_read_whatever_they_hold(kept):
    read = Settings.read(kept)
    assert Settings.read(read.model_dump()) == read


def test_of_kept_settings_only_what_makes_no_sense_is_dropped():
    assert Settings.read({"temperature": 0.5, "top_p": 7}) == Settings(temperature=0.5)


# ---------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    "dollars, words",
    [(0, "$0"), (1.2, "$1.20"), (0.1, "$0.10"), (0.0123, "$0.012"), (0.0000123, "$0.000012"), (1234.5, "$1,234.50")],
)
def test_money_has_two_digits_that_say_something(dollars, words):
    assert money(dollars) == words


@given(st.floats(0, 1e6))
def test_money_is_never_far_off(dollars):
    shown = money(dollars)
    if not shown.startswith("under"):
        assert abs(float(shown[1:].replace(",", "")) - dollars) <= 0.05 * dollars + 1e-12


def test_durations_and_lines():
    assert [duration(s) for s in (0.0492, 0.44, 9.96, 12.3, 185)] == ["49 ms", "0.4 s", "10.0 s", "12 s", "3 min 5 s"]
    assert thought_line(3.21, 1234) == "Thought for 3.2 s · 1,234 tokens"
    assert figures_line({"completion_tokens": 5, "estimated": True}) == ["about 5 tokens"]
    assert add_figures({"estimated": True, "completion_tokens": 1}, {"completion_tokens": 2})["estimated"]
