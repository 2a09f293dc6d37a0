"""From sampled tokens to what a client sees: text, stops, logprobs, one `Choice` per sequence."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from chiliad.core import Chunk, FinishReason, Request, TokenLogprob


class TextStream(Protocol):
    """Incremental detokeniser (models.tokenizer): whole characters only."""

    def step(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class StopStrings:
    """Finds the first stop string in a stream of text pieces.

    Text that may be the head of a stop string is held back, so that nothing has to be taken
    back once it was sent.
    """

    def __init__(self, stops: Seq[str], include: bool) -> None:
        self._stops = tuple(s for s in stops if s)
        self._include = include
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """Return (text that may be sent now, the stop string that was met or None)."""
        if not self._stops:
            return piece, None
        text = self._held + piece
        hits = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            at, stop = min(hits)
            self._held = ""
            return text[: at + len(stop)] if self._include else text[:at], stop
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest proper head of `stop` that ends `text`."""
        for n in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:n]):
                return n
        return 0


class Choice:
    """The visible side of one sequence. `push` a token; a Chunk comes out when there is news."""

    def __init__(
        self, request: Request, index: int, text: TextStream, eos_ids: frozenset[int], max_tokens: int
    ) -> None:
        params = request.params
        self.finish_reason: FinishReason | None = None
        self.num_tokens = 0
        self._request_id, self._index = request.id, index
        self._text = text
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
        self._stop_ids = frozenset(params.stop_token_ids)
        self._eos_ids = frozenset[int]() if params.ignore_eos else eos_ids
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens, self._max_tokens = params.min_tokens, max_tokens
        self._every_token = params.logprobs is not None
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = [] if self._every_token else None
        self.prompt_logprobs: list[TokenLogprob | None] | None = (
            None if params.prompt_logprobs is None else [None]  # the first token has no context
        )

    def push(self, token: int, logprob: TokenLogprob | None) -> Chunk | None:
        """Take the next token. A chunk with `finish_reason` set is the last of this choice."""
        self.num_tokens += 1
        self._token_ids.append(token)
        if self._logprobs is not None and logprob is not None:
            self._logprobs.append(logprob)
        may_stop = self.num_tokens >= self._min_tokens
        stop_reason: int | str | None = None
        if may_stop and (token in self._eos_ids or token in self._stop_ids):
            self.finish_reason = "stop"
            stop_reason = token if token in self._stop_ids else None
            piece = self._text.step(token) if self._include_stop else ""
        else:
            piece = self._text.step(token)
        text, met = self._stops.push(piece) if may_stop else (self._stops.flush() + piece, None)
        if met is not None:
            self.finish_reason, stop_reason = "stop", met
        elif self.finish_reason is None and self.num_tokens >= self._max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and met is None:
            text += self._last_words()
        if not (text or self._every_token or self.finish_reason):
            return None
        return self._chunk(text, stop_reason)

    def abort(self) -> Chunk:
        self.finish_reason = "abort"
        return self._chunk(self._last_words(), None)

    def _last_words(self) -> str:
        """Half a character or half a stop string that will not be completed any more."""
        text, met = self._stops.push(self._text.flush())
        return text if met is not None else text + self._stops.flush()

    def _chunk(self, text: str, stop_reason: int | str | None) -> Chunk:
        chunk = Chunk(
            request_id=self._request_id,
            index=self._index,
            text=text,
            token_ids=tuple(self._token_ids),
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            prompt_logprobs=None if self.prompt_logprobs is None else tuple(self.prompt_logprobs),
            finish_reason=self.finish_reason,
            stop_reason=stop_reason,
        )
        self._token_ids.clear()
        if self._logprobs is not None:
            self._logprobs.clear()
        self.prompt_logprobs = None
        return chunk
