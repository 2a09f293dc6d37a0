"""The only room that knows how fast a machine is. See `base.py` for the contract."""

from __future__ import annotations

from chiliad.errors import InvalidConfig
from chiliad.kernels.base import Kernels

__all__ = ["Kernels", "load"]


def load(which: str = "auto", isa: str = "auto", threads: int = 0) -> Kernels:
    """Choose an implementation: "auto", "cpu" (C++) or "reference" (torch).

    isa: "auto" or one of generic, avx2, avx512, avx512bf16, amx (C++ only). threads: 0 means all cores.
    "auto" falls back to the reference where the C++ core is missing, and says so in `reason`.
    """
    from chiliad.kernels.reference import ReferenceKernels

    if which not in ("auto", "cpu", "reference"):
        raise InvalidConfig(f"unknown kernels {which!r}: use auto, cpu or reference", param="kernels")
    if which == "reference":
        return ReferenceKernels()
    try:
        from chiliad.kernels.cpu import CpuKernels
    except ImportError as missing:
        if which == "cpu":
            raise InvalidConfig(
                f"the C++ core is not installed ({missing}): install a C++ compiler and reinstall "
                "chiliad, or use kernels=reference",
                param="kernels",
            ) from missing
        return ReferenceKernels(f"C++ core not installed: {missing}")
    return CpuKernels(isa=isa, threads=threads)
