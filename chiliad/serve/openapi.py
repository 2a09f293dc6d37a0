"""GET /openapi.json: made from the structs that parse the bodies, so that it cannot drift far."""

from __future__ import annotations

import functools
from typing import Any

import msgspec

from chiliad import __version__
from chiliad.serve import protocol

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_UPLOAD = {
    "type": "object",
    "required": ["name", "config", "model"],
    "properties": {
        "name": {"type": "string"},
        "replace": {"type": "string", "enum": ["true", "false"]},
        "config": {"type": "string", "format": "binary", "description": "adapter_config.json"},
        "model": {"type": "string", "format": "binary", "description": "adapter_model.safetensors"},
    },
}
_OBJECT = {"application/json": {"schema": {"type": "object"}}}
_TEXT = {"text/plain": {"schema": {"type": "string"}}}
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}

_PAGE = [
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 1000}},
    {
        "name": "after",
        "in": "query",
        "schema": {"type": "string"},
        "description": "last id of the page before",
    },
    {"name": "q", "in": "query", "schema": {"type": "string"}, "description": "only names that contain this"},
]

BODIES = (
    protocol.ChatBody,
    protocol.CompletionBody,
    protocol.TokenizeBody,
    protocol.DetokenizeBody,
    protocol.LoadAdapterBody,
    protocol.UnloadAdapterBody,
    protocol.AddAdapterBody,
)


def _path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _operation(
    summary: str,
    *,
    body: type[msgspec.Struct] | None = None,
    upload: bool = False,
    parameters: list[dict[str, Any]] | None = None,
    answer: dict[str, Any] = _OBJECT,
    status: str = "200",
    open_: bool = False,
) -> dict[str, Any]:
    failures = {
        "4XX": {"$ref": "#/components/responses/Error"},
        "5XX": {"$ref": "#/components/responses/Error"},
    }
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {status: {"description": "Success", "content": answer}} | failures,
    }
    if parameters:
        operation["parameters"] = parameters
    if body is not None:
        reference = {"$ref": f"#/components/schemas/{body.__name__}"}
        content: dict[str, Any] = {"application/json": {"schema": reference}}
        if upload:
            content["multipart/form-data"] = {"schema": _UPLOAD}
        operation["requestBody"] = {"required": True, "content": content}
    if open_:
        operation["security"] = []
    return operation


@functools.cache
def openapi() -> dict[str, Any]:
    """The document (OpenAPI 3.1)."""
    _, schemas = msgspec.json.schema_components(BODIES, ref_template="#/components/schemas/{name}")
    model, adapter = _path("id"), _path("name")
    paths = {
        "/v1/chat/completions": {
            "post": _operation("Answer a conversation", body=protocol.ChatBody, answer=_OBJECT | _STREAM)
        },
        "/v1/completions": {
            "post": _operation("Continue prompts", body=protocol.CompletionBody, answer=_OBJECT | _STREAM)
        },
        "/tokenize": {"post": _operation("Text to token ids", body=protocol.TokenizeBody)},
        "/detokenize": {"post": _operation("Token ids to text", body=protocol.DetokenizeBody)},
        "/v1/models": {"get": _operation("The base model and a page of adapters", parameters=_PAGE)},
        "/v1/models/{id}": {
            "get": _operation("One model", parameters=[model]),
            "delete": _operation("Remove an adapter", parameters=[model]),
        },
        "/v1/load_lora_adapter": {
            "post": _operation("Add an adapter (vLLM)", body=protocol.LoadAdapterBody, answer=_TEXT)
        },
        "/v1/unload_lora_adapter": {
            "post": _operation("Remove an adapter (vLLM)", body=protocol.UnloadAdapterBody, answer=_TEXT)
        },
        "/v1/adapters": {
            "get": _operation("A page of adapters", parameters=_PAGE),
            "post": _operation(
                "Add an adapter from an allowed folder or by upload",
                body=protocol.AddAdapterBody,
                upload=True,
                status="201",
            ),
        },
        "/v1/adapters/{name}": {
            "get": _operation("One adapter", parameters=[adapter]),
            "delete": _operation("Remove an adapter", parameters=[adapter]),
        },
        "/v1/adapters/{name}/stats": {"get": _operation("What one adapter does", parameters=[adapter])},
        "/v1/adapters/{name}/pin": {
            "put": _operation("Keep an adapter in memory", parameters=[adapter]),
            "delete": _operation("Let it be evicted again", parameters=[adapter]),
        },
        "/v1/pool": {"get": _operation("Who has the memory and who waits for it")},
        "/health": {"get": _operation("Ready to answer", open_=True)},
        "/ping": {
            "get": _operation("Ready to answer", open_=True),
            "post": _operation("Ready to answer", open_=True),
        },
        "/version": {"get": _operation("Version of the server", open_=True)},
        "/metrics": {"get": _operation("Prometheus metrics", answer=_TEXT)},
        "/openapi.json": {"get": _operation("This document")},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "chiliad", "version": __version__},
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": schemas | {"Error": _ERROR},
            "responses": {
                "Error": {
                    "description": "What is wrong and what to do next",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
            },
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }
