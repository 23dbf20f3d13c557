"""`tael serve`, whole, over the scripted model of tests/api: nothing between browser and engine is fake.

    python tests/browser/whole_server.py STATE [PORT]          prints its port

To "count" it counts for long, about a hundred tokens a second; to anything else it says hello.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "api"))

from scripted import ScriptedRunner, loader, scripted_model

from tael.serve.running import serve
from tael.serve.settings import ModelSpec, ServeSettings

forward = ScriptedRunner.forward


def slowly(self: ScriptedRunner, batch):
    time.sleep(0.01)
    return forward(self, batch)


def script(prompt: str) -> str:
    long = "count" in prompt.rsplit("<｜User｜>", 1)[-1]
    begun = "" if prompt.endswith("<think>") else "<think>"
    return f"{begun}Let me see.</think>" + (" ".join(map(str, range(900))) if long else "Hello **there**.")


def main() -> None:
    state, port = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    ScriptedRunner.forward = slowly
    models = (ModelSpec(name="tiny", model="m", context=4096),)
    settings = ServeSettings(port=port, state=state, models=models, runs=state / "runs", recipes=state / "recipes")
    model = scripted_model(script, context=4096)
    asyncio.run(
        serve(
            settings,
            loader({"m": model}),
            started=lambda service, server, at: print(json.dumps({"port": at}), flush=True),
        )
    )


if __name__ == "__main__":
    main()
