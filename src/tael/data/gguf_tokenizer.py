"""Tokenizers inside GGUF files: byte-level BPE ("gpt2") read into `Tokenizer`, and written back.

A GGUF file names the way text is split before merging ("pre-tokenizer"); `PRE_TOKENIZERS` spells the names out as
the models' own tokenizer.json does. Other tokenizer models (SentencePiece, WordPiece) are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from tael.data.gguf_file import GGUFFile, read_gguf
from tael.data.tokenizer import Tokenizer
from tael.errors import TaelError, did_you_mean

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Cased letters. Escaped are those that a text in normal form (NFC) would turn into others.
_LATIN = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿ\u0386\u0388-\u038a\u038cΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffcℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CJK_AND_MORE = "[一-龥ࠀ-一가-퟿]+"

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{_LATIN}]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        _CJK_AND_MORE,
        r"\p{N}",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_AND_MORE, r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", _CJK, _DEEPSEEK3),
}
"""GGUF name of a pre-tokenizer -> the patterns it splits by, one after the other.

Those of tokenizer.json. llama.cpp splits alike but for two things: "deepseek-llm" leaves it runs of digits (whose
merges do not join digits), and white space beyond ASCII counts as a tab in patterns without \\p."""

_ALIASES = {
    "default": "gpt-2",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "refact": "smollm",
    "starcoder": "smollm",
    "command-r": "smollm",
    "exaone": "smollm",
}

# Tael's own tokenizers split single digits before DeepSeek-V3's pattern: they have no merge across two digits, so
# that the groups of three which "deepseek-v3" makes come apart into the same tokens.
_SAME_TOKENS: dict[tuple[str, ...], str] = {(r"\p{N}", _CJK, _DEEPSEEK3): "deepseek-v3"}

_IGNORES_MERGES = ("llama-bpe",)
"""A word that is a token is taken whole, whatever its merges say (Llama 3's `ignore_merges`)."""

_NAMED = {"bos_token": "bos", "eos_token": "eos", "eot_token": "eot", "pad_token": "padding", "unk_token": "unknown"}
_TEMPLATE = "tokenizer.chat_template"


def load_gguf_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a GGUF file. Raises TaelError when it is damaged or of a kind Tael does not know."""
    return gguf_tokenizer(read_gguf(path))


def gguf_tokenizer(file: GGUFFile) -> Tokenizer:
    """The same from a file that is open already."""
    model = file.text("tokenizer.ggml.model")
    if model != "gpt2":
        raise TaelError(f"{file.path}: tokenizer model '{model}' is not supported, only byte-level BPE ('gpt2')")
    named = file.text("tokenizer.ggml.pre", "default")
    pre = _ALIASES.get(named, named)
    if pre not in PRE_TOKENIZERS:
        hint = did_you_mean(named, {*PRE_TOKENIZERS, *_ALIASES})
        raise TaelError(f"{file.path}: unknown pre-tokenizer '{named}': its text cannot be split{hint}")
    tokens = file.texts("tokenizer.ggml.tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if not tokens or len(vocabulary) < len(tokens):
        raise TaelError(f"{file.path}: damaged: the vocabulary {'names a token twice' if tokens else 'is empty'}")
    merges = list(_merges(file, vocabulary))
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _IGNORES_MERGES))
    except Exception as error:  # tokenizers raises bare Exception
        raise TaelError(f"{file.path}: the tokenizer is damaged: {str(error)[:120]}") from None
    backend.pre_tokenizer = _splitter(PRE_TOKENIZERS[pre])
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2" and named != "deepseek-r1-qwen":
        backend.normalizer = normalizers.NFC()  # as in Qwen's tokenizer.json; llama.cpp leaves it out
    backend.add_tokens(_added_tokens(file, tokens))
    return Tokenizer(backend, _config(file, tokens, pre))


def _splitter(patterns: tuple[str, ...]) -> pre_tokenizers.PreTokenizer:
    splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _merges(file: GGUFFile, vocabulary: dict[str, int]) -> Iterator[tuple[str, str]]:
    for line in file.texts("tokenizer.ggml.merges"):
        # A token never holds a space (byte-level BPE writes it as Ġ), except as its first character.
        left, _, right = line.partition(" ") if not line.startswith(" ") else (" ", "", line[2:])
        if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
            raise TaelError(f"{file.path}: the tokenizer is damaged: the merge {line[:60]!r} joins no tokens")
        yield left, right


def _added_tokens(file: GGUFFile, tokens: list[str]) -> list[AddedToken]:
    """Tokens found whole in trusted text; those of type CONTROL stand for no text of the answer."""
    kinds = file.integers("tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise TaelError(f"{file.path}: the tokenizer is damaged: {len(kinds)} token types for {len(tokens)} tokens")
    wanted = (TokenType.CONTROL, TokenType.USER_DEFINED)
    return [
        AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in wanted and token
    ]


def _config(file: GGUFFile, tokens: list[str], pre: str) -> dict[str, Any]:
    """The same facts under the names of tokenizer_config.json."""
    config: dict[str, Any] = {}
    for key, name in _NAMED.items():
        index = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is None:
            continue
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise TaelError(f"{file.path}: the tokenizer is damaged: {name}_token_id {str(index)[:40]} is no token")
        config[key] = tokens[index]
    config["add_bos_token"] = file.flag("tokenizer.ggml.add_bos_token", pre in _IGNORES_MERGES)
    named = [
        {"name": key.removeprefix(f"{_TEMPLATE}."), "template": file.text(key)}
        for key in file.metadata
        if key.startswith(f"{_TEMPLATE}.")
    ]
    if _TEMPLATE in file.metadata:
        default = file.text(_TEMPLATE)
        config["chat_template"] = [{"name": "default", "template": default}, *named] if named else default
    return config


# --------------------------------------------------------------------- writing


def pre_tokenizer_name(tokenizer: Tokenizer) -> str:
    """GGUF name of the way `tokenizer` splits text; raises TaelError when GGUF has none for it."""
    patterns = _patterns(json.loads(tokenizer.backend.to_str()).get("pre_tokenizer"))
    for name, known in PRE_TOKENIZERS.items():
        if patterns == known:
            return name
    if patterns in _SAME_TOKENS:
        return _SAME_TOKENS[patterns]
    raise TaelError(
        "this tokenizer splits text in a way that has no name in GGUF: it cannot be written; "
        f"known are {', '.join(PRE_TOKENIZERS)}"
    )


def _patterns(table: Any) -> tuple[str, ...]:
    """The patterns of a tokenizer.json's pre-tokenizer; empty when it does anything else."""
    steps = table.get("pretokenizers", []) if isinstance(table, dict) and table.get("type") == "Sequence" else [table]
    found: list[str] = []
    for step in steps:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "Split" and step["behavior"].lower() == "isolated" and not step["invert"]:
            found.append(step["pattern"].get("Regex", ""))
        elif kind == "Digits":
            found.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            found += [_GPT2] if step["use_regex"] else []
        else:
            return ()
    return tuple(found)


def gguf_tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """`tokenizer` as GGUF metadata, padded with unused tokens to the model's `vocab_size`.

    Raises TaelError when it is no byte-level BPE, splits in an unknown way, or has more tokens than the model.
    """
    table = json.loads(tokenizer.backend.to_str())
    model = table["model"]
    if model.get("type") != "BPE" or table.get("decoder", {}).get("type") not in ("ByteLevel", "Sequence"):
        raise TaelError(f"a tokenizer of type '{model.get('type')}' cannot be written as GGUF, only byte-level BPE")
    if tokenizer.vocab_size > vocab_size:
        raise TaelError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab_size}")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [int(TokenType.UNUSED)] * vocab_size
    for token, index in model["vocab"].items():
        tokens[index], kinds[index] = token, int(TokenType.NORMAL)
    for added in table["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], int(kind)
    prefix = "tokenizer.ggml."
    written: dict[str, Any] = {
        f"{prefix}model": "gpt2",
        f"{prefix}pre": pre_tokenizer_name(tokenizer),
        f"{prefix}tokens": tokens,
        f"{prefix}token_type": kinds,
        f"{prefix}merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        f"{prefix}add_bos_token": bool(tokenizer.start_ids),
    }
    for key, name in _NAMED.items():
        value = tokenizer.config.get(key)
        index = tokenizer.token_id(value.get("content", "") if isinstance(value, dict) else str(value))
        if index is not None:
            written[f"{prefix}{name}_token_id"] = index
    for name, index in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("padding", tokenizer.pad_id)):
        if index is not None:
            written[f"{prefix}{name}_token_id"] = index
    return written | _template_entries(tokenizer.config.get("chat_template"))


def _template_entries(template: Any) -> dict[str, str]:
    if isinstance(template, str):
        return {_TEMPLATE: template}
    named = {t["name"]: t["template"] for t in template or [] if isinstance(t, dict) and "template" in t}
    return {_TEMPLATE if name == "default" else f"{_TEMPLATE}.{name}": text for name, text in named.items()}
