"""Settings: one frozen dataclass per room, composed, and the one list of environment variables."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from chiliad.errors import InvalidConfig

#: Every environment variable chiliad reads, with what it does. Nothing else is consulted.
ENVIRONMENT: dict[str, str] = {
    "CHILIAD_KERNELS": "auto | cpu | reference: which kernel implementation runs",
    "CHILIAD_ISA": "auto | generic | avx2 | avx512 | avx512bf16 | amx: instruction set of the C++ kernels",
    "CHILIAD_THREADS": "compute threads; 0 means one per physical core",
    "CHILIAD_API_KEY": "keys, separated by commas; clients send one as `Authorization: Bearer KEY`",
    "CHILIAD_HOME": "folder of adapter registries and uploaded adapters",
}

DType = Literal["float32", "bfloat16", "int8", "int4"]
AdapterDType = Literal["float32", "bfloat16", "int8"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def environment(name: str, default: str = "") -> str:
    """Read one of ENVIRONMENT; an unlisted name is our own bug."""
    assert name in ENVIRONMENT, f"{name} is not in config.ENVIRONMENT"
    return os.environ.get(name, default)


def home(roots: Sequence[Path] = ()) -> Path:
    """Where the adapter registry and uploads live: one folder per set of --adapters folders.

    Servers of different folders thus never see each other's names.
    """
    import platformdirs

    top = Path(environment("CHILIAD_HOME") or platformdirs.user_data_dir("chiliad"))
    if not roots:
        return top / "default"
    key = "\0".join(sorted(str(root.resolve()) for root in roots))
    return top / hashlib.blake2b(key.encode(), digest_size=6).hexdigest()


def _count(name: str) -> int:
    text = environment(name, "0")
    if not text.isdecimal():
        raise InvalidConfig(f"{name}={text!r} is not a number of threads: write 0, 1, 2, ...", param=name)
    return int(text)


def parse_bytes(text: str | int) -> int:
    """ "2GB", "512MiB", "1.5G" or a plain number -> bytes."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", text, re.IGNORECASE)
    if match is None:
        raise InvalidConfig(f"cannot read {text!r} as a size: write 2GB, 512MiB or a number of bytes")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class KernelConfig:
    kernels: str = field(default_factory=lambda: environment("CHILIAD_KERNELS", "auto"))
    isa: str = field(default_factory=lambda: environment("CHILIAD_ISA", "auto"))
    threads: int = field(default_factory=lambda: _count("CHILIAD_THREADS"))


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Dials of the scheduler. The defaults suit a small CPU machine."""

    max_step_tokens: int = 512  # token budget of one step: decode rows plus prefill chunks
    max_sequences: int = 256  # sequences that run at once
    max_waiting: int = 4096  # sequences in the queue before 429
    policy: str = "fcfs"  # or cluster[:ADAPTERS], abort[:SECONDS], vtc, vtc:adapter: see engine/policy.py


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The HTTP edge. Without keys every route is open, so then the host must be loopback."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    model_name: str = ""  # name the base is served under; empty: the model's own
    adapter_dirs: tuple[Path, ...] = ()  # the only folders that adapters may be loaded from
    uploads: Path | None = None  # where uploaded adapters are kept; None: no uploads
    drain_timeout: float = 30.0  # seconds that running requests get after SIGTERM
    keep_alive: float = 15.0  # seconds of silence before a stream sends a comment line
    max_body: int = 4 * 2**20  # bytes of a JSON body
    max_upload: int = 2**30  # bytes of one uploaded adapter
    max_choices: int = 128  # n times the number of prompts in one request

    def __post_init__(self) -> None:
        if not self.api_keys and not is_loopback(self.host):
            raise InvalidConfig(
                f"host {self.host!r} is reachable from other machines and no API key is set: "
                "give --api-key (or CHILIAD_API_KEY), or bind 127.0.0.1"
            )
        if not all(self.api_keys):
            raise InvalidConfig("an API key may not be empty")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything `LLM` and `chiliad serve` need beyond the model reference."""

    memory: int = 4 * 10**9  # bytes: weights plus pool
    swap: int = 0  # bytes beyond `memory` for the KV of preempted sequences; 0: compute it again
    dtype: DType = "bfloat16"
    max_model_len: int | None = None  # None: what the model was trained for
    kernel: KernelConfig = field(default_factory=KernelConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    adapter_dtype: AdapterDType | None = (
        None  # of rank rows in the pool; None: float32 for float32, else bfloat16
    )
    adapter_share: float | None = None  # of the pool: a static split, to measure the unified pool against

    def __post_init__(self) -> None:
        if self.adapter_dtype not in (None, *get_args(AdapterDType)):
            raise InvalidConfig(
                f"adapter_dtype is one of {', '.join(get_args(AdapterDType))}, not {self.adapter_dtype!r}",
                param="adapter_dtype",
            )
