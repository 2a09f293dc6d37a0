"""Text to token ids and back, from a Hugging Face folder or from GGUF metadata.

Encoding is that of the `tokenizers` library, set up as transformers sets it up. As there, the
text of a special token inside a prompt becomes that token: "<|im_end|>" typed by a user ends the
turn. Decoding has its own table of bytes per token, so that a stream of tokens costs a lookup
each and never shows half a character.

Chat templates run in minijinja with transformers' settings. They come with the model, so they
are bounded (fuel), see only plain copies of what the caller passed, and cannot reach Python.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import minijinja
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from chiliad.errors import InvalidModel, InvalidRequest

Json = dict[str, Any]

# Names under which a template sees special tokens, as in transformers.
_NAMED_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


class Tokenizer:
    """Encode, decode and render conversations for one model.

    eos_ids: every token that ends a generation. vocab_size: one more than the largest token id,
    which may be less than the rows of the embedding (padding) or, rarely, more.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Iterable[int] = (),
        named_tokens: Mapping[str, str] | None = None,
        templates: Mapping[str, str] | None = None,
    ) -> None:
        """`templates` maps names to chat templates; "default" and "tool_use" are the usual ones."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.named_tokens = dict(named_tokens or {})
        self._templates = dict(templates or {})
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eos_ids = frozenset(i for i in eos_ids if 0 <= i < self.vocab_size)
        self._decoding = _Decoding.of(backend)
        self.special_ids = frozenset(
            i for i, token in backend.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json and the files beside it. Raises InvalidModel."""
        return _from_folder(Path(folder))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """Build the tokenizer that a GGUF file describes. Raises InvalidModel, naming what is unknown."""
        return _from_gguf(metadata)

    # --- ids ---

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`; `add_special` adds what the model expects around it (such as BOS).

        Rendered chats carry their own special tokens: encode them with add_special=False.
        """
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special).ids
        except TypeError:  # what the library says of a lone surrogate, which JSON can carry
            raise InvalidRequest("the text is not valid Unicode (it contains a lone surrogate)") from None
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary are skipped."""
        stream = self.stream(skip_special)
        return "".join([*map(stream.step, ids), stream.flush()])

    def stream(self, skip_special: bool = True, after: Sequence[int] = ()) -> TextStream:
        """Incremental decoding: what the steps and the flush return adds up to `decode` of all ids.

        Decoding drops the space that sentencepiece puts before the first word. A stream that
        continues a prompt must keep it: `after` holds the tokens before the first step.
        """
        skip = self.special_ids if skip_special else frozenset()
        inside = any(token_id not in skip for token_id in after) if self._decoding.strip else False
        return TextStream(self._table, skip, 0 if inside else self._decoding.strip)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, alone; b"" outside the vocabulary."""
        return self._table.get(token_id, b"")

    def token_text(self, token_id: int) -> str:
        """A token alone as text; a part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    @cached_property
    def _table(self) -> dict[int, bytes]:
        vocabulary: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        to_bytes = self._decoding.to_bytes
        table = {token_id: to_bytes(text) for text, token_id in vocabulary.items()}
        # Where an added token replaces a token of the vocabulary, the added text counts.
        for token_id, token in self.backend.get_added_tokens_decoder().items():
            table[token_id] = to_bytes(token.content)
        return table

    # --- chat ---

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    @cached_property
    def supports_tools(self) -> bool:
        """Whether the chat template looks at `tools`."""
        if "tool_use" in self._templates:
            return True
        name = self._template_name(None)
        return "tools" in self._environment.undeclared_variables_in_str(self._templates[name])

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Render a conversation, as transformers' apply_chat_template(tokenize=False) does.

        messages: plain JSON values with "role" and "content". Content given as a list of text
        parts is joined by newlines where the template expects a string. kwargs reach the template.
        Raises InvalidRequest where there is no template, or the template refuses the conversation.
        """
        if not messages:
            raise InvalidRequest("messages is empty: send at least one message", param="messages")
        name = self._template_name(tools)
        plain = [_plain_message(message) for message in messages]
        if not self._reads_parts(name):
            plain = [_join_parts(message) for message in plain]
        try:
            return self._render(
                name,
                messages=plain,
                tools=_plain(tools),
                documents=_plain(kwargs.pop("documents", None)),
                add_generation_prompt=add_generation_prompt,
                **{**self.named_tokens, **_plain(kwargs)},
            )
        except _TemplateFailed as failed:
            raise InvalidRequest(f"the chat template refuses this: {failed}", param="messages") from None

    def _render(self, name: str, **context: Any) -> str:
        environment = self._environment  # outside: a broken template is the model's fault
        try:
            return str(environment.render_template(name, **context))
        except minijinja.TemplateError as error:
            raise _TemplateFailed(f"{error.message} (line {error.line})") from None
        except Exception as error:  # raise_exception, or a method of a value, called wrongly
            raise _TemplateFailed(str(error)) from None

    def _template_name(self, tools: object) -> str:
        if not self._templates:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            names = ", ".join(sorted(self._templates))
            raise InvalidRequest(f"this model has no default chat template (only {names})", param="messages")
        return name

    @cached_property
    def _environment(self) -> minijinja.Environment:
        environment = minijinja.Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            auto_escape_callback=lambda name: False,
            fuel=_FUEL,
            filters={"tojson": _tojson},
            globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
        )
        for name, source in self._templates.items():
            try:
                environment.add_template(name, _without_generation_tags(source))
            except minijinja.TemplateError as error:
                raise InvalidModel(f"the model's chat template {name!r} is broken: {error.message}") from None
        return environment

    def _reads_parts(self, name: str) -> bool:
        """Whether a template takes content as a list of parts: tried once, on a small conversation."""
        known: dict[str, bool] = self.__dict__.setdefault("_parts", {})
        if name not in known:
            content = [{"type": "text", "text": "probe"}]
            try:
                text = self._render(
                    name, messages=[{"role": "user", "content": content}], add_generation_prompt=False,
                    **self.named_tokens,
                )  # fmt: skip
            except _TemplateFailed:
                text = ""
            known[name] = "probe" in text and "'type'" not in text and '"type"' not in text
        return known[name]


# --- chat templates --------------------------------------------------------------------------

_FUEL = 5_000_000  # template instructions per rendering, well under a second; a long chat needs thousands


_MAX_DEPTH = 100  # of JSON inside a message or a tool


class _TemplateFailed(Exception):
    """A template called raise_exception, or could not do what it says."""


def _raise_exception(message: object) -> None:
    raise _TemplateFailed(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _without_generation_tags(source: str) -> str:
    """{% generation %} marks assistant text for training; for rendering it is a block that is always on."""
    for tag, plain in (("generation", "if true"), ("endgeneration", "endif")):
        for left in ("{%", "{%-", "{%+"):
            for right in ("%}", "-%}", "+%}"):
                source = source.replace(f"{left} {tag} {right}", f"{left} {plain} {right}")
    return source


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy made of JSON types only, so that a template cannot change or reach the caller's objects."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if depth > _MAX_DEPTH:
        raise InvalidRequest("the conversation is nested too deeply", param="messages")
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    raise InvalidRequest(
        f"a {type(value).__name__} cannot be part of a conversation: send JSON", param="messages"
    )


def _plain_message(message: Mapping[str, Any]) -> Json:
    """A message without null fields, its reasoning under every name that templates read."""
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"a message must be an object, not {type(message).__name__}", param="messages")
    plain: Json = {key: value for key, value in _plain(message).items() if value is not None}
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in plain:
            reasoning = plain[name]
            return {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _join_parts(message: Json) -> Json:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise InvalidRequest(f"this model reads only text: a part is {kind!r}", param="messages")
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


# --- decoding --------------------------------------------------------------------------------


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, reversed: printable Latin-1 stands for itself."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class _Decoding:
    """How token texts become bytes, read off a tokenizers decoder.

    byte_level: texts are written in GPT-2's byte alphabet. Otherwise `replace` is applied to each
    text, and "<0xE2>" stands for a byte where byte_fallback is set. `strip` spaces are removed from
    the start of the whole text; -1 means all spaces of the first token (Metaspace).
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replace: tuple[tuple[str, str], ...] = ()
    strip: int = 0

    @staticmethod
    def of(backend: tokenizers.Tokenizer) -> _Decoding:
        """Raises InvalidModel for a decoder whose tokens are not independent pieces of text."""
        if backend.decoder is None:
            raise InvalidModel(
                "the tokenizer has no decoder; chiliad serves byte-level and sentencepiece BPE"
            )
        state = json.loads(backend.decoder.__getstate__())
        steps = state["decoders"] if state["type"] == "Sequence" else [state]
        byte_level = byte_fallback = False
        replace: list[tuple[str, str]] = []
        strip = 0
        for step in steps:
            kind = step["type"]
            if kind == "ByteLevel":
                byte_level = True
            elif kind == "ByteFallback":
                byte_fallback = True
            elif kind == "Fuse":
                pass
            elif kind == "Replace" and "String" in step["pattern"] and not byte_fallback:
                replace.append((step["pattern"]["String"], step["content"]))
            elif kind == "Strip" and step["content"] == " " and not step["stop"]:
                strip = step["start"]
            elif kind == "Metaspace" and len(steps) == 1:
                replace.append((step["replacement"], " "))
                strip = 0 if step.get("prepend_scheme") == "never" else -1
            else:
                raise InvalidModel(
                    f"the tokenizer's decoder step {kind} is not supported; "
                    "chiliad serves byte-level and sentencepiece BPE"
                )
        if byte_level and len(steps) > 1:
            raise InvalidModel("a ByteLevel decoder followed by other steps is not supported")
        return _Decoding(byte_level, byte_fallback, tuple(replace), strip)

    def to_bytes(self, text: str) -> bytes:
        if self.byte_level:
            try:
                return bytes([_ALPHABET[character] for character in text])
            except KeyError:  # an added token outside the alphabet stands for itself
                return text.encode()
        if self.byte_fallback and (byte := _BYTE_TOKEN.fullmatch(text)):
            return bytes.fromhex(byte[1])
        for old, new in self.replace:
            text = text.replace(old, new)
        return text.encode()


class TextStream:
    """Turns token ids into text as they come; made by `Tokenizer.stream`."""

    __slots__ = ("_pending", "_skip", "_strip", "_table")

    def __init__(self, table: dict[int, bytes], skip: frozenset[int], strip: int) -> None:
        self._table = table
        self._skip = skip
        self._strip = strip  # see _Decoding.strip
        self._pending = b""  # the beginning of a character

    def step(self, token_id: int) -> str:
        """The text that this token completes: whole characters, maybe none."""
        if token_id in self._skip:
            return ""
        data = self._table.get(token_id)
        if data is None:
            return ""
        if self._strip:
            data = self._stripped(data)
        if self._pending:
            data = self._pending + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        """What is left at the end: a character cut short shows as U+FFFD."""
        text = self._pending.decode("utf-8", "replace")
        self._pending = b""
        return text

    def _stripped(self, data: bytes) -> bytes:
        if self._strip < 0:  # Metaspace: only the first token, all its leading marks
            self._strip = 0
            return data.replace(b" ", b"")
        while self._strip and data.startswith(b" "):
            data = data[1:]
            self._strip -= 1
        if data:
            self._strip = 0
        return data


# --- Hugging Face folders --------------------------------------------------------------------


def _read_json(path: Path) -> Json:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidModel(f"cannot read {path.name}: {error}") from None
    if not isinstance(value, dict):
        raise InvalidModel(f"{path.name} should hold a JSON object")
    return value


def _content(token: object) -> str | None:
    """A special token is written as text, or as an object with the text inside."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _from_folder(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InvalidModel(
            f"{folder.name} has no tokenizer.json; write one with "
            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise InvalidModel(f"cannot read tokenizer.json: {error}") from None
    config = _read_json(folder / "tokenizer_config.json")
    special = config if "added_tokens_decoder" in config else _read_json(folder / "special_tokens_map.json")
    named = {}
    for name in _NAMED_TOKENS:
        text = _content(special.get(name)) or _content(config.get(name))
        if text is not None:
            named[name] = text
    _mark_special(backend, config, named)

    eos: list[object] = []
    generation = _read_json(folder / "generation_config.json")
    source = generation if generation.get("eos_token_id") is not None else _read_json(folder / "config.json")
    stated = source.get("eos_token_id")
    eos += stated if isinstance(stated, list) else [stated]
    if "eos_token" in named:
        eos.append(backend.token_to_id(named["eos_token"]))
    return Tokenizer(
        backend,
        eos_ids=[i for i in eos if type(i) is int],
        named_tokens=named,
        templates=_folder_templates(folder, config),
    )


def _mark_special(backend: tokenizers.Tokenizer, config: Json, named: Mapping[str, str]) -> None:
    """Add the tokens that only tokenizer_config.json declares, and mark the named ones as special."""
    declared = config.get("added_tokens_decoder")
    known = backend.get_added_tokens_decoder()
    for key, token in sorted(declared.items(), key=lambda item: int(item[0])) if declared else ():
        text = _content(token)
        if text is None or int(key) in known:
            continue
        flags = {name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip", "special")}
        normalized = bool(token.get("normalized", not flags["special"]))
        backend.add_tokens([AddedToken(text, normalized=normalized, **flags)])
        if backend.token_to_id(text) != int(key):
            raise InvalidModel(
                f"tokenizer_config.json gives {text!r} the id {key}, "
                f"but in tokenizer.json it is {backend.token_to_id(text)}"
            )
    texts = {token.content for token in backend.get_added_tokens_decoder().values()}
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    wanted = [*named.values(), *(_content(t) for t in (extra if isinstance(extra, list) else extra.values()))]
    for text in dict.fromkeys(wanted):
        # A token that the vocabulary lacks gets no id: it would lie outside the model's embedding.
        if text and text not in texts and backend.token_to_id(text) is not None:
            backend.add_special_tokens([AddedToken(text, normalized=False, special=True)])


def _folder_templates(folder: Path, config: Json) -> dict[str, str]:
    templates = {}
    file = folder / "chat_template.jinja"
    if file.is_file():
        templates["default"] = file.read_text(encoding="utf-8")
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    if templates:
        return templates
    template = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    return _templates_by_name(template)


def _templates_by_name(template: object) -> dict[str, str]:
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list):  # [{"name": ..., "template": ...}]
        return {str(entry["name"]): str(entry["template"]) for entry in template}
    return {str(k): str(v) for k, v in template.items()} if isinstance(template, dict) else {}


# --- GGUF ------------------------------------------------------------------------------------

_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """What GGUF says in one word (tokenizer.ggml.pre): how text is cut before merging."""

    build: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False  # a whole piece that is in the vocabulary is taken as it is
    add_bos: bool = False  # unless the file says otherwise
    nfc: bool = False


_PRE_TOKENIZERS: dict[str, _PreTokenizer] = {
    "gpt-2": _PreTokenizer(lambda: _GPT2),
    "smollm": _PreTokenizer(_single_digits),
    "starcoder": _PreTokenizer(_single_digits),
    "refact": _PreTokenizer(_single_digits),
    "qwen2": _PreTokenizer(lambda: _split(_QWEN2_PATTERN), nfc=True),
    "deepseek-r1-qwen": _PreTokenizer(lambda: _split(_QWEN2_PATTERN), nfc=True),
    "llama-bpe": _PreTokenizer(lambda: _split(_LLAMA3_PATTERN), ignore_merges=True, add_bos=True),
    "tekken": _PreTokenizer(lambda: _split(_TEKKEN_PATTERN), ignore_merges=True, add_bos=True),
}

_SPACE = "\u2581"  # how sentencepiece writes a space

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# Tokens that end a turn; a file often names only one of them as its end.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|end_of_turn|>")


@dataclass(slots=True)
class _GgufVocabulary:
    metadata: Mapping[str, object]
    tokens: list[str] = field(init=False)
    types: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.strings("tokens")
        types = self.metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(self.tokens))
        if not isinstance(types, list) or len(types) != len(self.tokens):
            raise InvalidModel("tokenizer.ggml.token_type does not fit tokenizer.ggml.tokens")
        self.types = types

    def strings(self, key: str) -> list[str]:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InvalidModel(f"metadata 'tokenizer.ggml.{key}' is missing or not a list of strings")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            raise InvalidModel(f"metadata 'tokenizer.ggml.{key}' should be a boolean")
        return value

    def token(self, key: str) -> int | None:
        """The id under tokenizer.ggml.<key>_token_id, if it is one."""
        value = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        return value if type(value) is int and 0 <= value < len(self.tokens) else None

    def of_type(self, *types: int) -> list[int]:
        return [i for i, kind in enumerate(self.types) if kind in types]


def _from_gguf(metadata: Mapping[str, object]) -> Tokenizer:
    kind = metadata.get("tokenizer.ggml.model")
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(str(kind))
    if build is None:
        raise InvalidModel(
            f"the GGUF tokenizer kind {kind!r} is not supported (gpt2 and llama are); "
            "use the Hugging Face folder of the model, which has a tokenizer.json"
        )
    vocabulary = _GgufVocabulary(metadata)
    backend, add_bos = build(vocabulary)
    backend.add_tokens(
        [
            AddedToken(vocabulary.tokens[i], normalized=False, special=vocabulary.types[i] != _USER_DEFINED)
            for i in vocabulary.of_type(_CONTROL, _UNKNOWN, _USER_DEFINED)
            if vocabulary.tokens[i].strip(_SPACE)  # runs of spaces are left to the merges
        ]
    )
    named = {
        f"{name}_token": vocabulary.tokens[i]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (i := vocabulary.token(key)) is not None
    }
    bos = named.get("bos_token") if vocabulary.flag("add_bos_token", add_bos) else None
    eos = named.get("eos_token") if vocabulary.flag("add_eos_token", False) else None
    backend.post_processor = _around(backend, bos, eos)

    templates = {
        key.removeprefix("tokenizer.chat_template.") if key != "tokenizer.chat_template" else "default": value
        for key, value in metadata.items()
        if key.startswith("tokenizer.chat_template") and isinstance(value, str)
    }
    template = templates.get("default", "")
    ends = [vocabulary.token(key) for key in ("eos", "eot", "eom")]
    ends += [
        i for i in vocabulary.of_type(_CONTROL)
        if vocabulary.tokens[i] in _TURN_ENDS and vocabulary.tokens[i] in template
    ]  # fmt: skip
    return Tokenizer(
        backend, eos_ids=[i for i in ends if i is not None], named_tokens=named, templates=templates
    )


def _byte_level(vocabulary: _GgufVocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    name = vocabulary.metadata.get("tokenizer.ggml.pre")
    if name in (None, "default") and vocabulary.metadata.get("general.architecture") == "gpt2":
        name = "gpt-2"  # files from before the field existed
    kind = _PRE_TOKENIZERS.get(str(name))
    if kind is None:
        said = "does not name its pre-tokenizer" if name in (None, "default") else f"uses {name!r}"
        raise InvalidModel(
            f"this GGUF file {said}; chiliad knows {', '.join(_PRE_TOKENIZERS)}. Use the Hugging Face "
            "folder of the model, or convert it again with a current converter"
        )
    merges = []
    for merge in vocabulary.strings("merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    ids: dict[str, int] = {}
    for i, text in enumerate(vocabulary.tokens):
        if vocabulary.types[i] != _UNUSED:  # padding up to the size of the embedding
            ids.setdefault(text, i)
    try:
        model = models.BPE(vocab=ids, merges=merges, ignore_merges=kind.ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise InvalidModel(f"the GGUF file's merges do not fit its tokens: {error}") from None
    backend = tokenizers.Tokenizer(model)
    if kind.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = kind.build()
    backend.decoder = decoders.ByteLevel()
    return backend, kind.add_bos


def _sentencepiece(vocabulary: _GgufVocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """SentencePiece BPE: pieces with scores, spaces written as U+2581, bytes for what has no piece."""
    scores = vocabulary.metadata.get("tokenizer.ggml.scores")
    if (
        not isinstance(scores, list)
        or len(scores) != len(vocabulary.tokens)
        or not all(isinstance(score, float) for score in scores)
    ):
        raise InvalidModel("tokenizer.ggml.scores does not fit tokenizer.ggml.tokens")
    if vocabulary.flag("remove_extra_whitespaces", False):
        raise InvalidModel(
            "tokenizer.ggml.remove_extra_whitespaces is not supported; use the model's Hugging Face folder"
        )
    ids: dict[str, int] = {}
    for i, kind in enumerate(vocabulary.types):
        if kind == _USER_DEFINED:
            vocabulary.tokens[i] = vocabulary.tokens[i].replace(" ", _SPACE)
        if kind != _UNUSED:
            ids.setdefault(vocabulary.tokens[i], i)
    # A merge for every way to make a piece of two others; the better piece first.
    merges = []
    for i in vocabulary.of_type(_NORMAL, _USER_DEFINED):
        piece = vocabulary.tokens[i]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-scores[i], -len(left), left, right))
    merges.sort(key=lambda merge: merge[:2])
    unknown = vocabulary.of_type(_UNKNOWN)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[(left, right) for _, _, left, right in merges],
            byte_fallback=True,
            fuse_unk=True,
            unk_token=vocabulary.tokens[unknown[0]] if unknown else None,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.flag("add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    return backend, True


def _around(
    backend: tokenizers.Tokenizer, bos: str | None, eos: str | None
) -> processors.PostProcessor | None:
    """BOS before and EOS after the text, where wanted."""
    if bos is None and eos is None:
        return None
    pieces = [*(["BOS"] if bos else []), "$A", *(["EOS"] if eos else [])]
    # By names of our own: a template would take the ":" and "$" of a token's text for its syntax.
    specials = [
        {"id": name, "ids": [backend.token_to_id(text)], "tokens": [text]}
        for name, text in (("BOS", bos), ("EOS", eos))
        if text
    ]
    return processors.TemplateProcessing(single=pieces, pair=[*pieces, "$B"], special_tokens=specials)
