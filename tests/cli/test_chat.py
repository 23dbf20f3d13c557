"""The chat: how answers come apart, what commands do, and the terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import sys
import time
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from tael import load_model, load_tokenizer
from tael.chat import COMMANDS, Conversation, Piece, Screen, command, printable
from tael.chat.reply import Reply, duration, money
from tael.chat.screen import Wrap
from tael.chat.session import history_file
from tael.chat.session import joined as joined_lines
from tael.engine import Engine, SamplingParams, TokenEvent
from tael.errors import TaelError


class Scripted(Engine):
    """An engine that says given tokens."""

    def __init__(self, model, tokenizer, tokens):
        super().__init__(model, tokenizer)
        self.tokens, self.prompts = tokens, []

    def stream(self, prompt, params=None, **options):
        self.prompts.append(list(prompt))
        for i, token in enumerate(self.tokens):
            reason = "stop" if i == len(self.tokens) - 1 else None
            yield TokenEvent(token, self.tokenizer.decode([token]), 0.0, reason)


@pytest.fixture(scope="module")
def parts(model):
    return load_model(model), load_tokenizer(model)


@pytest.fixture
def talk_of(parts):
    def make(*said: str, **options) -> Conversation:
        tokenizer = parts[1]
        tokens = [i for part in said for i in tokenizer.encode_with_special(part)]
        engine = Scripted(*parts, tokens)
        return Conversation(engine, tokenizer, SamplingParams(32), **options)

    return make


def joined(pieces, kind: str) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


EOS = "<｜end▁of▁sentence｜>"


def test_a_thinking_answer_comes_apart(talk_of):
    talk = talk_of("<think>", "1+1=2", "</think>", "It is 2.", EOS)
    pieces = list(talk.ask("1+1=?"))
    assert joined(pieces, "thought") == "1+1=2" and joined(pieces, "answer") == "It is 2."
    assert pieces.count(Piece("folded")) == 1
    assert talk.reply.thought_tokens == 1 + len(talk.tokenizer.encode("1+1=2"))
    assert [m.role for m in talk.messages] == ["user", "assistant"]
    assert (talk.messages[1].content, talk.messages[1].reasoning) == ("It is 2.", "1+1=2")


@pytest.mark.parametrize(
    ("mode", "said"),
    [("free", ("</think>", "Yes.")), ("direct", ("Yes.",)), ("think", ("hm", "</think>", "Yes."))],
)
def test_every_mode(talk_of, mode, said):
    talk = talk_of(*said, EOS, mode=mode)
    pieces = list(talk.ask("Well?"))
    assert joined(pieces, "answer") == "Yes."
    assert joined(pieces, "thought") == ("hm" if mode == "think" else "")
    last = talk.engine.prompts[0][-1]
    assert last == {"free": talk.tokenizer.assistant_id, "think": talk.tokenizer.think_id}.get(
        mode, talk.tokenizer.end_think_id
    )


def test_the_history_goes_into_the_next_prompt_and_reset_empties_it(talk_of):
    talk = talk_of("</think>", "Fine.", EOS, system="Be kind.")
    list(talk.ask("How are you?"))
    list(talk.ask("And now?"))
    prompt = talk.tokenizer.decode(talk.engine.prompts[1])
    assert all(part in prompt for part in ("Be kind.", "How are you?", "Fine.", "And now?"))
    assert talk.params.seed == 2
    command(talk, "/reset")
    list(talk.ask("Who?"))
    assert "How are you?" not in talk.tokenizer.decode(talk.engine.prompts[2])


def test_an_answer_broken_off_stays_a_question_and_what_was_said(talk_of):
    talk = talk_of("</think>", "One two three", EOS)
    pieces = talk.ask("Count")
    next(pieces)
    pieces.close()
    assert [m.role for m in talk.messages] == ["user", "assistant"]


def test_a_full_context_forgets_the_oldest_and_says_so(talk_of):
    talk = talk_of("</think>", "ok", EOS)
    for number in range(8):
        list(talk.ask(f"{number} " * 15))
    assert talk.forgotten > 0 and talk.forgotten % 2 == 0
    assert all(len(p) + talk.params.max_tokens <= 160 for p in talk.engine.prompts)
    with pytest.raises(TaelError, match="does not fit the model's context of 160"):
        list(talk.ask("x y z " * 200))
    assert talk.messages[-1].role == "assistant"


def test_commands(talk_of):
    talk = talk_of("ok", EOS)
    assert "/temperature" in command(talk, "/help")
    command(talk, "/think off")
    command(talk, "/temperature 0.25")
    command(talk, "/system You are brief.")
    assert (talk.mode, talk.params.temperature, talk.system) == ("direct", 0.25, "You are brief.")
    for wrong in ("/think maybe", "/temperature warm", "/temperature -1", "/rest"):
        with pytest.raises(TaelError):
            command(talk, wrong)
    with pytest.raises(TaelError, match="did you mean '/reset'"):
        command(talk, "/rest")


def test_what_a_model_says_cannot_steer_the_terminal(talk_of):
    assert printable("a\x1b[2Jb\x07\x9bc\nd\te") == "a[2Jbc\nd\te"
    talk = talk_of("</think>", "red \x1b[31m [bold]text[/bold]", EOS)
    out = Console(file=io.StringIO(), force_terminal=True, width=60)
    Screen(out, out).show(talk, talk.ask("?"))
    assert "red [31m [bold]text[/bold]" in out.file.getvalue()


def test_thoughts_are_shown_and_folded_in_a_terminal_only(talk_of):
    for terminal in (True, False):
        talk = talk_of("<think>", "deep thought", "</think>", "42", EOS)
        out = Console(file=io.StringIO(), force_terminal=terminal, width=60)
        notes = Console(file=io.StringIO())
        Screen(out, notes).show(talk, talk.ask("?"))
        assert ("deep thought" in out.file.getvalue()) is terminal
        assert "thought for " in notes.file.getvalue() and " tok/s" in notes.file.getvalue()
        assert out.file.getvalue().endswith("42\n")


def test_lines_through_a_pipe(call, model):
    result = call("chat", model, "--max-tokens", "4", text="hello\n\n/think on\n/help\nagain\n/exit\nnever\n")
    assert result.exit_code == 0
    assert result.stderr.count("tok/s") == 2 and "thinking: on" in result.stderr and "/system TEXT" in result.stderr
    assert call("chat", model, "--max-tokens", "4", text="").exit_code == 0


def test_a_wrong_command_through_a_pipe_ends_it(call, fails, model):
    assert "did you mean '/think'" in fails("chat", model, text="/thinking on\nhello\n")
    assert "/think takes" in fails("chat", model, "--think", "maybe", text="")


def _session(model, lines: list[str], cache, *options: str) -> tuple[int, str]:
    """`tael chat` in a pseudo-terminal, one line typed at every prompt; its exit status and screen."""
    pid, screen = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "COLUMNS": "80", "TAEL_CACHE": str(cache)}
        command = [sys.executable, "-m", "tael", "chat", str(model), "--max-tokens", "6", *options]
        os.execv(sys.executable, command)
    shown, typed, deadline = b"", 0, time.monotonic() + 90
    while time.monotonic() < deadline:
        if select.select([screen], [], [], 0.2)[0]:
            try:
                part = os.read(screen, 65536)
            except OSError:
                break
            if not part:
                break
            shown += part
        elif shown.endswith((b"> ", "… ".encode())) and typed < len(lines):
            os.write(screen, lines[typed].encode())
            typed += 1
    os.close(screen)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, shown.decode(errors="replace")


@pytest.mark.parametrize("leave", ["/exit\n", "\x04", "\x03"])
def test_in_a_terminal(model, leave, tmp_path):
    status, shown = _session(model, ["/temperature 0.5\n", "/wrong\n", "hello\n", leave], tmp_path)
    assert status == 0, shown
    assert "/help lists the commands" in shown and "temperature: 0.5" in shown
    assert "unknown command /wrong" in shown and "tok/s" in shown and "Traceback" not in shown


def test_seeds_move_on(talk_of):
    talk = talk_of("a", EOS)
    talk.params = replace(talk.params, seed=5)
    list(talk.ask("?"))
    assert talk.params.seed == 6


# ------------------------------------------------------- figures, files, commands


def test_the_line_about_an_answer():
    reply = Reply(tokens=11, seconds=2.5, first=0.5, prompt=40, cached=32, drafted=8, accepted=6, ending="length")
    assert reply.line(0.08) == (
        "11 tokens, 5.00 tok/s, first after 0.50 s, 32 of 40 prompt tokens cached, 6 of 8 drafts kept, $0.000056; "
        "cut off by the token limit"
    )
    assert Reply().line(0.08) == "0 tokens, $0.00"
    assert [money(x) for x in (0, 2.1e-6, 0.0432, 0.5, 1.4, 1234.5)] == (
        ["$0.00", "$0.0000021", "$0.043", "$0.50", "$1.40", "$1,234.50"]
    )
    assert [duration(x) for x in (0.123, 7.34, 48.2, 185)] == ["0.12 s", "7.3 s", "48 s", "3 min 5 s"]


def test_figures_come_from_the_engine(parts):
    engine, tokenizer = Engine(*parts, cache_tokens=160), parts[1]
    talk = Conversation(engine, tokenizer, SamplingParams(8, stop_ids=tokenizer.stop_ids), context=150)
    list(talk.ask("What is 12+30-4? It is 38, says the quick brown fox."))
    assert talk.reply.cached == 0 and talk.reply.tokens >= 1 and talk.reply.first <= talk.reply.seconds
    list(talk.ask("And now?"))
    assert talk.reply.cached >= 16 and "prompt tokens cached" in talk.reply.line(0.08)
    stats = command(talk, "/stats")
    assert stats.startswith("2 answers") and "from the cache" in stats and "of 150 tokens" in stats


def test_thoughts_that_never_end_are_told(talk_of):
    for terminal in (True, False):
        talk = talk_of("hm, let me see", mode="think")
        out = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        notes = Console(file=io.StringIO(), width=200)
        Screen(out, notes).show(talk, talk.ask("?"))
        assert "never came to an answer; /budget N" in notes.file.getvalue()
        assert talk.messages[-1].reasoning == "hm, let me see" and talk.messages[-1].content == ""


def test_an_answer_ended_by_a_stop_string_is_kept_as_shown(parts):
    engine, tokenizer = Engine(*parts), parts[1]
    talk = Conversation(engine, tokenizer, SamplingParams(40, seed=3), mode="direct")
    whole = "".join(p.text for p in talk.ask("?"))
    stop = whole[5:7]
    talk = Conversation(engine, tokenizer, SamplingParams(40, seed=3, stop=(stop,)), mode="direct")
    shown = "".join(p.text for p in talk.ask("?"))
    assert stop not in shown and whole.startswith(shown) and talk.messages[-1].content == shown


def test_commands_that_set(talk_of):
    talk = talk_of("ok", EOS)
    for line in ("/budget 50", "/seed 9", "/json on"):
        command(talk, line)
    assert (talk.params.thinking_budget, talk.params.seed, talk.params.constraint.kind) == (50, 9, "json_object")
    command(talk, "/budget off")
    command(talk, "/json off")
    assert talk.params.thinking_budget is None and talk.params.constraint is None
    for wrong in ("/budget many", "/budget -1", "/seed x", "/json maybe", "/save", "/load", "/undo", "/retry now"):
        with pytest.raises(TaelError):
            command(talk, wrong)
    assert all(name.split()[0] in command(talk, "/help") for name in COMMANDS)


def test_undo_and_retry(talk_of):
    talk = talk_of("</think>", "Fine.", EOS)
    list(talk.ask("How are you?"))
    list(talk.ask("And now?"))
    assert command(talk, "/undo") == "took back: And now?"
    assert [m.content for m in talk.messages] == ["How are you?", "Fine."]
    assert talk.undo() == "How are you?" and not talk.messages


def test_save_and_load(talk_of, tmp_path):
    talk = talk_of("<think>", "1+1=2", "</think>", "It is 2.", EOS, system="Be kind.")
    list(talk.ask("1+1=?"))
    file = tmp_path / "talk.json"
    assert "1 question and answer" in command(talk, f"/save {file}")
    other = talk_of("ok", EOS)
    assert "the last question was: 1+1=?" in command(other, f"/load {file}")
    assert other.messages == talk.messages and other.system == "Be kind." and other.mode == "free"
    for wrong in ("[]", "{", '{"system": "", "messages": [{"role": "user", "content": "x"}]}', "[" * 100_000):
        file.write_text(wrong)
        with pytest.raises(TaelError, match="is no conversation that /save wrote"):
            command(other, f"/load {file}")
    assert other.messages == talk.messages
    with pytest.raises(TaelError, match="No such file"):
        command(other, f"/load {tmp_path / 'none.json'}")
    with pytest.raises(TaelError, match="No such file"):
        command(other, f"/save {tmp_path / 'no/where.json'}")


def test_a_backslash_goes_on_in_the_next_line():
    assert list(joined_lines(["one\\\n", "two\n", " three \n", "four\\\n"])) == ["one\ntwo", "three", "four"]


def test_retry_through_a_pipe(call, model):
    result = call("chat", model, "--max-tokens", "4", text="hello\n/retry\n/undo\n/stats\n")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("tok/s") == 3 and "took back: hello" in result.stderr and "2 answers" in result.stderr


def test_typed_lines_are_kept_for_the_next_talk(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TAEL_CACHE", str(tmp_path))
    status, shown = _session(model, ["first\\\n", "line\n", "/exit\n"], tmp_path)
    assert status == 0, shown
    assert history_file().read_text().split() == ["first\\", "line", "/exit"]
    assert history_file().stat().st_mode & 0o077 == 0
    status, shown = _session(model, ["\x1b[A\x1b[A\n", "/exit\n"], tmp_path)
    assert status == 0 and shown.count("line") >= 1, shown


def _seen(written: str, width: int) -> list[str]:
    """What a terminal shows for `written`, which may take letters back."""
    lines, at = [""], 0
    while at < len(written):
        if back := re.match(r"\x1b\[(\d+)D\x1b\[K", written[at:]):
            lines[-1] = lines[-1][: -int(back[1])]
            at += back.end()
            continue
        lines = [*lines, ""] if written[at] == "\n" else [*lines[:-1], lines[-1] + written[at]]
        at += 1
    assert all(cell_len(line) < width for line in lines)
    return lines


def test_lines_break_between_words():
    text = "The quick brown fox jumps over the lazy dog.\n\n  1.\tIndented, and Donaudampfschifffahrtsgesellschaft "
    text += "漢字とかな、漢字abcとかなabcdef漢字"
    for width in (12, 20, 31):
        for size in (1, 3, 100):
            wrap = Wrap(Console(file=io.StringIO(), force_terminal=True, width=width))
            shown = _seen("".join(wrap(text[i : i + size]) for i in range(0, len(text), size)), width)
            assert "".join("".join(shown).split()) == "".join(text.split())
            assert {"quick", "brown", "jumps", "lazy"} <= set(" ".join(shown).split())
