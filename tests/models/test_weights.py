"""Loading: what a checkpoint may and may not be, and the identity it gets."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
import transformers
from model_harness import Harness
from safetensors.torch import load_file, save_file

from chiliad.errors import InvalidConfig, InvalidModel
from chiliad.kernels.reference import ReferenceKernels
from chiliad.models import Decoder, load_decoder, load_model, open_source
from chiliad.testing import tiny_model

Tensors = dict[str, torch.Tensor]
PROMPT = [5, 3, 8, 200, 17, 44]


def load(folder: Path, dtype: str = "float32", **kwargs: int) -> Decoder:
    return load_decoder(open_source(str(folder)), ReferenceKernels(), dtype, **kwargs)[0]


def fingerprint(folder: Path) -> str:
    return load_decoder(open_source(str(folder)), ReferenceKernels(), "float32")[1].fingerprint


def logits(folder: Path, dtype: str = "float32") -> torch.Tensor:
    kernels = ReferenceKernels()
    decoder, _ = load_decoder(open_source(str(folder)), kernels, dtype)
    return Harness(decoder, kernels).step([(0, PROMPT)])[0]


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps(config))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny_model(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    tiny_model(tmp_path / "gpt2", "gpt2")
    return tmp_path / "gpt2"


# -- tensors -----------------------------------------------------------------------------


def test_every_missing_extra_and_misshapen_tensor_is_named(llama: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(64, 63)

    edit_tensors(llama, change)
    with pytest.raises(InvalidModel) as refused:
        load(llama)
    message = str(refused.value)
    assert "missing tensors: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "unknown tensors: model.layers.0.self_attn.q_proj.bias" in message
    assert "model.layers.0.self_attn.o_proj.weight is [64, 63], not [64, 64]" in message


def test_a_long_list_of_problems_is_cut(llama: Path) -> None:
    edit_config(llama, num_hidden_layers=30)
    with pytest.raises(InvalidModel, match=r"and \d+ more"):
        load(llama)


def test_integer_weights_are_refused(llama: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(llama, lambda t: t.update({name: t[name].to(torch.int8)}))
    with pytest.raises(InvalidModel, match=f"{name} is torch.int8"):
        load(llama)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
)
def test_rotary_buffers_are_harmless(llama: Path, name: str) -> None:
    before = logits(llama)
    edit_tensors(llama, lambda t: t.update({name: torch.zeros(8)}))
    torch.testing.assert_close(logits(llama), before)


def test_gpt2_masks_and_bare_trunk_names(gpt2: Path) -> None:
    """The published GPT-2 names tensors without "transformer." and stores its causal masks."""
    before, identity = logits(gpt2), fingerprint(gpt2)

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)

    edit_tensors(gpt2, change)
    torch.testing.assert_close(logits(gpt2), before)
    assert fingerprint(gpt2) == identity


def test_tied_head_may_be_stored_if_equal(tmp_path: Path) -> None:
    tiny_model(tmp_path, tie_word_embeddings=True)
    before = logits(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    torch.testing.assert_close(logits(tmp_path), before)
    edit_tensors(tmp_path, lambda t: t["lm_head.weight"][3, 3].add_(1))
    with pytest.raises(InvalidModel, match=r"ties lm_head.weight to model.embed_tokens.weight"):
        load(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(2, 2)}))
    with pytest.raises(InvalidModel, match=r"lm_head.weight is \[2, 2\]"):
        load(tmp_path)


# -- files -------------------------------------------------------------------------------


def test_shards(llama: Path) -> None:
    before, identity = logits(llama), fingerprint(llama)
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    weight_map = {
        name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, llama / file)
    index = llama / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    torch.testing.assert_close(logits(llama), before)
    assert fingerprint(llama) == identity

    (llama / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InvalidModel, match=r"lacks weight files: model-00002-of-00003.safetensors"):
        load(llama)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}}))
    with pytest.raises(InvalidModel, match="no usable weight_map"):
        load(llama)


def test_pickles_are_never_opened(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(InvalidModel, match=r"only as pickle \(pytorch_model.bin\)"):
        load(llama)


def test_broken_files(llama: Path) -> None:
    whole = (llama / "model.safetensors").read_bytes()
    for broken in (b"", whole[:100], whole[:-1]):
        (llama / "model.safetensors").write_bytes(broken)
        with pytest.raises(InvalidModel, match=r"cannot read .*model.safetensors"):
            load(llama)
    (llama / "model.safetensors").unlink()
    with pytest.raises(InvalidModel, match=r"lacks weight files: model.safetensors"):
        load(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(InvalidModel, match=r"cannot read .*config.json"):
        load(llama)
    (llama / "config.json").write_text("[]")
    with pytest.raises(InvalidModel, match="JSON object"):
        load(llama)
    (llama / "config.json").unlink()
    with pytest.raises(InvalidModel, match=r"no config\.json"):
        load(llama)


@pytest.mark.parametrize("ref", ["no such model", "./nowhere", "nowhere.gguf", "", "pypi:"])
def test_unknown_references(ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidModel):
        load_model(ref, ReferenceKernels())


def test_hub_reference_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InvalidModel, match=r"no route to host.*local folder"):
        load_model("nobody/nothing", ReferenceKernels())


class Hub(SimpleHTTPRequestHandler):
    """The hub's protocol over one folder: what a repository holds, and its files by commit."""

    commit = "0123456789abcdef0123456789abcdef01234567"
    asked: list[str]

    def do_GET(self) -> None:
        if self.path.split("?")[0].startswith("/api/models/acme/tiny/"):
            files = sorted(p.name for p in Path(self.directory).iterdir())
            answer = {"id": "acme/tiny", "sha": self.commit, "siblings": [{"rfilename": f} for f in files]}
            if "/tree/" in self.path:
                answer = [{"type": "file", "path": f, "size": 0, "oid": f} for f in files]
            self._send(200, json.dumps(answer).encode(), "application/json")
        elif self.path.startswith(f"/acme/tiny/resolve/{self.commit}/"):
            name = self.path.rsplit("/", 1)[1]
            self.asked.append(name)
            self._send(200, (Path(self.directory) / name).read_bytes(), "application/octet-stream")
        else:
            self._send(404, b"{}", "application/json")

    do_HEAD = do_GET

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def test_a_hub_repository_is_downloaded_once_and_answers(llama: Path, tmp_path: Path) -> None:
    """The real client of the hub, in a process of its own, against a server of our own."""
    pytest.importorskip("huggingface_hub")
    (llama / "pytorch_model.bin").write_bytes(b"a pickle that nobody should fetch")
    asked: list[str] = []
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(type("OneHub", (Hub,), {"asked": asked}), directory=str(llama))
    )
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}

    def fingerprint_of(reference: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", FINGERPRINT, reference], env=environment, capture_output=True, text=True
        )

    first = fingerprint_of("acme/tiny")
    assert first.returncode == 0, first.stderr
    assert first.stdout.split() == [fingerprint(llama), "tiny", "acme/tiny"]
    assert "model.safetensors" in asked
    assert "pytorch_model.bin" not in asked
    unknown = fingerprint_of("acme/unknown")
    assert "InvalidModel: cannot get 'acme/unknown'" in unknown.stderr
    server.shutdown()
    server.server_close()
    assert fingerprint_of("acme/tiny").stdout == first.stdout  # offline, out of the hub's cache


