"""llama.cpp through llama-cpp-python's C API, for `run.py`: many sequences in one `llama_decode`.

Weights are the GGUF file as it is. It knows one set of adapters per batch only, so it answers
base prompts.
"""

from __future__ import annotations

import time
from typing import Any

import llama_cpp as C
import numpy as np
from worker import Names, Prompts, serve


class Llama:
    def __init__(self, options: dict[str, Any]) -> None:
        C.llama_backend_init()
        self.threads = options["threads"]
        model = C.llama_model_load_from_file(options["gguf"].encode(), C.llama_model_default_params())
        assert model, f"llama.cpp cannot load {options['gguf']}"
        self.model = model
        self.vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(model))
        self.contexts: dict[tuple[int, int], Any] = {}
        self.about = {
            "llama-cpp-python": C.__version__,
            "system": C.llama_print_system_info().decode().strip(),
            "weights": options["gguf"].rsplit("/", 1)[-1],
        }

    def _context(self, rows: int, length: int) -> Any:
        """A context for this many sequences of this many tokens, kept for the next round."""
        key = (rows, -(-length // 256) * 256)
        if key not in self.contexts:
            for context in self.contexts.values():
                C.llama_free(context)
            self.contexts.clear()
            params = C.llama_context_default_params()
            params.n_ctx = key[0] * key[1]
            params.n_seq_max = rows
            params.n_batch = max(512, rows)
            params.n_threads = params.n_threads_batch = self.threads
            params.no_perf = True
            self.contexts[key] = C.llama_init_from_model(self.model, params)
            assert self.contexts[key], "llama.cpp made no context"
        return self.contexts[key]

    def run(self, prompts: Prompts, adapters: Names, max_tokens: int) -> tuple[list[list[int]], float | None]:
        assert set(adapters) == {None}
        context = self._context(len(prompts), len(prompts[0]) + max_tokens)
        C.llama_memory_clear(C.llama_get_memory(context), True)
        limit = C.llama_n_batch(context)
        batch = C.llama_batch_init(limit, 0, 1)
        tokens: list[list[int]] = [[] for _ in prompts]
        first = None
        try:
            work = [
                (row, position, token, position == len(prompt) - 1)
                for row, prompt in enumerate(prompts)
                for position, token in enumerate(prompt)
            ]
            for step in range(max_tokens):
                for start in range(0, len(work), limit):
                    self._decode(context, batch, work[start : start + limit], tokens)
                if step == 0:
                    first = time.perf_counter()
                work = [(r, len(prompts[r]) + step, row[-1], True) for r, row in enumerate(tokens)]
        finally:
            C.llama_batch_free(batch)
        return tokens, first

    def _decode(
        self, context: Any, batch: Any, work: list[tuple[int, int, int, bool]], tokens: list[list[int]]
    ) -> None:
        """Run (row, position, token, wants its successor); appends the greedy successors."""
        batch.n_tokens = len(work)
        for i, (row, position, token, wanted) in enumerate(work):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row
            batch.logits[i] = wanted
        code = C.llama_decode(context, batch)
        assert code == 0, f"llama_decode: {code}"
        for i, (row, _, _, wanted) in enumerate(work):
            if wanted:
                logits = np.ctypeslib.as_array(C.llama_get_logits_ith(context, i), (self.vocab,))
                tokens[row].append(int(logits.argmax()))


serve(Llama)
