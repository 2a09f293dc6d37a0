"""Events of the engine -> bytes of the OpenAI API: streamed chunks, whole answers, errors.

A streamed token is the hot path of the edge: everything that does not change from chunk to
chunk is encoded once per request, so that a chunk costs one JSON string and two joins.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import orjson

from chiliad.core import Chunk, TokenLogprob, Usage
from chiliad.errors import ChiliadError, Unavailable
from chiliad.serve.protocol import Job

log = logging.getLogger("chiliad.serve")

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
FLOOR = -9999.0  # stands for log 0, which JSON cannot say (vLLM's convention)


class TokenNames(Protocol):
    def token_text(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...


def error_body(error: BaseException) -> dict[str, Any]:
    """OpenAI's error object. Anything unforeseen is reported without its inner words."""
    if not isinstance(error, ChiliadError):
        error = ChiliadError("internal error: the server's log says more")
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def add_usage(a: Usage, b: Usage) -> Usage:
    return Usage(
        a.prompt_tokens + b.prompt_tokens,
        a.completion_tokens + b.completion_tokens,
        a.cached_tokens + b.cached_tokens,
    )


def _visible(usage: Usage, job: Job) -> Usage:
    return Usage(usage.prompt_tokens, 0, usage.cached_tokens) if job.discard_output else usage


def check_finished(chunk: Chunk) -> None:
    """A choice that was cut short by the server is an error, not a finish_reason."""
    if chunk.finish_reason == "abort":
        raise Unavailable("the server stopped this request before it was finished: try again", retry_after=1)


# -- logprobs ----------------------------------------------------------------------------------


def chat_logprobs(items: Sequence[TokenLogprob], k: int, names: TokenNames) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": names.token_text(token_id),
            "logprob": max(logprob, FLOOR),
            "bytes": list(names.token_bytes(token_id)),
        }

    content = [
        entry(item.token_id, item.logprob) | {"top_logprobs": [entry(*top) for top in item.top[:k]]}
        for item in items
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    items: Sequence[TokenLogprob | None], token_ids: Sequence[int], k: int, offset: int, names: TokenNames
) -> tuple[dict[str, Any], int]:
    """The completions shape and the text offset after it. None: the first token of a prompt."""
    tokens: list[str] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, item in zip(token_ids, items, strict=True):
        text = names.token_text(token_id)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        if item is None:
            logprobs.append(None)
            tops.append(None)
            continue
        logprobs.append(max(item.logprob, FLOOR))
        top: dict[str, float] = {}
        for other, logprob in (*item.top[:k], (item.token_id, item.logprob)):
            top.setdefault(names.token_text(other), max(logprob, FLOOR))
        tops.append(top)
    body = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
    return body, offset


# -- streams -----------------------------------------------------------------------------------


