"""Tael: a complete, small DeepSeek-style language-model system. See docs/architecture.md."""
