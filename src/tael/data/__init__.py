"""Text to batches: sources, tokenizer, chat format, packing, loading."""

from tael.data.dialogue import ParsedAnswer, encode_example, encode_prompt, parse_completion, render_text
from tael.data.fetch import Package, cache_dir
from tael.data.fim import Cut, FimTokens, cut_text, encode_fim_prompt, fim_tokens, join_psm, undo_psm
from tael.data.gguf_tokenizer import load_gguf_tokenizer
from tael.data.loader import IGNORED, Batch, Loader
from tael.data.packing import PADDING_DOCUMENT, Rows, pack_documents, pack_examples
from tael.data.sources import SOURCES, SourceInfo, conversations, documents, fetch, split
from tael.data.template import encode_chat, speaks_deepseek
from tael.data.tokenizer import Tokenizer, clean_text, load_tokenizer, train_tokenizer
from tael.data.types import Document, Example, Message, Mode, Role

__all__ = [
    "IGNORED",
    "PADDING_DOCUMENT",
    "SOURCES",
    "Batch",
    "Cut",
    "Document",
    "Example",
    "FimTokens",
    "Loader",
    "Message",
    "Mode",
    "Package",
    "ParsedAnswer",
    "Role",
    "Rows",
    "SourceInfo",
    "Tokenizer",
    "cache_dir",
    "clean_text",
    "conversations",
    "cut_text",
    "documents",
    "encode_chat",
    "encode_example",
    "encode_fim_prompt",
    "encode_prompt",
    "fetch",
    "fim_tokens",
    "join_psm",
    "load_gguf_tokenizer",
    "load_tokenizer",
    "pack_documents",
    "pack_examples",
    "parse_completion",
    "render_text",
    "speaks_deepseek",
    "split",
    "train_tokenizer",
    "undo_psm",
]
