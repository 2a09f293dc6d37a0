"""Which models there are, and adapters coming and going: /v1/models, /v1/adapters, vLLM's verbs."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from chiliad.adapters.registry import Entry
from chiliad.core import AdapterVersion
from chiliad.errors import AdapterExists, Forbidden, InvalidRequest, ModelNotFound
from chiliad.serve import protocol
from chiliad.serve.http import json_response, read_body
from chiliad.serve.service import Service
from chiliad.serve.uploads import receive_upload

DEFAULT_PAGE = 100
MAX_PAGE = 1000


class Models:
    def __init__(self, service: Service) -> None:
        self._service = service

    # -- /v1/models ----------------------------------------------------------------------------

    async def list_models(self, request: Request) -> Response:
        """The base, then one page of adapters: with ten thousand of them nobody wants all."""
        limit, after, query = _page(request)
        cards = []
        base = self._service.model_name
        if not after and query in base:
            cards.append(self._model(base, self._service.engine.base.name))
        entries, more = await self._adapters(limit, "" if after == base else after, query)
        cards.extend(self._card(entry) for entry in entries)
        return json_response(_list(cards, more))

    async def show_model(self, request: Request) -> Response:
        name = request.path_params["id"]
        if not name:
            raise HTTPException(404)
        version = self._service.names.resolve(name)
        if version is None:
            return json_response(self._model(self._service.model_name, self._service.engine.base.name))
        return json_response(self._card(self._service.engine.registry.entry(str(version))))

    async def delete_model(self, request: Request) -> Response:
        name = self._exact(request.path_params["id"])
        await self._service.remove_adapter(name)
        return json_response({"id": name, "object": "model", "deleted": True})

    def _card(self, entry: Entry) -> dict[str, Any]:
        adapter = entry.adapter
        return self._model(adapter.name, adapter.path, self._service.model_name, int(entry.created))

    def _model(
        self, name: str, root: str, parent: str | None = None, created: int | None = None
    ) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._service.started if created is None else created,
            "owned_by": "chiliad",
            "root": root,
            "parent": parent,
            "max_model_len": self._service.limits.max_model_len,
        }

    # -- vLLM's verbs --------------------------------------------------------------------------

    async def load_lora(self, request: Request) -> Response:
        body = await self._body(request, protocol.LoadAdapterBody)
        folder = await asyncio.to_thread(self._allowed, body.lora_path)
        try:
            await self._service.add_adapter(folder, body.lora_name, body.load_inplace)
        except AdapterExists as error:  # 400 is what vLLM's clients look for
            raise InvalidRequest(
                f"The lora adapter '{body.lora_name}' has already been loaded. To replace it, set "
                "'load_inplace' to true.",
                param="lora_name",
                code=error.code,
            ) from None
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload_lora(self, request: Request) -> Response:
        body = await self._body(request, protocol.UnloadAdapterBody)
        await self._service.remove_adapter(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    # -- /v1/adapters --------------------------------------------------------------------------

    async def list_adapters(self, request: Request) -> Response:
        entries, more = await self._adapters(*_page(request))
        return json_response(_list([_adapter(entry) for entry in entries], more))

    async def add_adapter(self, request: Request) -> Response:
        """Multipart: upload the two files. JSON: a sub-folder of an --adapters folder, by name."""
        if request.headers.get("content-type", "").startswith("multipart/"):
            version = await self._upload(request)
        else:
            body = await self._body(request, protocol.AddAdapterBody)
            folder = await asyncio.to_thread(self._entry, body.folder or body.name)
            version = await self._service.add_adapter(folder, body.name, body.replace)
        return json_response(_adapter(self._service.engine.registry.entry(str(version))), 201)

    async def show_adapter(self, request: Request) -> Response:
        version = self._adapter(request.path_params["name"])
        entry = self._service.engine.registry.entry(str(version))
        status = await self._service.engine.adapter_status(str(version))
        return json_response(_adapter(entry) | {"root": version.path, "status": status})

    async def adapter_stats(self, request: Request) -> Response:
        version = self._adapter(request.path_params["name"])
        return json_response(await self._service.engine.adapter_status(str(version)))

    async def pin_adapter(self, request: Request) -> Response:
        """PUT keeps an adapter in memory, DELETE lets it be evicted again. Says what is now."""
        name = str(self._adapter(request.path_params["name"]))
        await self._service.engine.pin_adapter(name, request.method == "PUT")
        return json_response(await self._service.engine.adapter_status(name))

    async def delete_adapter(self, request: Request) -> Response:
        name = self._exact(request.path_params["name"])
        freed = await self._service.remove_adapter(name)
        return json_response({"id": name, "object": "adapter", "deleted": True, "freed_bytes": freed})

    # -- parts ---------------------------------------------------------------------------------

    async def _body(self, request: Request, kind: type[protocol.S]) -> protocol.S:
        raw = await read_body(request, self._service.config.max_body)
        return protocol.convert(protocol.parse_json(raw), kind)

    def _adapter(self, name: str) -> AdapterVersion:
        """An adapter by name. The base is not one."""
        version = self._service.names.resolve(name)
        if version is None:
            raise ModelNotFound(f"{name!r} is the base model, not an adapter", param="name")
        return version

    def _exact(self, name: str) -> str:
        """A name that may be deleted: not an alias, not one version of several."""
        version = self._adapter(name)
        if version.name != name:
            raise InvalidRequest(f"{name!r} means {version}: delete it as {version.name!r}", param="name")
        return name

    async def _adapters(self, limit: int, after: str, query: str) -> tuple[list[Entry], bool]:
        page = self._service.engine.registry.page
        entries = await asyncio.to_thread(page, limit + 1, after, query)
        return entries[:limit], len(entries) > limit

    async def _upload(self, request: Request) -> AdapterVersion:
        config = self._service.config
        if config.uploads is None:
            raise Forbidden("this server does not take uploads")
        upload = await receive_upload(request, config.uploads, config.max_upload)
        try:
            replace = {"": False, "false": False, "true": True}.get(upload.fields.get("replace", ""))
            if replace is None:
                raise InvalidRequest("replace: write true or false", param="replace")
            return await self._service.add_adapter(upload.folder, upload.fields["name"], replace)
        except BaseException:
            shutil.rmtree(upload.folder, ignore_errors=True)
            raise

    def _roots(self) -> list[Path]:
        roots = self._service.config.adapter_dirs
        if not roots:
            raise Forbidden("this server was started without --adapters DIR, so it loads from no folder")
        return [root.resolve() for root in roots]

    def _entry(self, name: str) -> Path:
        """The sub-folder that is called `name`. Compared with what is there, never joined to a path."""
        for root in self._roots():
            with os.scandir(root) as entries:
                for entry in entries:
                    if entry.name == name and entry.is_dir(follow_symlinks=False):
                        return Path(entry.path)
        raise ModelNotFound(
            f"no --adapters folder has a sub-folder {name!r}", param="folder", code="adapter_not_found"
        )

    def _allowed(self, path: str) -> Path:
        """A client's path, if it lies inside an --adapters folder after following all links.

        Outside, the answer is the same whether something is there or not.
        """
        for root in self._roots():
            try:
                folder = (root / path).resolve()  # an absolute path replaces root
                inside, found = folder != root and folder.is_relative_to(root), folder.is_dir()
            except (OSError, ValueError, RuntimeError):  # too long, NUL, loop of links
                continue
            if inside and found:
                return folder
            if inside:
                raise ModelNotFound(
                    f"No adapter found for {path!r}", param="lora_path", code="adapter_not_found"
                )
        raise Forbidden(
            "lora_path lies outside the folders that the server was started with (--adapters)",
            param="lora_path",
        )


def _adapter(entry: Entry) -> dict[str, Any]:
    adapter = entry.adapter
    return {
        "id": adapter.name,
        "object": "adapter",
        "created": int(entry.created),
        "updated": int(entry.updated),
        "version": adapter.version,
        "digest": adapter.digest,
        "bytes": adapter.nbytes,
        "method": entry.method,
        "max_rank": entry.max_rank,
        "base": entry.base_name,
    }


def _list(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
    return {"object": "list", "data": data, "has_more": more} | ends


def _page(request: Request) -> tuple[int, str, str]:
    """(limit, after, query) of a listing."""
    query = request.query_params
    text = query.get("limit", str(DEFAULT_PAGE))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MAX_PAGE):
        raise InvalidRequest(f"limit must be between 1 and {MAX_PAGE}", param="limit")
    return int(text), query.get("after", ""), query.get("q", "")
