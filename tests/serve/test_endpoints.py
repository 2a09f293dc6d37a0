"""Translation: bodies to requests, events to answers, errors to statuses; over the fake engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_fake import Connect, FakeEngine

from chiliad.errors import Overloaded

HI = [{"role": "user", "content": "hi"}]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Parsed data lines of a stream, which must end with [DONE]."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(b.removeprefix("data: ")) for b in blocks[:-2] if not b.startswith(":")]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"]
    return body


async def chat(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={"model": "tiny", "messages": HI} | body)


async def complete(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": "tiny", "prompt": "hi"} | body)


# -- chat --------------------------------------------------------------------------------------


async def test_chat(connect: Connect, engine: FakeEngine) -> None:
    async with connect() as client:
        response = await chat(client)
    body = response.json()
    assert response.status_code == 200, body
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello from base.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    (request,) = engine.requests
    assert body["usage"]["prompt_tokens"] == len(request.prompt)
    assert body["usage"]["total_tokens"] == len(request.prompt) + body["usage"]["completion_tokens"]
    assert engine.tokenizer.decode(list(request.prompt), skip_special=False) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert request.params.max_tokens == engine.max_model_len - len(request.prompt)
    assert response.headers["x-queue-ms"] == "250"
    assert response.headers["x-request-id"]


async def test_chat_stream(connect: Connect) -> None:
    async with connect() as client:
        chunks = events(await chat(client, stream=True, stream_options={"include_usage": True}))
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert text == "Hello from base."
    assert chunks[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 3


async def test_stream_without_usage_has_no_usage_key(connect: Connect) -> None:
    async with connect() as client:
        assert all("usage" not in c for c in events(await chat(client, stream=True)))


async def test_continuous_usage(connect: Connect) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with connect() as client:
        chunks = events(await chat(client, stream=True, stream_options=options))
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == counts[-2] > 1


async def test_several_choices_stream_apart(connect: Connect) -> None:
    async with connect() as client:
        chunks = events(await chat(client, stream=True, n=3))
        whole = (await chat(client, n=3)).json()["choices"]
    for index in range(3):
        deltas = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert deltas[0]["delta"]["role"] == "assistant"
        assert "".join(d["delta"].get("content", "") for d in deltas) == whole[index]["message"]["content"]
        assert deltas[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(connect: Connect, engine: FakeEngine, stream: bool) -> None:
    async with connect() as client:
        response = await chat(client, logprobs=True, top_logprobs=2, stream=stream, max_tokens=4)
    if stream:
        choices = [c["choices"][0] for c in events(response)]
        content = [item for c in choices if c["logprobs"] for item in c["logprobs"]["content"]]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    ids = engine.tokenizer.encode("Hello from base.", add_special=False)
    for item, token in zip(content, ids, strict=False):
        assert item["token"] == engine.tokenizer.token_text(token)
        assert bytes(item["bytes"]) == engine.tokenizer.token_bytes(token)
        assert item["logprob"] == -0.5
        assert [top["logprob"] for top in item["top_logprobs"]] == [-0.5, -9999.0]


async def test_sampling_fields_reach_the_engine(connect: Connect, engine: FakeEngine) -> None:
    async with connect() as client:
        await chat(
            client, temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, seed=-7, stop="x", n=2, min_tokens=1,
            logit_bias={"5": -100, "6": 2}, max_completion_tokens=9, max_tokens=5, presence_penalty=1,
            frequency_penalty=-1, repetition_penalty=1.5, stop_token_ids=[3], ignore_eos=True,
            include_stop_str_in_output=True, skip_special_tokens=False, priority=3, cache_salt="s",
        )  # fmt: skip
    (request,) = engine.requests
    p = request.params
    assert (p.temperature, p.top_p, p.top_k, p.min_p, p.seed, p.stop) == (0.5, 0.9, 0, 0.1, -7, ("x",))
    assert (p.n, p.min_tokens, p.max_tokens, p.logit_bias) == (2, 1, 9, {5: -100, 6: 2})
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (1, -1, 1.5)
    assert (p.stop_token_ids, p.ignore_eos, p.include_stop_str_in_output) == ((3,), True, True)
    assert (p.skip_special_tokens, request.priority, request.cache_salt) == (False, 3, "s")


async def test_harmless_fields_are_accepted(connect: Connect) -> None:
    body = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "parallel_tool_calls": False,
        "user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "stop": None,
        "seed": None,
        "functions": None, "stream_options": None, "nobody_knows_this": 1, "modalities": ["text"],
    }  # fmt: skip
    async with connect() as client:
        assert (await chat(client, **body)).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("audio", {"voice": "a"}),
        ("store", True),
        ("reasoning_effort", "high"),
        ("guided_json", {}),
        ("structured_outputs", {"regex": "a"}),
        ("prompt_logprobs", 1),
        ("chat_template", "{{ x }}"),
        ("use_beam_search", True),
    ],
)
async def test_known_but_unsupported_fields_are_refused_by_name(
    connect: Connect, field: str, value: object
) -> None:
    async with connect() as client:
        body = error(await chat(client, **{field: value}), 400)
    assert body["code"] == "unsupported_field"
    assert body["param"] == field
    assert field in body["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.5),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("n", 0),
        ("n", 10_000),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_completion_tokens", 0),
        ("presence_penalty", 3),
        ("repetition_penalty", 0),
        ("min_p", 1.5),
        ("min_tokens", 10**6),
        ("seed", 2**64),
        ("stop", ["a"] * 17),
        ("stop", [""]),
        ("stop", [1]),
        ("stop_token_ids", [10**6]),
        ("top_logprobs", 3),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"99999999": 1}),
        ("logit_bias", {"1": 101}),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("messages", []),
        ("messages", "hi"),
        ("messages", [{"role": "user"}]),
        ("messages", [{"content": "x"}]),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("chat_template_kwargs", {"messages": []}),
        ("chat_template_kwargs", {"self": 1}),
        ("model", 7),
        ("adapter", {"scale": 2}),
    ],
)
async def test_bad_values_are_refused_and_named(connect: Connect, field: str, value: object) -> None:
    async with connect() as client:
        body = error(await chat(client, **{field: value}), 400)
    assert body["type"] == "invalid_request_error"
    assert body["param"], body
    assert field.split("_")[0] in body["param"] or field == "n"


async def test_top_logprobs_cap(connect: Connect) -> None:
    async with connect() as client:
        assert error(await chat(client, logprobs=True, top_logprobs=21), 400)["param"] == "top_logprobs"


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"temperature": NaN}', b"[" * 5000])
async def test_broken_bodies(connect: Connect, raw: bytes) -> None:
    async with connect() as client:
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/load_lora_adapter"):
            error(await client.post(path, content=raw), 400)


async def test_body_cap(connect: Connect) -> None:
    async with connect(max_body=1000) as client:
        assert error(await complete(client, prompt="x" * 2000), 413)["code"] == "payload_too_large"

        async def pieces() -> Any:
            for _ in range(20):
                yield b"x" * 100

        error(await client.post("/v1/completions", content=pieces()), 413)


async def test_context_length(connect: Connect) -> None:
    async with connect() as client:
        body = error(await chat(client, max_tokens=1000), 400)
        assert body["code"] == "context_length_exceeded"
        assert error(await chat(client, max_tokens=1000, stream=True), 400)["code"] == body["code"]


async def test_content_parts(connect: Connect, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    async with connect() as client:
        response = await chat(client, messages=[{"role": "developer", "content": parts}])
    assert response.status_code == 200
    text = engine.tokenizer.decode(list(engine.requests[0].prompt), skip_special=False)
    assert text.startswith("<|im_start|>system\none\ntwo<|im_end|>")


async def test_stop_string_split_across_tokens(connect: Connect) -> None:
    async with connect() as client:
        whole = (await chat(client, stop=["from b"])).json()["choices"][0]
        chunks = events(await chat(client, stop=["from b"], stream=True))
    assert whole["message"]["content"] == "Hello "
    assert (whole["finish_reason"], whole["stop_reason"]) == ("stop", "from b")
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Hello "


async def test_multi_byte_characters_stay_whole(connect: Connect, engine: FakeEngine) -> None:
    engine.script = lambda request: 'naïve 你好 🙂🙂 \u2028 "quoted" \\ </script>'
    async with connect() as client:
        chunks = events(await chat(client, stream=True))
        whole = (await chat(client)).json()["choices"][0]["message"]["content"]
    assert (
        "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == whole == engine.script(None)
    )  # type: ignore[arg-type]


# -- errors of the engine ----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_failure_before_the_first_token_is_plain_http(
    connect: Connect, engine: FakeEngine, stream: bool
) -> None:
    engine.script = lambda request: Overloaded("the queue is full", retry_after=2.0)
    async with connect() as client:
        response = await chat(client, stream=stream)
    assert error(response, 429)["code"] == "overloaded"
    assert response.headers["retry-after"] == "2"


async def test_unforeseen_failure_does_not_leak(connect: Connect, engine: FakeEngine) -> None:
    engine.script = lambda request: RuntimeError("secret path")
    async with connect(strict=False) as client:
        body = error(await chat(client), 500)
    assert "secret" not in json.dumps(body)
    assert body["code"] == "internal_error"


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
async def test_failure_in_mid_stream(connect: Connect, engine: FakeEngine, prompt: object) -> None:
    engine.break_at = 2
    async with connect() as client:
        response = await complete(client, prompt=prompt, stream=True)
        whole = await complete(client, prompt=prompt)
    assert response.status_code == 200
    chunks = events(response)
    assert chunks[0]["choices"][0]["text"]
    assert chunks[-1] == {"error": error_of("out_of_memory", "the pool is full", "server_error")}
    assert error(whole, 503)["code"] == "out_of_memory"


def error_of(code: str, message: str, kind: str) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": None, "code": code}


# -- completions -------------------------------------------------------------------------------


async def test_completion_prompt_shapes(connect: Connect, engine: FakeEngine) -> None:
    ids = engine.tokenizer.encode("hi there")
    async with connect() as client:
        for prompt, count in [("hi there", 1), (["hi there"] * 2, 2), (ids, 1), ([ids, ids, ids], 3)]:
            engine.requests.clear()
            body = (await complete(client, prompt=prompt, n=2, max_tokens=3)).json()
            assert [c["index"] for c in body["choices"]] == list(range(2 * count))
            assert [r.prompt for r in engine.requests] == [tuple(ids)] * count
            assert body["usage"]["prompt_tokens"] == len(ids) * count
            assert body["usage"]["completion_tokens"] == 3 * 2 * count
            assert all(c["finish_reason"] == "length" for c in body["choices"])


async def test_completion_defaults(connect: Connect, engine: FakeEngine) -> None:
    engine.script = lambda request: "word " * 100
    async with connect() as client:
        body = (await complete(client)).json()
    assert body["object"] == "text_completion"
    assert body["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [1.5], [["a"]], {"a": 1}, [-1], [10**9], [1, "a"], [True], [[1], "a", None]]
)
async def test_bad_prompts(connect: Connect, prompt: object) -> None:
    async with connect() as client:
        assert error(await complete(client, prompt=prompt), 400)["param"].startswith("prompt")


@pytest.mark.parametrize(
    ("field", "value"), [("suffix", "end"), ("best_of", 2), ("logprobs", 21), ("echo", 1)]
)
async def test_completion_refusals(connect: Connect, field: str, value: object) -> None:
    async with connect() as client:
        assert error(await complete(client, **{field: value}), 400)["param"] == field


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_echo_with_logprobs(connect: Connect, engine: FakeEngine, stream: bool) -> None:
    async with connect() as client:
        response = await complete(
            client, prompt="hi there", echo=True, logprobs=1, max_tokens=3, stream=stream
        )
    choices = [c["choices"][0] for c in events(response)] if stream else response.json()["choices"]
    text = "".join(c["text"] for c in choices)
    logprobs = [c["logprobs"] for c in choices if c["logprobs"]]
    assert text.startswith("hi thereHel")
    tokens = [t for lp in logprobs for t in lp["tokens"]]
    offsets = [o for lp in logprobs for o in lp["text_offset"]]
    values = [v for lp in logprobs for v in lp["token_logprobs"]]
    tops = [t for lp in logprobs for t in lp["top_logprobs"]]
    assert "".join(tokens) == text
    assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))]
    assert values == [None] + [-0.5] * (len(tokens) - 1)
    assert tops[0] is None
    assert tops[1] == {tokens[1]: -0.5}
    assert engine.requests[0].params.prompt_logprobs == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_alone(connect: Connect, stream: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    async with connect() as client:
        response = await complete(
            client, prompt="hi there", echo=True, max_tokens=0, stream=stream, **options
        )
        error(await complete(client, max_tokens=0), 400)
    if stream:
        chunks = events(response)
        assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "hi there"
        assert chunks[-1]["usage"]["completion_tokens"] == 0
    else:
        assert response.json()["choices"][0]["text"] == "hi there"
        assert response.json()["usage"]["completion_tokens"] == 0


async def test_return_token_ids(connect: Connect, engine: FakeEngine) -> None:
    async with connect() as client:
        choice = (await complete(client, return_token_ids=True, max_tokens=4)).json()["choices"][0]
        chunks = events(await complete(client, return_token_ids=True, max_tokens=4, stream=True))
    assert choice["prompt_token_ids"] == list(engine.requests[0].prompt)
    streamed = [t for c in chunks for t in c["choices"][0]["token_ids"]]
    assert streamed == choice["token_ids"]
    assert len(streamed) == 4


async def test_prompts_times_n_is_capped(connect: Connect) -> None:
    async with connect(max_choices=4) as client:
        assert (await complete(client, prompt=["a", "b"], n=2)).status_code == 200
        error(await complete(client, prompt=["a", "b", "c"], n=2), 400)
        error(await chat(client, n=5), 400)


# -- names -------------------------------------------------------------------------------------


async def test_names(connect: Connect, engine: FakeEngine, adapters: Path) -> None:
    engine.registry.scan(adapters)

    async def who(**body: Any) -> str:
        response = await chat(client, **body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"]).removeprefix("Hello from ")

    async with connect(model_name="served") as client:
        for base in ("served", "tiny", "org/tiny", ""):
            assert await who(model=base) == "base."
            if base:
                assert await who(model=f"{base}:red") == "red*1."
        assert await who(model="red") == "red*1."
        assert await who(model="red@1") == "red*1."
        assert await who(model="tiny", adapter="blue") == "blue*1."
        assert await who(model="tiny", adapter={"id": "blue", "scale": 0.5}) == "blue*0.5."
        mix = [{"id": "red", "scale": 2}, {"id": "blue"}]
        assert await who(model="tiny", adapters=mix) == "red*2+blue*1."
        response = await chat(client, model="red")
        assert response.json()["model"] == "red"
        assert response.headers["x-adapter"] == "red@1"
        by_header = await client.post(
            "/v1/chat/completions", json={"messages": HI}, headers={"x-adapter": "blue"}
        )
        assert by_header.headers["x-adapter"] == "blue@1"
        error(await chat(client, model="red", adapter="blue"), 400)
        error(await chat(client, model="tiny", adapter="blue", adapters=mix), 400)
        error(await chat(client, model="tiny", adapters=mix * 5), 400)


@pytest.mark.parametrize(
    "name",
    ["nobody", "tiny:nobody", "tiny:", "../red", "/etc/passwd", "red/../blue", "a" * 5000, "\x00", ":", "红"],
)
async def test_unknown_models(connect: Connect, name: str) -> None:
    async with connect() as client:
        for response in (await chat(client, model=name), await chat(client, model=name, stream=True)):
            body = error(response, 404)
            assert body["code"] == "model_not_found"
        assert error(await chat(client, adapter=name), 404)["code"] == "model_not_found"


async def test_models_are_paged(connect: Connect, engine: FakeEngine, adapters: Path) -> None:
    engine.registry.scan(adapters)
    async with connect() as client:
        body = (await client.get("/v1/models")).json()
        assert [card["id"] for card in body["data"]] == ["tiny", "blue", "red"]
        assert not body["has_more"]
        card = body["data"][2]
        assert (card["object"], card["parent"], card["root"]) == ("model", "tiny", str(adapters / "red"))
        assert body["data"][0]["parent"] is None
        assert body["data"][0]["max_model_len"] == 512
        page = (await client.get("/v1/models", params={"limit": 1})).json()
        assert ([c["id"] for c in page["data"]], page["has_more"]) == (["tiny", "blue"], True)
        page = (await client.get("/v1/models", params={"limit": 1, "after": page["last_id"]})).json()
        assert ([c["id"] for c in page["data"]], page["has_more"]) == (["red"], False)
        assert [c["id"] for c in (await client.get("/v1/models?q=ed")).json()["data"]] == ["red"]
        assert (await client.get("/v1/models?q=zzz")).json()["data"] == []
        assert (await client.get("/v1/models/red")).json() == card
        assert (await client.get("/v1/models/tiny")).json()["id"] == "tiny"
        assert error(await client.get("/v1/models/nobody"), 404)["code"] == "model_not_found"
        for limit in ("0", "1001", "x", "-1", ""):
            error(await client.get("/v1/models", params={"limit": limit}), 400)
        assert (await client.delete("/v1/models/red")).json() == {
            "id": "red",
            "object": "model",
            "deleted": True,
        }
        error(await client.delete("/v1/models/red"), 404)
        error(await client.delete("/v1/models/tiny"), 404)


# -- tokenizer, health, metrics ----------------------------------------------------------------


async def test_tokenize_and_back(connect: Connect, engine: FakeEngine) -> None:
    async with connect() as client:
        body = (await client.post("/tokenize", json={"prompt": "hi there", "return_token_strs": True})).json()
        assert body["tokens"] == engine.tokenizer.encode("hi there")
        assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), 512)
        assert "".join(body["token_strs"]) == "hi there"
        back = await client.post("/detokenize", json={"tokens": body["tokens"]})
        assert back.json() == {"prompt": "hi there"}
        chatty = (await client.post("/tokenize", json={"messages": HI})).json()["tokens"]
        assert engine.tokenizer.decode(chatty, skip_special=False).endswith("assistant\n")
        error(await client.post("/tokenize", json={}), 400)
        error(await client.post("/tokenize", json={"prompt": "x", "model": "nobody"}), 404)
        error(await client.post("/detokenize", json={"tokens": [10**9]}), 400)


async def test_health_version_and_router_errors(connect: Connect, engine: FakeEngine) -> None:
    async with connect() as client:
        for path in ("/health", "/ping", "/version"):
            assert (await client.get(path)).status_code == 200
        assert error(await client.get("/nothing"), 404)["code"] == "not_found"
        assert error(await client.get("/v1/chat/completions"), 405)["code"] == "method_not_allowed"
        assert error(await client.put("/v1/models/red"), 405)["code"] == "method_not_allowed"
        error(await client.get("/v1/models/"), 404)
        engine.error = "boom"
        error(await client.get("/health"), 503)
        engine.error = ""
        client.service.draining = True
        assert error(await client.get("/health"), 503)["code"] == "unavailable"
        response = await chat(client)
        error(response, 503)
        assert response.headers["retry-after"]


async def test_metrics(connect: Connect) -> None:
    async with connect() as client:
        await chat(client, n=2)
        await chat(client, model="nobody")
        text = (await client.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name in (
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens", "vllm:generation_tokens", "vllm:request_success",
        "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds", "vllm:request_queue_time_seconds",
        "vllm:request_prefill_time_seconds", "vllm:request_decode_time_seconds",
        "vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:lora_requests_info",
        "adapters_registered", "adapters_resident", "adapter_loads", "adapter_load_seconds",
        "adapter_evictions", "adapter_cache_hits", "adapter_cache_misses", "batch_distinct_adapters",
        "process_resident_memory_bytes",
    ):  # fmt: skip
        assert name in families, name
    success = {s.labels["finished_reason"]: s.value for s in families["vllm:request_success"].samples
               if s.name.endswith("_total")}  # fmt: skip
    assert success["stop"] == 2
    assert families["vllm:kv_cache_usage_perc"].samples[0].value == 0.25
    pages = {s.labels["owner"]: s.value for s in families["pool_pages"].samples}
    assert pages == {"kv": 25, "adapter": 10, "free": 65}
    info = families["vllm:lora_requests_info"].samples[0]
    assert info.labels["running_lora_adapters"] == "a,b"
    count = next(s for s in families["vllm:e2e_request_latency_seconds"].samples if s.name.endswith("_count"))
    assert count.value == 1


async def test_openapi_names_every_route(connect: Connect) -> None:
    async with connect() as client:
        document = (await client.get("/openapi.json")).json()
        for path, operations in document["paths"].items():
            for method in operations:
                response = await client.request(
                    method, path.replace("{id}", "x").replace("{name}", "x"), content=b"{}"
                )
                assert response.status_code in (200, 400, 404), (method, path, response.text)
                assert response.status_code != 404 or response.json()["error"]["code"] != "not_found"
    references = set(json.dumps(document).split('"#/components/')[1:])
    for reference in references:
        section, name = reference.split('"')[0].split("/")
        assert name in document["components"][section]