FINGERPRINT = """
import sys
from chiliad.kernels.reference import ReferenceKernels
from chiliad.models import load_model
info = load_model(sys.argv[1], ReferenceKernels()).info
print(info.fingerprint, info.name, info.aliases[0])
"""


def test_hub_cache_folder_knows_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / "models--acme--tiny-1B" / "snapshots" / "0123abc"
    tiny_model(folder, _name_or_path="elsewhere/old-name")
    model = load_model(str(folder), ReferenceKernels())
    assert model.name == model.info.name == "tiny-1B"
    assert model.info.aliases == ("acme/tiny-1B", "elsewhere/old-name")


# -- identity, dtypes, limits ------------------------------------------------------------


def test_fingerprint_follows_weights_and_architecture_only(llama: Path, tmp_path: Path) -> None:
    identity = fingerprint(llama)
    assert fingerprint(llama) == identity
    tiny_model(tmp_path / "copy", _name_or_path="another/name")
    assert fingerprint(tmp_path / "copy") == identity
    edit_config(tmp_path / "copy", eos_token_id=7)
    assert fingerprint(tmp_path / "copy") == identity
    edit_config(tmp_path / "copy", rope_theta=10001.0)
    assert fingerprint(tmp_path / "copy") != identity
    tiny_model(tmp_path / "other", seed=1)
    assert fingerprint(tmp_path / "other") != identity
    edit_tensors(llama, lambda t: t["model.layers.1.input_layernorm.weight"][7].add_(1e-3))
    assert fingerprint(llama) != identity


