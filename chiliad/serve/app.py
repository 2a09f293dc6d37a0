"""The routes of one server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from chiliad import __version__
from chiliad.errors import ChiliadError
from chiliad.serve.completions import Completions
from chiliad.serve.http import Edge, json_response, on_error, on_gone, on_http_error
from chiliad.serve.metrics import CONTENT_TYPE, Exporter
from chiliad.serve.models import Models
from chiliad.serve.openapi import openapi
from chiliad.serve.pool import pool_map
from chiliad.serve.service import Service
from chiliad.serve.uploads import sweep


def create_app(service: Service) -> ASGIApp:
    """The ASGI application; it starts and stops the engine with its lifespan."""
    completions, models = Completions(service), Models(service)
    exporter = Exporter(service.model_name)

    async def health(request: Request) -> Response:
        """Ready: started, not draining, the engine alive. No single adapter matters."""
        service.check_ready()
        return json_response({"status": "ok"})

    async def version(request: Request) -> Response:
        return json_response({"version": __version__})

    async def metrics(request: Request) -> Response:
        stats = await service.engine.stats()
        return Response(exporter.render(stats, service.metrics), headers={"content-type": CONTENT_TYPE})

    async def pool(request: Request) -> Response:
        return json_response(pool_map(await service.engine.stats(), service.engine.settings))

    async def describe(request: Request) -> Response:
        return json_response(openapi())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if service.config.uploads is not None:
            sweep(service.config.uploads)
        await service.engine.start()
        report = asyncio.ensure_future(service.report())
        try:
            yield
        finally:
            report.cancel()
            await asyncio.gather(report, return_exceptions=True)
            await service.engine.stop()

    routes = [
        Route("/v1/chat/completions", completions.chat, methods=["POST"]),
        Route("/v1/completions", completions.complete, methods=["POST"]),
        Route("/tokenize", completions.tokenize, methods=["POST"]),
        Route("/detokenize", completions.detokenize, methods=["POST"]),
        Route("/v1/models", models.list_models, methods=["GET"]),
        Route("/v1/models/{id:path}", models.show_model, methods=["GET"]),
        Route("/v1/models/{id:path}", models.delete_model, methods=["DELETE"]),
        Route("/v1/load_lora_adapter", models.load_lora, methods=["POST"]),
        Route("/v1/unload_lora_adapter", models.unload_lora, methods=["POST"]),
        Route("/v1/adapters", models.list_adapters, methods=["GET"]),
        Route("/v1/adapters", models.add_adapter, methods=["POST"]),
        Route("/v1/adapters/{name:path}/stats", models.adapter_stats, methods=["GET"]),
        Route("/v1/adapters/{name:path}/pin", models.pin_adapter, methods=["PUT", "DELETE"]),
        Route("/v1/adapters/{name:path}", models.show_adapter, methods=["GET"]),
        Route("/v1/adapters/{name:path}", models.delete_adapter, methods=["DELETE"]),
        Route("/health", health, methods=["GET"]),
        Route("/ping", health, methods=["GET", "POST"]),
        Route("/version", version, methods=["GET"]),
        Route("/v1/pool", pool, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", describe, methods=["GET"]),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={
            ChiliadError: on_error,
            HTTPException: on_http_error,
            ClientDisconnect: on_gone,
            Exception: on_error,
        },
    )
    app.router.redirect_slashes = False
    return Edge(app, service.config.api_keys)
