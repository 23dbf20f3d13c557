from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tael.data import SOURCES, Document, Message, conversations, documents, fetch, split
from tael.data.fetch import Package, fetch_package, sha256_of
from tael.data.files import split_long_text
from tael.errors import TaelError
from tael.recipe import DataSettings

NAME = "tael-test-words"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAEL_CACHE", str(tmp_path / "cache"))


def _package(archive: Path, **changes: str) -> Package:
    values = {"name": NAME, "version": "1.0", "sha256": sha256_of(archive), "members": ("words/*.txt",)} | changes
    return Package(**values)  # type: ignore[arg-type]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index and holds one small wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / f"{NAME.replace('-', '_')}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("words/a.txt", "one")
        wheel.writestr("words/../../b.txt", "two")
        wheel.writestr("words/code.py", "raise SystemExit")
        info = f"{NAME.replace('-', '_')}-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def _wheel(index: Path) -> Path:
    return next(index.glob("*.whl"))


def test_fetch_keeps_only_the_named_members(index: Path) -> None:
    said: list[str] = []
    folder = fetch_package(_package(_wheel(index)), said.append)
    assert sorted(p.name for p in folder.iterdir()) == ["a.txt", "b.txt", "manifest.json"]
    assert (folder / "a.txt").read_text() == "one"
    assert said == [f"fetching {NAME}==1.0"]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_the_cache_is_used_and_a_damaged_one_fetched_again(index: Path) -> None:
    package = _package(_wheel(index))
    folder = fetch_package(package)
    wheel = _wheel(index).rename(index / "away")
    assert fetch_package(package) == folder
    (folder / "a.txt").write_text("0ne")
    with pytest.raises(TaelError, match="cannot be fetched"):
        fetch_package(package)
    wheel.rename(index / f"{NAME.replace('-', '_')}-1.0-py3-none-any.whl")
    for damage in ("changed", "missing", "manifest"):
        said: list[str] = []
        if damage == "missing":
            (folder / "a.txt").unlink()
        elif damage == "manifest":
            (folder / "manifest.json").write_text("{")
        fetch_package(package, said.append)
        assert (folder / "a.txt").read_text() == "one"
        assert "damaged" in said[0]


def test_another_archive_is_not_opened(index: Path, tmp_path: Path) -> None:
    with pytest.raises(TaelError, match="not opened") as caught:
        fetch_package(_package(_wheel(index), sha256="0" * 64))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache/sources").iterdir()) == []


def test_a_source_archive_of_the_wrong_hash_is_not_run(index: Path, tmp_path: Path) -> None:
    _wheel(index).unlink()
    marker = tmp_path / "ran"
    with tarfile.open(index / f"{NAME}-1.0.tar.gz", "w:gz") as sdist:
        script = f"open({str(marker)!r}, 'w')".encode()
        member = tarfile.TarInfo(f"{NAME}-1.0/setup.py")
        member.size = len(script)
        sdist.addfile(member, io.BytesIO(script))
    package = _package(index / f"{NAME}-1.0.tar.gz", sha256="0" * 64, kind="sdist")
    with pytest.raises(TaelError, match="not opened"):
        fetch_package(package)
    assert not marker.exists()


