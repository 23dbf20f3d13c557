"""The assistant: DeepSeek's, OpenAI's and Anthropic's protocols over the engine, and pages for people.

    tael serve smollm2-135m            API and pages on http://localhost:8000

`app` puts the routes together, `service` what they call; docs/assistant.md says how it is used.
"""