class StreamWriter:
    """Turns the chunks of one job into server-sent events."""

    def __init__(self, job: Job, names: TokenNames, fingerprint: str) -> None:
        self._job, self._names = job, names
        self._chat = job.kind == "chat"
        head = orjson.dumps(
            {
                "id": job.id,
                "object": "chat.completion.chunk" if self._chat else "text_completion",
                "created": job.created,
                "model": job.model,
                "system_fingerprint": fingerprint,
            }
        )
        self._head = b"data: " + head[:-1]
        self._tail = b',"usage":null}\n\n' if job.include_usage else b"}\n\n"
        self._text_head = [self._choice(i) + self._field for i in range(job.num_choices)]
        self._text_tail = (
            (b"}" if self._chat else b"") + b',"logprobs":null,"finish_reason":null}]' + self._tail
        )
        self._opened = [False] * job.num_choices
        self._offset = [0] * job.num_choices  # text offset of the next token, completions only
        self._counts = [0] * job.num_choices  # tokens so far, for continuous usage
        # Chunks whose every part changes take the slow way.
        self._slow = job.logprobs is not None or job.return_token_ids or job.continuous_usage

    @property
    def _field(self) -> bytes:
        return b'"delta":{"content":' if self._chat else b'"text":'

    def _choice(self, index: int) -> bytes:
        return self._head + b',"choices":[{"index":%d,' % index

    def chunk(self, prompt: int, chunk: Chunk) -> bytes:
        """Events for news of prompt number `prompt`; may be empty. Raises Unavailable on abort."""
        index = prompt * self._job.requests[0].params.n + chunk.index
        if self._slow or chunk.finish_reason is not None or not self._opened[index]:
            return self._anything(prompt, index, chunk)
        return self._text_head[index] + orjson.dumps(chunk.text) + self._text_tail if chunk.text else b""

    def close(self, usage: Usage) -> bytes:
        if not self._job.include_usage:
            return DONE
        usage = _visible(usage, self._job)
        return self._head + b',"choices":[],"usage":' + orjson.dumps(usage_body(usage)) + b"}\n\n" + DONE

    @staticmethod
    def error(error: BaseException) -> bytes:
        if not isinstance(error, ChiliadError):
            log.error("a stream failed", exc_info=error)
        return b"data: " + orjson.dumps(error_body(error)) + b"\n\n" + DONE

    def _anything(self, prompt: int, index: int, chunk: Chunk) -> bytes:
        """First, last and decorated chunks."""
        check_finished(chunk)
        job, events = self._job, []
        output = not job.discard_output
        if output:
            self._counts[index] += len(chunk.token_ids)
        if not self._opened[index]:
            self._opened[index] = True
            if self._chat:
                events.append(self._event(index, {"role": "assistant", "content": ""}))
            elif job.echo:
                events.append(self._echo(prompt, index, chunk))
        if output and (chunk.text or (chunk.token_ids and self._slow)):
            events.append(self._delta(index, chunk))
        if chunk.finish_reason is not None:
            events.append(self._event(index, {} if self._chat else "", finish=chunk))
        return b"".join(events)

    def _delta(self, index: int, chunk: Chunk) -> bytes:
        logprobs = None
        if chunk.logprobs is not None and self._job.logprobs is not None:
            logprobs = self._logprobs(index, chunk.logprobs, chunk.token_ids)
        return self._event(
            index,
            {"content": chunk.text} if self._chat else chunk.text,
            logprobs=logprobs,
            token_ids=chunk.token_ids,
        )

    def _echo(self, prompt: int, index: int, chunk: Chunk) -> bytes:
        ids, logprobs = self._job.requests[prompt].prompt, None
        if chunk.prompt_logprobs is not None:
            logprobs = self._logprobs(index, chunk.prompt_logprobs, ids)
        return self._event(index, self._job.echo[prompt], logprobs=logprobs, token_ids=ids)

    def _logprobs(
        self, index: int, items: Sequence[TokenLogprob | None], token_ids: Sequence[int]
    ) -> dict[str, Any]:
        k = self._job.logprobs or 0
        if self._chat:
            return chat_logprobs([item for item in items if item is not None], k, self._names)
        body, self._offset[index] = completion_logprobs(items, token_ids, k, self._offset[index], self._names)
        return body

    def _event(
        self,
        index: int,
        content: dict[str, Any] | str,
        logprobs: dict[str, Any] | None = None,
        token_ids: Sequence[int] = (),
        finish: Chunk | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta" if self._chat else "text": content}
        choice["logprobs"] = logprobs
        choice["finish_reason"] = finish.finish_reason if finish else None
        if finish and finish.stop_reason is not None:
            choice["stop_reason"] = finish.stop_reason
        if self._job.return_token_ids:
            choice["token_ids"] = list(token_ids)
        tail = self._tail
        if self._job.continuous_usage:
            prompts = sum(len(request.prompt) for request in self._job.requests)
            usage = usage_body(Usage(prompts, sum(self._counts)))
            tail = b',"usage":' + orjson.dumps(usage) + b"}\n\n"
        return self._head + b',"choices":[' + orjson.dumps(choice) + b"]" + tail


# -- whole answers -----------------------------------------------------------------------------


class AnswerWriter:
    """Collects the chunks of one job into one body."""

    def __init__(self, job: Job, names: TokenNames, fingerprint: str) -> None:
        self._job, self._names, self._fingerprint = job, names, fingerprint
        count = job.num_choices
        self._text: list[list[str]] = [[] for _ in range(count)]
        self._ids: list[list[int]] = [[] for _ in range(count)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(count)]
        self._last: list[Chunk | None] = [None] * count
        self._prompt_logprobs: list[Sequence[TokenLogprob | None] | None] = [None] * len(job.requests)

    def chunk(self, prompt: int, chunk: Chunk) -> None:
        """Raises Unavailable on abort."""
        check_finished(chunk)
        index = prompt * self._job.requests[0].params.n + chunk.index
        self._text[index].append(chunk.text)
        self._ids[index].extend(chunk.token_ids)
        if chunk.logprobs is not None:
            self._logprobs[index].extend(chunk.logprobs)
        if chunk.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = chunk.prompt_logprobs
        if chunk.finish_reason is not None:
            self._last[index] = chunk

    def body(self, usage: Usage) -> bytes:
        job = self._job
        chat = job.kind == "chat"
        answer = {
            "id": job.id,
            "object": "chat.completion" if chat else "text_completion",
            "created": job.created,
            "model": job.model,
            "system_fingerprint": self._fingerprint,
            "choices": [self._choice(i) for i in range(job.num_choices)],
            "usage": usage_body(_visible(usage, job)),
        }
        return orjson.dumps(answer)

    def _choice(self, index: int) -> dict[str, Any]:
        job, last = self._job, self._last[index]
        prompt = index // job.requests[0].params.n
        if job.discard_output:
            self._text[index], self._ids[index], self._logprobs[index] = [], [], []
        text = "".join(self._text[index])
        choice: dict[str, Any] = {"index": index}
        if job.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = (job.echo[prompt] if job.echo else "") + text
        choice["logprobs"] = None if job.logprobs is None else self._logprobs_of(index, prompt)
        choice["finish_reason"] = last.finish_reason if last else None
        choice["stop_reason"] = last.stop_reason if last else None
        if job.return_token_ids:
            choice["token_ids"] = self._ids[index]
            choice["prompt_token_ids"] = list(job.requests[prompt].prompt)
        return choice

    def _logprobs_of(self, index: int, prompt: int) -> dict[str, Any]:
        k = self._job.logprobs or 0
        if self._job.kind == "chat":
            return chat_logprobs(self._logprobs[index], k, self._names)
        items: list[TokenLogprob | None] = list(self._logprobs[index])
        ids = self._ids[index]
        echoed = self._prompt_logprobs[prompt]
        if self._job.echo and echoed is not None:
            items = [*echoed, *items]
            ids = [*self._job.requests[prompt].prompt, *ids]
        return completion_logprobs(items, ids, k, 0, self._names)[0]
