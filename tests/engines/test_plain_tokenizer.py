"""Chat templates without transformers: the same ids as with it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from slmops.engines import minimal, plain_tokenizer
from slmops.engines.plain_tokenizer import PlainTokenizer

TEMPLATE = """\
{%- if tools is none %}no tools{% elif documents is none %}
{% for tool in tools %}{{ tool | tojson }} {{ tool.function.parameters | tojson(indent=2) }} {{ tool | tojson(sort_keys=true) }}
{% endfor %}{% endif %}
{%- for message in messages %}<|{{ message.role }}|>
{%- if message.role == 'assistant' %}{% generation %}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson(separators=(',', ':')) }}</tool_call>
{%- endfor %}{% endgeneration %}
{%- else %}{{ message.content }}{{ message.tool_call_id or '' }}{% endif %}<|end|>
{%- endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
TOOL = {
    "type": "function",
    "function": {
        "name": "größe", "description": "a < b & 'c'",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "enum": ["é", "</s>"]}}},
    },
}  # fmt: skip
CALL = {"id": "1", "type": "function", "function": {"name": "größe", "arguments": {"x": "é", "b": [1.5, None]}}}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "hello"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "3"},
]  # fmt: skip


@pytest.mark.parametrize("tools", [(), (TOOL,), (TOOL, TOOL)], ids=len)
def test_tools_and_their_calls_are_rendered_as_by_transformers(
    tmp_path: Path, tools: tuple[dict[str, Any], ...]
) -> None:
    from transformers import AutoTokenizer

    minimal._write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    expected = reference.apply_chat_template(
        TURNS, tools=list(tools) or None, add_generation_prompt=True, return_dict=False
    )
    plain = PlainTokenizer(tmp_path, "serve")
    assert plain.encode(TURNS, tools) == expected
    assert plain.special(minimal.END) and not plain.special(50)


def test_folders_with_the_same_tokenizer_share_it(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        minimal._write_tokenizer(tmp_path / name)
    file = tmp_path / "c" / "tokenizer.json"
    file.write_text(file.read_text("utf-8") + " ", "utf-8")
    first, second, third = (PlainTokenizer(tmp_path / name, "serve") for name in ("a", "b", "c"))
    assert first._tokenizer is second._tokenizer and first._tokenizer is not third._tokenizer
    assert first.encode([{"role": "user", "content": "hi"}]) == third.encode([{"role": "user", "content": "hi"}])
    held = len(plain_tokenizer._known)
    del first, second
    gc.collect()
    assert len(plain_tokenizer._known) == held - 1
