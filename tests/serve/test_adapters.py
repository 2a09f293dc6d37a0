"""Adapters over HTTP: vLLM's verbs, uploads, folders; and what must never get in."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_fake import Connect, FakeEngine
from test_endpoints import chat, error

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"


async def load(client: httpx.AsyncClient, name: str, path: object, **more: Any) -> httpx.Response:
    return await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)} | more)


def files(folder: Path) -> dict[str, tuple[str, bytes]]:
    return {
        "config": (CONFIG, (folder / CONFIG).read_bytes()),
        "model": (MODEL, (folder / MODEL).read_bytes()),
    }


async def test_vllm_verbs(connect: Connect, adapters: Path) -> None:
    async with connect() as client:
        response = await load(client, "sql", adapters / "red")
        assert response.status_code == 200
        assert response.text == "Success: LoRA adapter 'sql' added successfully."
        assert (await chat(client, model="sql")).headers["x-adapter"] == "sql@1"
        taken = error(await load(client, "sql", adapters / "blue"), 400)
        assert "already been loaded" in taken["message"]
        assert (await load(client, "sql", adapters / "blue", load_inplace=True)).status_code == 200
        assert (await chat(client, model="sql")).headers["x-adapter"] == "sql@2"
        assert (await load(client, "relative", "red")).status_code == 200
        gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "sql"})
        assert gone.text == "Success: LoRA adapter 'sql' removed successfully."
        error(await client.post("/v1/unload_lora_adapter", json={"lora_name": "sql"}), 404)
        assert error(await chat(client, model="sql"), 404)["code"] == "model_not_found"
        assert (adapters / "blue" / MODEL).exists()


async def test_paths_outside_are_refused(connect: Connect, adapters: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (adapters / "red").rename(outside)
    os.symlink(outside, adapters / "link")
    os.symlink("loop", adapters / "loop")
    (adapters / "file").write_text("x")
    async with connect() as client:
        for path in (
            outside, "/etc", "/nowhere", "../outside", "blue/../../outside", adapters / "link", "link",
            adapters, ".", "", adapters / "blue" / "..", "\x00", "x" * 10_000, "loop", "~", "file:///etc",
            "https://example.org/adapter", "org/name",
        ):  # fmt: skip
            response = await load(client, "x", path)
            assert response.status_code in (400, 403, 404), path
            assert "outside" not in response.text or response.status_code == 403
        for path in (outside, "/etc", "/nowhere", "../outside", adapters / "link", adapters, "."):
            assert error(await load(client, "x", path), 403)["code"] == "forbidden"
        assert error(await load(client, "x", "absent"), 404)["code"] == "adapter_not_found"
        error(await load(client, "x", "file"), 404)
        assert (await client.get("/v1/adapters")).json()["data"] == []
    async with connect(adapter_dirs=()) as client:
        assert "--adapters" in error(await load(client, "x", adapters / "blue"), 403)["message"]


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "a" * 129, ".hidden", "a b", "a:b", "a@1", "é", "x\n", "tiny", "org/tiny"]
)
async def test_bad_names(connect: Connect, adapters: Path, name: str) -> None:
    async with connect() as client:
        response = await load(client, name, "red")
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] in ("name", "lora_name")
        upload = await client.post("/v1/adapters", data={"name": name}, files=files(adapters / "red"))
        assert upload.status_code in (400, 409), upload.text
        assert not list((client.service.config.uploads).iterdir())


async def test_add_by_name_from_an_allowed_folder(connect: Connect, adapters: Path) -> None:
    async with connect() as client:
        response = await client.post("/v1/adapters", json={"name": "red"})
        assert response.status_code == 201
        body = response.json()
        assert (body["id"], body["version"], body["max_rank"], body["method"]) == ("red", 1, 4, "lora")
        assert error(await client.post("/v1/adapters", json={"name": "red"}), 409)["code"] == "adapter_exists"
        again = await client.post("/v1/adapters", json={"name": "red", "folder": "blue", "replace": True})
        assert again.json()["version"] == 2
        for folder in ("..", ".", "nobody", "red/../blue", str(adapters / "blue"), ""):
            error(await client.post("/v1/adapters", json={"name": "y", "folder": folder}), 404)


async def test_list_show_stats_delete(connect: Connect, engine: FakeEngine, adapters: Path) -> None:
    engine.registry.scan(adapters)
    async with connect() as client:
        page = (await client.get("/v1/adapters?limit=1")).json()
        assert ([a["id"] for a in page["data"]], page["has_more"]) == (["blue"], True)
        shown = (await client.get("/v1/adapters/red")).json()
        assert shown["root"] == str(adapters / "red")
        assert shown["status"]["state"] == "resident"
        assert (await client.get("/v1/adapters/red/stats")).json() == shown["status"]
        pinned = await client.put("/v1/adapters/red/pin")
        assert (pinned.status_code, pinned.json()["state"], engine.pinned) == (200, "resident", {"red@1"})
        assert (await client.get("/v1/pool")).json()["adapters"]["pinned"] == 1
        await client.delete("/v1/adapters/red/pin")
        assert not engine.pinned
        error(await client.put("/v1/adapters/tiny/pin"), 404)
        assert "red@1" in error(await client.delete("/v1/adapters/red@1"), 400)["message"]
        gone = (await client.delete("/v1/adapters/red")).json()
        assert (gone["deleted"], gone["freed_bytes"]) == (True, shown["bytes"])
        for method, path in (("GET", ""), ("GET", "/stats"), ("DELETE", "")):
            error(await client.request(method, f"/v1/adapters/red{path}"), 404)
        error(await client.get("/v1/adapters/tiny"), 404)
        assert (adapters / "red" / MODEL).exists()


# -- uploads -----------------------------------------------------------------------------------


async def test_upload(connect: Connect, adapters: Path) -> None:
    async with connect() as client:
        uploads = client.service.config.uploads
        response = await client.post("/v1/adapters", data={"name": "mine"}, files=files(adapters / "red"))
        assert response.status_code == 201, response.text
        (folder,) = uploads.iterdir()
        assert sorted(p.name for p in folder.iterdir()) == [CONFIG, MODEL]
        assert (folder / MODEL).read_bytes() == (adapters / "red" / MODEL).read_bytes()
        assert (await chat(client, model="mine")).status_code == 200
        taken = await client.post("/v1/adapters", data={"name": "mine"}, files=files(adapters / "blue"))
        error(taken, 409)
        assert list(uploads.iterdir()) == [folder]
        fields = {"name": "mine", "replace": "true"}
        assert (
            await client.post("/v1/adapters", data=fields, files=files(adapters / "blue"))
        ).status_code == 201
        assert (await chat(client, model="mine")).headers["x-adapter"] == "mine@2"
        assert (await chat(client, model="mine@1")).headers["x-adapter"] == "mine@1"
        await client.delete("/v1/adapters/mine")
        assert list(uploads.iterdir()) == []


async def test_deleted_files_stay_while_a_request_reads_them(
    connect: Connect, engine: FakeEngine, adapters: Path
) -> None:
    async with connect() as client:
        uploads = client.service.config.uploads
        await client.post("/v1/adapters", data={"name": "mine"}, files=files(adapters / "red"))
        engine.pause.clear()
        running = asyncio.ensure_future(chat(client, model="mine"))
        while not engine.live:
            await asyncio.sleep(0.01)
        assert (await client.delete("/v1/adapters/mine")).status_code == 200
        error(await chat(client, model="mine"), 404)
        (folder,) = uploads.iterdir()
        assert (folder / MODEL).exists()
        engine.pause.set()
        assert (await running).json()["choices"][0]["message"]["content"] == "Hello from mine*1."
        assert list(uploads.iterdir()) == []


async def test_bad_uploads_leave_nothing(connect: Connect, adapters: Path) -> None:
    red = files(adapters / "red")
    broken = {"config": red["config"], "model": (MODEL, red["model"][1][:-1])}
    twice = [("config", red["config"]), ("config", red["config"]), ("model", red["model"])]
    async with connect(max_upload=2**20) as client:
        uploads = client.service.config.uploads
        for data, parts, status in (
            ({"name": "x"}, broken, 400),
            ({"name": "x"}, {"model": red["model"]}, 400),
            ({"name": "x"}, {"config": red["config"]}, 400),
            ({}, red, 400),
            ({"name": "x", "replace": "perhaps"}, red, 400),
            ({"name": "x"}, twice, 400),
            ({"name": "x", "path": "/etc"}, red, 400),
            ({"name": "x"}, red | {"../../evil": ("../../evil", b"x")}, 400),
            ({"name": "x"}, {"config": red["config"], "model": ("a.bin", b"x" * 3 * 2**20)}, 413),
            ({"name": "x"}, {"config": ("a", b"x" * (2**20 + 1)), "model": red["model"]}, 413),
            ({"name": "x" * 5000}, red, 413),
        ):
            error(await client.post("/v1/adapters", data=data, files=parts), status)
            assert not uploads.exists() or not list(uploads.iterdir())
        kind = {"content-type": "multipart/form-data; boundary=b"}
        for raw in (
            b"",
            b"--b",
            b"--b--",
            b"garbage",
            b'--b\r\nContent-Disposition: form-data; name="config"\r\n\r\nx',
        ):
            error(await client.post("/v1/adapters", content=raw, headers=kind), 400)
        error(
            await client.post("/v1/adapters", content=b"x", headers={"content-type": "multipart/form-data"}),
            400,
        )
        assert not list(uploads.iterdir())
        assert (await client.get("/v1/adapters")).json()["data"] == []
    async with connect(uploads=None) as client:
        error(await client.post("/v1/adapters", data={"name": "x"}, files=red), 403)
