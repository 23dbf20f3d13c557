"""From a request's body to an order: what is wanted of which model, in one form for all chat protocols.

    order = PROTOCOLS["chat"].order(body, id, spec, thinks, context, most_choices)

deepseek-recipe converts and checks what DeepSeek's API knows. On top comes what it leaves out: several choices,
penalties, sampling filters, a thinking budget, thinking as the model likes ("auto"), and a temperature that is
honoured while thinking too.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import deepseek_recipe as recipe

from tael.data import Mode
from tael.serve import asked_schemas
from tael.serve.bodies import Body, field, kind_of, read_sampling
from tael.serve.errors import ApiError, Dialect
from tael.serve.settings import ModelSpec

ProtocolName = Literal["chat", "messages", "responses"]

EFFORT_BUDGETS = {"minimal": 128, "low": 512, "medium": 2048}
"""Tokens of thought by reasoning effort, for models that are not told of it; higher efforts know no limit."""
LONGEST_COMPLAINT = 400
"""Characters; the library quotes what it does not know, whatever its length."""
MOST_SEARCHED = 200
"""Messages looked at one by one to say which is malformed."""


@dataclass(frozen=True)
class Wishes:
    """What deepseek-recipe leaves to who answers."""

    mode: Mode
    sampling: Mapping[str, Any]
    """Fields of SamplingParams, under their names there."""
    choices: int = 1
    temperature: float | None = None
    top_p: float | None = None
    thinking_budget: int | None = None
    parallel_tools: bool = True
    must_call: bool = False
    """Any of the tools; Anthropic's "any", which deepseek-recipe takes for "auto"."""
    schema: dict[str, Any] | None = None
    """What a Messages answer has to follow, of which deepseek-recipe knows nothing."""


@dataclass(frozen=True)
class Order:
    """A chat request, understood."""

    protocol: Protocol
    id: str
    model: str
    """As the client called it."""
    request: recipe.ConversationRequest
    wishes: Wishes
    generator: Callable[[], Any]
    """Makes a chunk generator, one a choice."""
    body: Body

    @property
    def stream(self) -> bool:
        return self.request.stream

    @property
    def must_call(self) -> bool:
        return self.wishes.must_call and bool(self.request.conversation.tools)

    @property
    def conversation(self) -> recipe.Conversation:
        """What was said, and what may be called."""
        said, schema = self.request.conversation, self.wishes.schema
        if not self.must_call and schema is None:
            return said
        form: dict[str, Any] = {} if schema is None else {"response_schema": schema}
        return recipe.Conversation(
            said.messages,
            thinking_mode=said.thinking_mode,
            tools=said.tools,
            tool_choice="required" if self.must_call else said.tool_choice,
            reasoning_effort=said.reasoning_effort,
            **form,
        )

    @property
    def schema(self) -> Any:
        """What the answer is to follow: a schema, {} for any JSON; None: nothing."""
        found = self.request.inference_options.output_constraint
        if found is None or found.kind != "json":
            return self.wishes.schema
        kept = json.loads(found.schema) if found.schema else {}
        return asked_schemas.restored(kept, asked_schemas.of_answer(self.body))

    @property
    def tools(self) -> list[recipe.ToolDefinition]:
        """What may be called, with all that the client said of the arguments."""
        given, tools = asked_schemas.of_tools(self.body), self.request.conversation.tools
        return [
            recipe.ToolDefinition(
                tool.name,
                tool.description,
                asked_schemas.restored(tool.parameters, given.get(tool.name)),
                tool.strict,
            )
            for tool in tools
        ]

    @property
    def constrains(self) -> str:
        """The field that says what the answer has to look like."""
        found = self.request.inference_options.output_constraint
        if found is not None and found.kind.startswith("tool"):
            return "tools"
        return {"chat": "response_format", "messages": "output_config", "responses": "text"}[self.protocol.name]

    @property
    def prefixed(self) -> bool:
        """The last message is the beginning of the answer."""
        messages = self.request.conversation.messages
        return bool(messages) and messages[-1].prefix