def test_fingerprint_ignores_storage_dtype(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({n: v.bfloat16().float() for n, v in t.items()}))
    identity = fingerprint(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))
    assert fingerprint(tmp_path) == identity


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bfloat16", 0.03), ("int8", 0.05), ("int4", 0.6)], ids=["bf16", "int8", "int4"]
)
def test_rounded_dtypes_stay_near_float32(llama: Path, dtype: str, tolerance: float) -> None:
    exact = logits(llama)
    error = (logits(llama, dtype) - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert 0 < error < tolerance


def test_int4_needs_groups_of_32(tmp_path: Path) -> None:
    tiny_model(tmp_path, intermediate_size=80)
    with pytest.raises(InvalidConfig, match=r"model.layers.0.mlp.down_proj has 80; use int8"):
        load(tmp_path, "int4")


def test_embedding_scale_is_rounded_to_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    """As in training: Gemma in bfloat16 multiplies by sqrt(h) in bfloat16."""
    tiny_model(tmp_path, "gemma3_text", hidden_size=24, num_attention_heads=2, num_key_value_heads=1)
    for dtype in (torch.float32, torch.bfloat16):
        edit_tensors(tmp_path, lambda t, d=dtype: t.update({n: v.to(d) for n, v in t.items()}))
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        expected = model.model.embed_tokens(torch.tensor(PROMPT)).float()
        weight = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].float()
        got = load(tmp_path).embed(torch.tensor(PROMPT), None)  # type: ignore[arg-type]
        assert torch.allclose(got.to(dtype).float(), expected, rtol=1e-6)
        assert torch.allclose(got / weight[PROMPT], torch.tensor(24**0.5).to(dtype).float(), rtol=1e-6)


def test_nbytes_counts_what_the_dtype_stores(llama: Path) -> None:
    sizes = {dtype: load(llama, dtype).nbytes for dtype in ("float32", "bfloat16")}
    weights = sum(t.numel() for t in load_file(llama / "model.safetensors").values() if t.ndim == 2)
    assert sizes["float32"] - sizes["bfloat16"] == 2 * weights


def test_half_precision_checkpoints(llama: Path) -> None:
    """float16 weights are exact in float32; norms stay float32 whatever the dtype."""
    edit_tensors(llama, lambda t: t.update({n: v.half().float() for n, v in t.items()}))
    before = logits(llama)
    edit_tensors(llama, lambda t: t.update({n: v.half() for n, v in t.items()}))
    torch.testing.assert_close(logits(llama), before)


@pytest.mark.parametrize("length", [0, -1, 513])
def test_max_model_len_out_of_range(llama: Path, length: int) -> None:
    with pytest.raises(InvalidConfig, match="max_model_len") as refused:
        load(llama, max_model_len=length)
    assert refused.value.param == "max_model_len"


def test_max_model_len_bounds_the_tables(llama: Path) -> None:
    short, whole = load(llama, max_model_len=32), load(llama)
    assert (short.max_positions, whole.max_positions) == (32, 512)
    assert whole.nbytes - short.nbytes == (512 - 32) * 16 * 4  # cos and sin, 8 float32 each


def test_unknown_dtype(llama: Path) -> None:
    with pytest.raises(InvalidConfig, match="float16"):
        load(llama, "float16")


def test_load_model_has_everything(llama: Path) -> None:
    model = load_model(str(llama), ReferenceKernels(), max_model_len=100)
    assert model.name == "llama"
    assert model.info.family == model.arch.family == "llama"
    assert model.info.sites == model.decoder.sites
    assert model.nbytes == model.decoder.nbytes > 0
    assert model.tokenizer.eos_ids == set(model.arch.eos_ids)
