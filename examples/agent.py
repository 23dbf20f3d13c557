"""A tool-using agent over Tael's API with OpenAI's own client: a calculator, and files of the current folder.

    pip install openai
    tael serve smollm2-135m                                  in one terminal
    python examples/agent.py "What is 17 * 23?"              in another

The loop is the usual one: ask; run the tools the model calls; hand their results back with everything that was said;
until it answers without a call. What was said before is in the prefix cache, so each turn reads only what is new.
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openai import OpenAI

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
MOST_TURNS = 8


def calculator(expression: str) -> str:
    """Add, subtract, multiply, divide. What a model wrote is parsed, never executed."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError("only numbers and + - * / are understood")

    return f"{value(ast.parse(expression, mode='eval').body):g}"


def read_file(name: str) -> str:
    """The first 2,000 characters of a file of the current folder."""
    path = Path(name).resolve()
    if not path.is_relative_to(Path.cwd()):
        raise ValueError("only files of the current folder may be read")
    return path.read_text(encoding="utf-8", errors="replace")[:2000]


def schema(description: str, **parameters: str) -> dict[str, Any]:
    properties = {name: {"type": "string", "description": text} for name, text in parameters.items()}
    return {
        "description": description,
        "parameters": {"type": "object", "properties": properties, "required": list(parameters)},
    }


TOOLS: dict[str, tuple[Callable[..., str], dict[str, Any]]] = {
    "calculator": (calculator, schema("Computes an expression.", expression="such as 6 * (7 + 1)")),
    "read_file": (read_file, schema("Reads a text file.", name="its name")),
}


def run_tool(name: str, arguments: str) -> str:
    """What the tool says; an error is an answer too."""
    try:
        function, _ = TOOLS[name]
        return function(**json.loads(arguments))
    except (KeyError, TypeError, ValueError, SyntaxError, OSError, ZeroDivisionError, RecursionError) as error:
        return f"error: {error}"


def run(client: OpenAI, model: str, question: str, first_choice: str = "auto") -> list[dict[str, Any]]:
    """All messages of the talk, the answer last."""
    tools = [{"type": "function", "function": {"name": name} | described} for name, (_, described) in TOOLS.items()]
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    for turn in range(MOST_TURNS):
        choice = first_choice if turn == 0 else "auto"
        answer = client.chat.completions.create(model=model, messages=messages, tools=tools, tool_choice=choice)  # type: ignore[arg-type]
        said = answer.choices[0].message.model_dump(exclude_none=True)
        messages.append(said)
        usage = answer.usage.model_dump() if answer.usage else {}
        hits, cost = usage["prompt_cache_hit_tokens"], usage["cost"]
        print(f"[turn {turn + 1}: {usage['prompt_tokens']} tokens read, {hits} of them from the cache, ${cost:.7f}]")
        if not said.get("tool_calls"):
            return messages
        for call in said["tool_calls"]:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            result = run_tool(name, arguments)
            print(f"  {name}({arguments}) -> {result}")
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--server", default="http://localhost:8000/v1")
    parser.add_argument("--tool", default="auto", help='"required" makes even a small model begin with a tool')
    options = parser.parse_args()
    client = OpenAI(base_url=options.server, api_key="none")
    print(run(client, options.model, options.question, options.tool)[-1].get("content", ""))


if __name__ == "__main__":
    main()
