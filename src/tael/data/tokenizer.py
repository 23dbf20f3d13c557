"""Byte-level BPE with DeepSeek's special tokens: train, load, save, encode, decode.

Splitting follows DeepSeek-V3's pre-tokeniser (digits, CJK runs, words with one leading mark, punctuation, white
space), but every digit is a token of its own: arithmetic is learned faster when place value is not hidden in
three-digit chunks. All of it is written down in tokenizer.json, so any tool that reads that file splits alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from deepseek_recipe import SpecialToken
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from tael.errors import TaelError

BOS = SpecialToken.Bos.default_str()
EOS = SpecialToken.Eos.default_str()
PAD = "<｜▁pad▁｜>"
THINK = SpecialToken.ThinkingStart.default_str()
END_THINK = SpecialToken.ThinkingEnd.default_str()
USER = SpecialToken.User.default_str()
ASSISTANT = SpecialToken.Assistant.default_str()
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_END = "<｜fim▁end｜>"

CONTROL_TOKENS = (BOS, EOS, PAD)
"""Flagged `special` in tokenizer.json; the others are not, as in DeepSeek's own files, so that tools that drop
special tokens when decoding still show `<think>`."""

SPECIAL_TOKENS = (
    *CONTROL_TOKENS,
    USER,
    ASSISTANT,
    THINK,
    END_THINK,
    SpecialToken.System.default_str(),
    SpecialToken.LatestReminder.default_str(),
    SpecialToken.Dsml.default_str(),
    FIM_BEGIN,
    FIM_HOLE,
    FIM_END,
)
"""Special tokens of a trained tokenizer; a token's id is its place in this list."""

END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
)
"""Tokens that end a turn or a document in other models' formats, of which eos_token names only one."""

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

