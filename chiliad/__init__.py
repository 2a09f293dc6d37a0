"""chiliad: train, store and serve thousands of adapters on one base model."""

from __future__ import annotations

__version__ = "0.1.0"
