"""What the base model is: architecture, weights, tokenizer. `load_model` is the door."""

from chiliad.models.arch import Arch
from chiliad.models.decoder import Decoder
from chiliad.models.sources import open_source
from chiliad.models.weights import Model, load_decoder, load_model

__all__ = ["Arch", "Decoder", "Model", "load_decoder", "load_model", "open_source"]