@dataclass(frozen=True)
class Protocol:
    """One of the three chat protocols."""

    name: ProtocolName
    dialect: Dialect
    request: Any
    response: Any
    prefix: str
    """Of ids."""

    def new_id(self) -> str:
        return self.prefix + secrets.token_hex(12)

    def order(self, body: Body, id: str, spec: ModelSpec, thinks: bool, context: int, most_choices: int) -> Order:
        """Understand a request's body. Raises ApiError that names the field."""
        wishes = read_wishes(body, self.name, spec, thinks, most_choices)
        self._refuse_unheard(body)
        plain = self._plain(body, thinks)
        options = _options(str(body.get("model", "")), spec, context)
        try:
            request = self.request(plain)
            extras = (request.echo(), request.namespace_tool_map(options)) if self.name == "responses" else None
            converted = request.convert(options)
        except recipe.ConversionError as error:
            raise self._conversion_error(error) from None
        except (ValueError, OverflowError) as error:
            raise self._malformed(plain, str(error)) from None
        model = str(body.get("model", ""))

        def generator() -> Any:
            made = self.request.chunk_generator(converted, id, model)
            return made if extras is None else made.with_echo(extras[0]).with_namespace_tool_map(extras[1])

        return Order(self, id, model, converted, wishes, generator, body)

    def _plain(self, body: Body, thinks: bool) -> Body:
        """The body as deepseek-recipe takes it."""
        plain = {key: value for key, value in body.items() if key not in _OURS}
        if "max_completion_tokens" in body and plain.get("max_tokens") is None:
            plain["max_tokens"] = body["max_completion_tokens"]
        thinking = plain.get("thinking")
        if isinstance(thinking, Mapping) and thinking.get("type") == "auto":
            plain["thinking"] = {"type": "enabled"}
        if not thinks:
            plain.pop("reasoning_effort", None)
            plain.pop("output_config", None)
        if not thinks or (_forces_call(plain) and not any(plain.get(name) for name in _ABOUT_THINKING)):
            plain |= (
                {"reasoning": {"effort": "none"}} if self.name == "responses" else {"thinking": {"type": "disabled"}}
            )
        return plain

    @property
    def dialogue(self) -> str:
        """The field that holds what was said."""
        return "input" if self.name == "responses" else "messages"

    @property
    def limit(self) -> str:
        """The field that bounds the answer."""
        return "max_output_tokens" if self.name == "responses" else "max_tokens"

    def _refuse_unheard(self, body: Body) -> None:
        """Refuse what deepseek-recipe would pass over in silence, though the answer would be another."""
        for place in _images(body.get(self.dialogue), self.dialogue):
            raise ApiError(400, f"{place}: is an image, and this model reads text only", place)
        wants_any = self.name == "messages" and _choice(body) == "any"
        if wants_any and isinstance(thinking := body.get("thinking"), Mapping) and thinking.get("type") != "disabled":
            raise ApiError(400, "tool_choice: a call cannot be forced while thinking", "tool_choice")
        if self.name == "responses" and body.get("previous_response_id") is not None:
            name = "previous_response_id"
            raise ApiError(400, f"{name}: nothing is kept here; send the whole conversation as input", name)

    def _conversion_error(self, error: recipe.ConversionError) -> ApiError:
        """The library's complaint, with the field in front that it is about."""
        try:
            message = json.loads(error.body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = error.body or "the request cannot be converted"
        found = next((name for word, name in _COMPLAINTS.items() if word in message.lower()), None)
        name = {"messages": self.dialogue, "max_tokens": self.limit}.get(found or "", found)
        return ApiError(error.status_code, f"{name}: {message}" if name else message, name)

    def _malformed(self, body: Body, message: str) -> ApiError:
        """The library's words on a malformed body, with the field that is to blame in front."""
        text = message.removeprefix("invalid request body: ").removeprefix("invalid JSON request: ")
        text = text if len(text) <= LONGEST_COMPLAINT else f"{text[:LONGEST_COMPLAINT]}…"
        field = self._guilty(body, message)
        return ApiError(422, f"{field}: {text}" if field and f"`{field}`" not in text else text, field)

    def _guilty(self, body: Body, message: str) -> str | None:
        """The field whose absence makes the complaint go away, or change."""

        def complaint(tried: Body) -> str:
            try:
                self.request(tried)
            except (ValueError, OverflowError) as error:
                return str(error)
            return ""

        for list_name in ("messages", "tools", "input"):
            items = body.get(list_name)
            if isinstance(items, list):
                for place, item in enumerate(items[:MOST_SEARCHED]):
                    if complaint(body | {list_name: [item]}) == message and len(items) > 1:
                        rest = body | {list_name: items[:place] + items[place + 1 :]}
                        if complaint(rest) != message:
                            return f"{list_name}[{place}]"
        for name in body:
            if complaint({key: value for key, value in body.items() if key != name}) != message:
                return name
        return None


_COMPLAINTS = {
    name: name
    for name in (
        "max_tokens",
        "temperature",
        "top_p",
        "tool_choice",
        "top_logprobs",
        "response_format",
        "seed",
        "stop",
    )
} | {"input": "messages", "messages": "messages", "tool": "tools"}
"""Words by which deepseek-recipe's complaints are known, and fields."""
_ABOUT_THINKING = ("thinking", "reasoning", "reasoning_effort", "output_config")

_OURS = frozenset(
    (
        "n",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "top_k",
        "min_p",
        "max_completion_tokens",
        "loop_guard",
    )
)
"""Fields that deepseek-recipe does not know, or refuses, and that are read here."""

PROTOCOLS: dict[ProtocolName, Protocol] = {
    "chat": Protocol("chat", "openai", recipe.ChatCompletionRequest, recipe.ChatCompletionResponse, "chatcmpl-"),
    "messages": Protocol("messages", "anthropic", recipe.MessagesRequest, recipe.MessagesResponse, "msg_"),
    "responses": Protocol("responses", "openai", recipe.ResponsesRequest, recipe.ResponsesResponse, "resp_"),
}


def read_wishes(body: Body, protocol: ProtocolName, spec: ModelSpec, thinks: bool, most_choices: int) -> Wishes:
    """The fields that deepseek-recipe leaves out. Raises ApiError 422 for a wrong type, 400 for a wrong value."""
    choices = field(body, "n", int, 1) if protocol == "chat" else 1
    if not 1 <= choices <= most_choices:
        raise ApiError(400, f"n: must be 1 to {most_choices}, not {choices}", "n")
    return Wishes(
        mode=_mode(body, protocol, spec, thinks),
        choices=choices,
        sampling=read_sampling(body),
        temperature=field(body, "temperature", float),
        top_p=field(body, "top_p", float),
        thinking_budget=_budget(body, spec) if thinks else None,
        parallel_tools=_parallel(body, protocol),
        must_call=protocol == "messages" and _choice(body) == "any",
        schema=asked_schemas.of_message(body) if protocol == "messages" else None,
    )


def _choice(body: Body) -> Any:
    """The kind of tool_choice, in the protocol's word."""
    choice = body.get("tool_choice")
    return choice.get("type") if isinstance(choice, Mapping) else choice


def _forces_call(body: Body) -> bool:
    """DeepSeek's format cannot think before a call that is forced, so it is not asked to unless the request does."""
    return bool(body.get("tools")) and _choice(body) in ("required", "any", "tool", "function")


def _parallel(body: Body, protocol: ProtocolName) -> bool:
    choice = body.get("tool_choice")
    if protocol == "messages":
        return not (isinstance(choice, Mapping) and field(dict(choice), "disable_parallel_tool_use", bool, False))
    return field(body, "parallel_tool_calls", bool, True)


def _mode(body: Body, protocol: ProtocolName, spec: ModelSpec, thinks: bool) -> Mode:
    """How the answer begins; "think" is turned into "direct" later where the request says so in its own way."""
    if not thinks:
        return "direct"
    thinking = body.get("thinking")
    if isinstance(thinking, Mapping):
        return "free" if thinking.get("type") == "auto" else "think"
    effort = body.get("reasoning") if protocol == "responses" else body.get("reasoning_effort")
    return "free" if spec.thinking == "auto" and effort is None else "think"


def _budget(body: Body, spec: ModelSpec) -> int | None:
    thinking = body.get("thinking")
    if isinstance(thinking, Mapping) and thinking.get("budget_tokens") is not None:
        budget = thinking["budget_tokens"]
        if not isinstance(budget, int) or isinstance(budget, bool) or budget < 0:
            name = "thinking.budget_tokens"
            raise ApiError(422, f"{name}: must be a whole number of 0 or more, not {kind_of(budget)}", name)
        return budget
    if spec.effort_in_prompt:
        return None
    nested = [body.get(name) for name in ("reasoning", "output_config")]
    efforts = [body.get("reasoning_effort"), *(each.get("effort") for each in nested if isinstance(each, Mapping))]
    found = next((effort for effort in efforts if effort is not None), None)
    return EFFORT_BUDGETS.get(found) if isinstance(found, str) else None


def _options(model: str, spec: ModelSpec, context: int) -> recipe.ConversionOptions:
    return recipe.ConversionOptions(
        default_thinking_mode=spec.thinking != "off",
        thinking_max_tokens_upper_bound=context,
        non_thinking_max_tokens_upper_bound=context,
    ).with_model_versions_by_name({model: recipe.ModelVersion.DeepseekV4Pro})


def _images(items: Any, name: str) -> Iterator[str]:
    """Where in a list of messages, or of parts of one, images are."""
    for place, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, Mapping):
            here = f"{name}[{place}]"
            if item.get("type") in ("image", "image_url", "input_image"):
                yield here
            yield from _images(item.get("content"), f"{here}.content")
