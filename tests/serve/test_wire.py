"""Properties of the bytes: whatever the text and however it is cut, a client gets it back."""

from __future__ import annotations

import json
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from chiliad.core import Chunk, Request, SamplingParams, TokenLogprob, Usage
from chiliad.engine.output import StopStrings
from chiliad.serve.protocol import Job
from chiliad.serve.wire import AnswerWriter, StreamWriter

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


class Names:
    def token_text(self, token_id: int) -> str:
        return f"<{token_id}>"

    def token_bytes(self, token_id: int) -> bytes:
        return self.token_text(token_id).encode()


def job(kind: str, n: int, prompts: int, **more: object) -> Job:
    params = SamplingParams(n=n, logprobs=more.get("logprobs"))  # type: ignore[arg-type]
    requests = [Request(str(i), (1, 2), params) for i in range(prompts)]
    return Job("id", kind, "m", 1, requests, **more)  # type: ignore[arg-type]


def data(raw: bytes) -> Iterator[str]:
    """Split a stream as the SSE specification does: by lines, events end at an empty one."""
    for block in raw.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        assert all(line.startswith("data: ") for line in lines)
        if lines:
            yield "\n".join(line.removeprefix("data: ") for line in lines)


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 5), texts), max_size=30),
    kind=st.sampled_from(["chat", "completion"]),
    decorated=st.booleans(),
    usage=st.booleans(),
)
def test_stream_and_answer_carry_the_same(
    pieces: list[tuple[int, str]], kind: str, decorated: bool, usage: bool
) -> None:
    more: dict[str, object] = {"include_usage": usage}
    if decorated:
        more |= {"logprobs": 1, "return_token_ids": True, "continuous_usage": usage}
    what = job(kind, 2, 3, **more)
    stream, answer = StreamWriter(what, Names(), "f"), AnswerWriter(what, Names(), "f")
    raw = b""
    chunks = [(i, text, False) for i, text in pieces] + [(i, f"end{i}", True) for i in range(6)]
    for token, (index, text, last) in enumerate(chunks):
        logprobs = (TokenLogprob(token, -1.0, ((token, -1.0), (token + 1, -2.0))),) if decorated else None
        chunk = Chunk("r", index % 2, text, (token,), logprobs, finish_reason="stop" if last else None)
        raw += stream.chunk(index // 2, chunk)
        answer.chunk(index // 2, chunk)
    raw += stream.close(Usage(6, len(chunks)))
    whole = json.loads(answer.body(Usage(6, len(chunks))))
    *events, done = data(raw)
    assert done == "[DONE]"
    parsed = [json.loads(event) for event in events]
    assert all(set(e) >= {"id", "object", "created", "model", "choices"} for e in parsed)
    assert all(("usage" in e) == usage for e in parsed)
    if usage:
        assert parsed.pop()["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in parsed if e["choices"][0]["index"] == choice["index"]]
        if kind == "chat":
            text = "".join(c["delta"].get("content", "") for c in mine)
            assert text == choice["message"]["content"]
            assert mine[0]["delta"]["role"] == "assistant"
        else:
            assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        if decorated:
            assert [t for c in mine for t in c["token_ids"]] == choice["token_ids"]
            key = "content" if kind == "chat" else "tokens"
            streamed = [item for c in mine if c["logprobs"] for item in c["logprobs"][key]]
            assert streamed == choice["logprobs"][key]


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=20),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_holdback_never_takes_back(pieces: list[str], stops: list[str], include: bool) -> None:
    """What was sent is a head of the final text, and the text ends at the first stop string."""
    splitter = StopStrings(stops, include)
    sent, met = "", None
    for piece in pieces:
        text, met = splitter.push(piece)
        sent += text
        if met is not None:
            break
    else:
        sent += splitter.flush()
    text = "".join(pieces)
    ends = [(text.index(stop) + len(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert (sent, met) == (text, None)
        return
    assert met in stops
    at = text.index(met)
    assert sent == text[: at + len(met) if include else at]
    assert all(text.find(stop) < 0 or text.find(stop) >= at for stop in stops if stop in sent and stop != met)