def test_missing_members_and_packages_are_told_in_a_line(index: Path) -> None:
    with pytest.raises(TaelError, match="none of"):
        fetch_package(_package(_wheel(index), members=("other/*",)))  # type: ignore[arg-type]
    with pytest.raises(TaelError, match="cannot be fetched") as caught:
        fetch_package(_package(_wheel(index), version="2.0"))
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_told(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TAEL_CACHE", str(tmp_path / "file"))
    with pytest.raises(TaelError, match="set TAEL_CACHE"):
        fetch_package(_package(_wheel(index)))


def test_every_source_says_what_it_is() -> None:
    for info in SOURCES.values():
        assert info.licence and info.credit and info.description
        if info.package:
            assert len(info.package.sha256) == 64
    with pytest.raises(TaelError, match="did you mean 'chitchat'"):
        fetch("chit-chat")
    with pytest.raises(TaelError, match="unknown source"):
        documents(DataSettings(sources=["nothing"]))
    with pytest.raises(TaelError, match="give data"):
        documents(DataSettings())
    with pytest.raises(TaelError, match="no conversations named"):
        conversations("sotu")


def test_the_standard_library_is_text() -> None:
    found = list(documents(DataSettings(sources=["python-stdlib"], max_documents=3)))
    assert len(found) == 3
    assert {d.source for d in found} == {"python-stdlib"}


def test_chatterbot_from_the_index() -> None:
    try:
        folder = fetch("chatterbot")
    except TaelError as error:
        pytest.skip(f"no package index: {error}")
    assert fetch("chatterbot") == folder
    found = list(conversations("chatterbot"))
    assert len(found) > 1900
    for messages in found:
        assert [m.role for m in messages] == ["user", "assistant"] * (len(messages) // 2)
    assert len(list(documents(DataSettings(sources=["chatterbot"])))) >= len(found)


def test_chitchat_turns_are_merged_by_sender(tmp_path: Path) -> None:
    def said(*pairs: tuple[str, str]) -> list[dict[str, str]]:
        return [{"text": text, "sender": sender} for sender, text in pairs]

    table = {
        "x": {"messages": [said(("a", "Hi"), ("a", "there\n you")), said(("b", "Hello")), said(("a", "So?"))]},
        "y": {"messages": [said(("a", "Anyone?"))]},
        "z": {"messages": [said(("a", " "))]},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    assert list(SOURCES["chitchat"].texts(tmp_path)) == ["Hi there you\nHello\nSo?\n", "Anyone?\n"]
    dialogues = SOURCES["chitchat"].dialogues
    assert dialogues is not None
    assert list(dialogues(tmp_path)) == [[Message("user", "Hi there you"), Message("assistant", "Hello")]]


@given(text=st.text(alphabet="ab \n\r\x0b\u2028", max_size=300), size=st.integers(1, 40))
def test_split_pieces_join_to_the_text(text: str, size: int) -> None:
    pieces = split_long_text(text, size)
    assert "".join(pieces) == text
    assert all(0 < len(p) <= 3 * size for p in pieces)


def _texts(path: Path, **settings: str) -> list[str]:
    return [d.text for d in documents(DataSettings(path=str(path), **settings))]  # type: ignore[arg-type]


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfzwei\r\n")
    (tmp_path / "a.txt").write_text("eins")
    assert _texts(tmp_path / "*.txt") == ["eins", "zwei\n"]
    (tmp_path / "long.txt").write_text(("word " * 500 + "\n\n") * 5)
    assert len(_texts(tmp_path / "long.txt")) > 1
    assert len(_texts(tmp_path / "*.txt")) == 3


def test_jsonl_and_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    (tmp_path / "a.jsonl").write_text('{"text": "eins"}\n\n{"text": "zwei"}\n')
    assert _texts(tmp_path / "a.jsonl") == ["eins", "zwei"]
    parquet.write_table(arrow.table({"text": ["eins", None, "zwei"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert _texts(tmp_path / "a.parquet") == ["eins", "zwei"]
    for column in ("body", "n"):
        with pytest.raises(TaelError, match=column):
            _texts(tmp_path / "a.parquet", text_field=column)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.txt", b""),
        ("blank.txt", b" \n"),
        ("junk.txt", b"\xff\xfe\x00\x01"),
        ("zero.txt", b"a\0b"),
        ("empty.jsonl", b""),
        ("bad.jsonl", b'{"text": "a"}\n{'),
        ("list.jsonl", b"[1]"),
        ("field.jsonl", b'{"body": "a"}'),
        ("number.jsonl", b'{"text": 3}'),
        ("junk.jsonl", b"\xff\xfe"),
        ("deep.jsonl", b"[" * 100_000),
        ("junk.parquet", b"PAR1junk"),
        ("text.pdf", b"%PDF"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaelError) as caught:
        _texts(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.txt", tmp_path / "*.txt"):
        with pytest.raises(TaelError, match="no such file"):
            _texts(path)
    with pytest.raises(TaelError, match="is a folder"):
        _texts(tmp_path)


def test_own_conversations(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}]
    path.write_text(json.dumps({"messages": messages}))
    assert list(conversations(str(path))) == [[Message("user", "q"), Message("assistant", "a", "r")]]
    for wrong in ({}, {"messages": [3]}, {"messages": [{"role": "me", "content": ""}]}, {"messages": messages[:1]}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(TaelError, match=r"chat\.jsonl:1"):
            list(conversations(str(path)))


def test_a_hub_data_set_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(TaelError, match="tael\\[hub\\]"):
        next(documents(DataSettings(dataset="x/y:train")))


@given(texts=st.lists(st.text(), unique=True, min_size=2, max_size=60), holdout=st.floats(0.01, 0.49))
def test_split_is_a_stable_partition(texts: list[str], holdout: float) -> None:
    everything = [Document(t, "x") for t in texts]
    training, held_out = split(everything, holdout)
    assert training and held_out
    assert sorted(d.text for d in training + held_out) == sorted(texts)
    again, _ = split(reversed(everything), holdout)
    assert [d.text for d in again] == [d.text for d in reversed(training)]


def test_split_keeps_the_share_and_refuses_one_text() -> None:
    _, held_out = split(
        [Document(hashlib.sha256(bytes([i % 256, i // 256])).hexdigest(), "x") for i in range(3000)], 0.1
    )
    assert 230 < len(held_out) < 370
    with pytest.raises(TaelError, match="two different"):
        split([Document("a", "x"), Document("a", "y")], 0.1)