_SPLITS = (
    r"\p{N}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

CHAT_TEMPLATE = """{%- set ns = namespace(system=[], last='', said=false) -%}
{%- for m in messages if m['role'] == 'system' and m['content'] -%}{%- set ns.system = ns.system + [m['content']] -%}
{%- endfor -%}
{{- bos_token + ns.system | join('\\n\\n') -}}
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- for m in turns -%}
{%- if m['role'] == 'user' -%}
{%- if ns.last != 'user' -%}{{- '<｜User｜>' -}}{%- set ns.said = false -%}{%- endif -%}
{%- if m['content'] -%}{{- ('\\n\\n' if ns.said else '') + m['content'] -}}{%- set ns.said = true -%}{%- endif -%}
{%- else -%}
{{- '<｜Assistant｜>' -}}
{%- if loop.last and not add_generation_prompt and m['reasoning_content'] is string -%}
{{- '<think>' + m['reasoning_content'] -}}
{%- endif -%}
{{- '</think>' + m['content'] + eos_token -}}
{%- endif -%}
{%- set ns.last = m['role'] -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<｜Assistant｜>' + ('<think>' if thinking is defined and thinking else '</think>') -}}
{%- endif -%}"""
"""DeepSeek V4's plain chat for other tools: not thinking unless `thinking=True` is passed to the template."""


def clean_text(text: str) -> str:
    """`text` with lone surrogates (half a UTF-16 pair, which no UTF-8 can hold) replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer:
    """Text to token ids and back, over one `tokenizers.Tokenizer`.

    `bos_id`, `eos_id`, `pad_id`, `think_id`, `end_think_id`, `user_id`, `assistant_id`, `fim_begin_id`,
    `fim_hole_id` and `fim_end_id` are None where the tokenizer (a foreign one) has no such token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> None:
        """Wrap `backend`; `config` is the content of a tokenizer_config.json, if there is one."""
        backend.no_padding()
        backend.no_truncation()
        self._full = backend
        self._plain = _without_added_vocabulary(backend)
        self.config: dict[str, Any] = dict(config or {})
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        """One more than the largest id: the least number of rows an embedding needs."""
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, t in added.items() if t.special or t.content in SPECIAL_TOKENS)
        self.bos_id = self._named_id("bos_token", BOS)
        self.eos_id = self._named_id("eos_token", EOS)
        self.pad_id = self._named_id("pad_token", PAD)
        self.user_id = self.token_id(USER)
        self.assistant_id = self.token_id(ASSISTANT)
        self.think_id = self.token_id(THINK)
        self.end_think_id = self.token_id(END_THINK)
        self.fim_begin_id = self.token_id(FIM_BEGIN)
        self.fim_hole_id = self.token_id(FIM_HOLE)
        self.fim_end_id = self.token_id(FIM_END)

    def _named_id(self, key: str, default: str) -> int | None:
        value = self.config.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        found = self.token_id(value) if isinstance(value, str) else None
        return self.token_id(default) if found is None else found

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text: never produced by `encode`, dropped by `decode`."""
        return self._special_ids

    @property
    def start_ids(self) -> tuple[int, ...]:
        """What a text begins with: the start token, unless tokenizer_config.json says to add none."""
        return () if self.bos_id is None or self.config.get("add_bos_token") is False else (self.bos_id,)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the end of the text, and of a turn where that is another token."""
        found = [self.eos_id, self._named_id("eot_token", EOS), *map(self.token_id, END_TOKENS)]
        return tuple(dict.fromkeys(i for i in found if i is not None))

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The wrapped tokenizer, with its added tokens."""
        return self._full

    def token_id(self, token: str) -> int | None:
        """Id of the token spelled exactly `token`, or None."""
        return self._full.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: a special token spelled out in `text` stays text and gets no special id."""
        return self._plain.encode(clean_text(text), add_special_tokens=False).ids

    def encode_with_special(self, text: str) -> list[int]:
        """Ids of trusted text in which spelled-out special tokens are meant; never for a user's words."""
        return self._full.encode(clean_text(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, in parallel."""
        encoded = self._plain.encode_batch_fast([clean_text(t) for t in texts], add_special_tokens=False)
        return [e.ids for e in encoded]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary are dropped."""
        hidden = self._special_ids if skip_special else frozenset()
        kept = [i for i in map(int, ids) if i not in hidden and 0 <= i < self.vocab_size]
        return self._full.decode(kept, skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into `folder` (made if missing)."""
        folder = Path(folder)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | self.config
        for key, token_id in (("bos_token", self.bos_id), ("eos_token", self.eos_id), ("pad_token", self.pad_id)):
            if token_id is not None:
                config.setdefault(key, self._full.id_to_token(token_id))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "tokenizer.json").write_text(self._full.to_str(pretty=True) + "\n", encoding="utf-8")
            text = json.dumps(config, ensure_ascii=False, indent=2)
            (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise TaelError(f"{folder}: cannot write the tokenizer: {error.strerror or error}") from None


def _without_added_vocabulary(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that finds no added token in text: what makes `encode` safe on hostile input."""
    table = json.loads(backend.to_str())
    table["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(table))


def _untrained() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE from `texts`: at most `vocab_size` tokens, special tokens included.

    All 256 bytes are in the alphabet, so any text comes back exactly. Same texts, same tokenizer.json. The result
    is smaller than `vocab_size` when the text has no more pairs to merge. Raises TaelError when `vocab_size` is
    below 256 bytes + the special tokens, or when there is no text.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise TaelError(f"vocab_size {vocab_size} is too small: bytes and special tokens take {SMALLEST_VOCABULARY}")
    backend = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield clean_text(text)

    backend.train_from_iterator(counted(), trainer)
    if not seen:
        raise TaelError("no text to train the tokenizer on")
    table = json.loads(backend.to_str())
    for token in table["added_tokens"]:
        token["special"] = token["content"] in CONTROL_TOKENS
    config = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "chat_template": CHAT_TEMPLATE}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(table, ensure_ascii=False)), config)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        template = folder / "chat_template.jinja"
        if template.is_file() and isinstance(config, dict):
            config.setdefault("chat_template", template.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaelError(f"{path}: damaged: {error}") from None
    if not isinstance(config, dict):
        raise TaelError(f"{path}: damaged: not a JSON object")
    return config


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer from a folder with tokenizer.json (and tokenizer_config.json), or from the file itself.

    Raises TaelError when it is missing or damaged.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        other = next((n for n in ("tiktoken.model", "tokenizer.model") if (file.parent / n).is_file()), None)
        if other:
            raise TaelError(
                f"{file}: not there, and {other} is not read; put a tokenizer.json of this model beside it"
            )
        raise TaelError(f"{file}: no such tokenizer; give a folder with tokenizer.json, or that file")
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception on a damaged file
        raise TaelError(f"{file}: damaged, or no tokenizer.json: {str(error).splitlines()[0][:120]}") from None
    if not backend.get_vocab_size(with_added_tokens=True):
        raise TaelError(f"{file}: damaged: the vocabulary is empty")
    return Tokenizer(backend, _read_config(file.parent))
