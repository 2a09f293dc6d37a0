"""POST /v1/chat/completions, /v1/completions, /tokenize, /detokenize."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from chiliad.core import Chunk, Usage
from chiliad.errors import InvalidRequest
from chiliad.serve import protocol
from chiliad.serve.http import EventStream, json_response, read_body, unless_gone
from chiliad.serve.protocol import Envelope, Job
from chiliad.serve.service import Service
from chiliad.serve.wire import AnswerWriter, StreamWriter, add_usage

BIG = 32_768  # bytes of a body from which templates and tokenizer leave the event loop

T = TypeVar("T")


async def _translate(raw: bytes, work: Callable[[], T]) -> T:
    return work() if len(raw) < BIG else await asyncio.to_thread(work)


class Completions:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, request: Request) -> Response | EventStream:
        service = self._service
        raw = await read_body(request, service.config.max_body)

        def translate() -> Job:
            body = protocol.parse_chat(raw)
            envelope = self._envelope(request, body, "chatcmpl")
            return protocol.chat_job(body, envelope, service.engine.tokenizer, service.limits)

        return await self._respond(request, await _translate(raw, translate))

    async def complete(self, request: Request) -> Response | EventStream:
        service = self._service
        raw = await read_body(request, service.config.max_body)

        def translate() -> Job:
            body = protocol.parse_completion(raw)
            envelope = self._envelope(request, body, "cmpl")
            return protocol.completion_job(body, envelope, service.engine.tokenizer, service.limits)

        return await self._respond(request, await _translate(raw, translate))

    async def tokenize(self, request: Request) -> Response:
        service = self._service
        tokenizer = service.engine.tokenizer
        raw = await read_body(request, service.config.max_body)

        def work() -> dict[str, Any]:
            body = protocol.convert(protocol.parse_json(raw), protocol.TokenizeBody)
            service.names.resolve(body.model)
            if (body.prompt is None) == (body.messages is None):
                raise InvalidRequest("give either prompt or messages", param="prompt")
            text = body.prompt if body.prompt is not None else protocol.render_chat(body, tokenizer)
            special = body.add_special_tokens
            ids = tokenizer.encode(text, add_special=body.prompt is not None if special is None else special)
            answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.limits.max_model_len}
            answer["tokens"] = ids
            answer["token_strs"] = [tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
            return answer

        return json_response(await _translate(raw, work))

    async def detokenize(self, request: Request) -> Response:
        service = self._service
        raw = await read_body(request, service.config.max_body)

        def work() -> dict[str, Any]:
            body = protocol.convert(protocol.parse_json(raw), protocol.DetokenizeBody)
            service.names.resolve(body.model)
            ids = protocol.check_ids(body.tokens, service.engine.tokenizer, "tokens")
            return {"prompt": service.engine.tokenizer.decode(ids, skip_special=False)}

        return json_response(await _translate(raw, work))

    def _envelope(self, request: Request, body: protocol.GenerationBody, prefix: str) -> Envelope:
        adapters = self._service.names.uses(body, request.headers.get("x-adapter", ""))
        body.model = body.model or self._service.model_name
        return Envelope(
            id=f"{prefix}-{secrets.token_hex(12)}",
            created=int(time.time()),
            adapters=adapters,
            tenant=request.state.tenant,
            arrival=time.monotonic(),
        )

    async def _respond(self, request: Request, job: Job) -> Response | EventStream:
        adapters = job.requests[0].adapters
        headers = {"x-adapter": ",".join(str(use.adapter) for use in adapters)} if adapters else {}
        if job.stream:
            return EventStream(self._stream(job), headers, self._service.config.keep_alive)
        answer = await unless_gone(request.receive, self._answer(job))
        if answer is None:
            return Response(status_code=499)  # nobody reads it: the client has gone away
        body, queue_seconds = answer
        headers["x-queue-ms"] = f"{queue_seconds * 1000:.0f}"
        return Response(body, headers=headers, media_type="application/json")

    async def _stream(self, job: Job) -> AsyncGenerator[bytes, None]:
        service = self._service
        writer = StreamWriter(job, service.engine.tokenizer, service.fingerprint)
        usage = Usage(0, 0)
        async with aclosing(service.run(job)) as events:
            async for prompt, event in events:
                if isinstance(event, Chunk):
                    data = writer.chunk(prompt, event)
                    if data:
                        yield data
                else:
                    usage = add_usage(usage, event.usage)
        yield writer.close(usage)

    async def _answer(self, job: Job) -> tuple[bytes, float]:
        service = self._service
        writer = AnswerWriter(job, service.engine.tokenizer, service.fingerprint)
        usage, queue_seconds = Usage(0, 0), 0.0
        async with aclosing(service.run(job)) as events:
            async for prompt, event in events:
                if isinstance(event, Chunk):
                    writer.chunk(prompt, event)
                else:
                    usage = add_usage(usage, event.usage)
                    queue_seconds = max(queue_seconds, event.queue_seconds)
        return writer.body(usage), queue_seconds
