from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tael.data import Tokenizer, clean_text, load_tokenizer, train_tokenizer
from tael.data.tokenizer import SMALLEST_VOCABULARY, SPECIAL_TOKENS
from tael.errors import TaelError

words = st.text() | st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "12", "\n", "é", "think"])).map("".join)


@given(text=words)
def test_any_text_comes_back_and_has_no_special_id(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.special_ids.intersection(ids)
    assert tokenizer.encode_batch([text, "x"])[0] == ids


@given(ids=st.lists(st.integers(-5, 1000)))
def test_decode_takes_any_ids(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert isinstance(tokenizer.decode(ids), str)


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert clean_text("a\ud800b") == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_special_tokens_have_ids_and_are_found_only_when_meant(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_id(t) for t in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    text = "".join(SPECIAL_TOKENS)
    assert tokenizer.encode_with_special(text) == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.decode(range(len(SPECIAL_TOKENS))) == ""
    assert tokenizer.decode(range(len(SPECIAL_TOKENS)), skip_special=False) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)


def test_every_digit_is_a_token(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234567")] == list("1234567")


def test_training_is_deterministic_and_bounded(tmp_path: Path) -> None:
    texts = ["one two three two one " * 5, "two three"]
    for name in ("a", "b"):
        train_tokenizer(texts, 300).save(tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    assert train_tokenizer(texts, SMALLEST_VOCABULARY).vocab_size == SMALLEST_VOCABULARY
    with pytest.raises(TaelError, match="too small"):
        train_tokenizer(texts, SMALLEST_VOCABULARY - 1)
    with pytest.raises(TaelError, match="no text"):
        train_tokenizer([], 400)


def test_save_and_load_from_folder_and_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    text = "What is 12 + 30? <think>é"
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.encode(text) == tokenizer.encode(text)
        assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.think_id) == (0, 1, 2, tokenizer.think_id)
    assert load_tokenizer(tmp_path).config == json.loads((tmp_path / "tokenizer_config.json").read_text())


@given(text=words)
def test_transformers_reads_the_same_tokenizer(hf_tokenizer, tokenizer: Tokenizer, text: str) -> None:
    assert hf_tokenizer(text, add_special_tokens=False).input_ids == tokenizer.encode_with_special(text)


@pytest.fixture(scope="module")
def hf_tokenizer(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_transformers_knows_the_roles(hf_tokenizer, tokenizer: Tokenizer) -> None:
    found = (hf_tokenizer.bos_token_id, hf_tokenizer.eos_token_id, hf_tokenizer.pad_token_id)
    assert found == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', "\0\0"])
def test_damaged_files_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TaelError, match=r"tokenizer\.json: damaged"):
        load_tokenizer(tmp_path)


def test_missing_and_binary_files_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TaelError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaelError, match="damaged"):
        load_tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(TaelError, match=r"tokenizer_config\.json: damaged"):
        load_tokenizer(tmp_path)


def test_a_foreign_tokenizer_lacks_what_it_lacks(tmp_path: Path) -> None:
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    backend.add_tokens(["<end>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    foreign = load_tokenizer(tmp_path)
    assert (foreign.bos_id, foreign.eos_id, foreign.think_id, foreign.fim_end_id) == (None, 3, None, None)
    assert foreign.vocab_size == 4
    assert 3 not in foreign.encode("ab<end>")
    assert foreign.encode_with_special("ab<end>") == [2, 3]
