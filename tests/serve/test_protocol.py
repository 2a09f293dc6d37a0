"""Whatever a client sends, translation gives a request or an error that names a field; never a crash."""

from __future__ import annotations

import re
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chiliad.errors import InvalidRequest
from chiliad.models.tokenizer import Tokenizer
from chiliad.serve import protocol
from chiliad.serve.protocol import ChatBody, CompletionBody, Envelope, Limits

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abcde", max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = sorted(
    {*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__, *protocol._REFUSED_CHAT,
     *protocol._REFUSED_COMPLETION, "unknown"}
)  # fmt: skip
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool", 1])},
        optional={
            "content": json_values | st.just([{"type": "text", "text": "x"}]),
            "name": json_values,
            "tool_calls": json_values,
        },
    ),
    max_size=3,
)
bodies = st.builds(
    lambda loose, typical: typical | loose,
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "messages": messages,
            "prompt": json_values | st.lists(st.integers(-1, 300), max_size=4),
            "temperature": st.floats(0, 2),
            "max_tokens": st.integers(0, 50),
            "n": st.integers(1, 4),
            "stop": st.text("ab", max_size=3) | st.lists(st.text("ab", max_size=3), max_size=3),
            "logit_bias": st.dictionaries(
                st.text("0123456789", max_size=3), st.floats(-101, 101), max_size=2
            ),
            "echo": st.booleans(),
            "stream": st.booleans(),
        },
    ),
)


@pytest.mark.parametrize("kind", ["chat", "completion"])
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=bodies)
def test_translation_never_crashes(tokenizer: Tokenizer, kind: str, body: dict[str, object]) -> None:
    raw, envelope, limits = orjson.dumps(body), Envelope("id", 1, ()), Limits(512, 8)
    try:
        if kind == "chat":
            job = protocol.chat_job(protocol.parse_chat(raw), envelope, tokenizer, limits)
        else:
            job = protocol.completion_job(protocol.parse_completion(raw), envelope, tokenizer, limits)
    except InvalidRequest:
        return
    assert 1 <= job.num_choices <= limits.max_choices
    for request in job.requests:
        p = request.params
        assert request.prompt
        assert all(0 <= token < tokenizer.vocab_size for token in request.prompt)
        assert p.max_tokens >= 1
        assert 0 <= p.min_tokens <= p.max_tokens
        assert 0 <= p.temperature <= 2
        assert 0 < p.top_p <= 1
        assert p.top_k >= 0
        assert all(p.stop)
        assert all(0 <= token < tokenizer.vocab_size for token in p.logit_bias)


OPENAI_CHAT = """
messages model temperature top_p n stop stream stream_options max_tokens max_completion_tokens
frequency_penalty presence_penalty logit_bias logprobs top_logprobs response_format tools tool_choice
parallel_tool_calls metadata store service_tier reasoning_effort verbosity prompt_cache_key
safety_identifier prediction modalities audio moderation web_search_options seed user functions
function_call
"""
OPENAI_COMPLETION = """
model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop
stream stream_options suffix temperature top_p user
"""


def test_every_field_is_read_refused_or_a_label() -> None:
    """The fields of OpenAI's two request schemas; a new one must be decided on, not ignored."""
    chat, completion = set(OPENAI_CHAT.split()), set(OPENAI_COMPLETION.split())
    assert chat <= {*ChatBody.__struct_fields__, *protocol._REFUSED_CHAT, *protocol._LABELS}
    assert completion <= {*CompletionBody.__struct_fields__, *protocol._REFUSED_COMPLETION, *protocol._LABELS}
    assert not {*ChatBody.__struct_fields__} & {*protocol._REFUSED_CHAT, *protocol._LABELS}
    assert not {*CompletionBody.__struct_fields__} & {*protocol._REFUSED_COMPLETION, *protocol._LABELS}


def test_docs_name_every_route_and_field() -> None:
    from chiliad.serve.openapi import openapi

    text = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
    for path in openapi()["paths"]:
        assert path in text, path
    extensions = {"model", "adapter", "adapter_id"}
    for field in {*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__} - extensions:
        assert f"`{field}`" in text or f'"{field}"' in text, field
    known = {*FIELDS, *protocol._LABELS}
    section = text[text.index("## Fields") : text.index("Bad values are refused")]
    for field in re.findall(r"`(\w+)`", section):
        assert field in known or field in ("text", "unsupported_field"), f"{field} is documented but unknown"
