"""Chat formats: conversations to prompts, and what models write to what deepseek-recipe's parser reads."""

from tael.data import Tokenizer, speaks_deepseek
from tael.serve.formats.base import ChatFormat, Prompt, Starts, Translator, Way
from tael.serve.formats.deepseek import DeepSeekFormat
from tael.serve.formats.none import NoFormat
from tael.serve.formats.template import TemplateFormat

__all__ = [
    "ChatFormat",
    "DeepSeekFormat",
    "NoFormat",
    "Prompt",
    "Starts",
    "TemplateFormat",
    "Translator",
    "Way",
    "choose_format",
]


def choose_format(tokenizer: Tokenizer, effort_in_prompt: bool = False) -> ChatFormat:
    """DeepSeek's format where the tokenizer has its tokens, else the model's own chat template.

    Raises TaelError for a model that has neither.
    """
    return DeepSeekFormat(tokenizer, effort_in_prompt) if speaks_deepseek(tokenizer) else TemplateFormat(tokenizer)
