"""OpenAI's API: `/v1/models`, `/v1/chat/completions`, `/v1/completions`, `/v1/responses`, `/v1/embeddings`.

A field that is not known, or known and not served, is an error that names it: an answer that ignores what was asked for would be
wrong without anyone noticing. Taken without effect is only what does not change an answer, such as `user` or `prompt_cache_key`.
"""

from slmops.serve.dialects.openai.errors import error, of
from slmops.serve.dialects.openai.routes import OpenAi

__all__ = ["OpenAi", "error", "of"]
