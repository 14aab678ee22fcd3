"""The draw of `choice` in the place where transformers' continuous batching draws: with the noise of each candidate.

The only place beside `continuous` that knows of transformers' manager; torch lives here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from t2s_pref.choice import Sampling, choose
from t2s_pref.decoding import Ends
from t2s_pref.protocol import Work

# Scores that are drawn from at a time: each takes tens of bytes while it is.
MOST_SCORES = 1 << 25


class Wanted(NamedTuple):
    """A candidate to draw: whose it is, and all that decides it."""

    place: int
    candidate: int
    prompt: list[int]
    key: int
    cap: int


class Drawing(NamedTuple):
    """A sequence that gets a token: whose, after how many, all of its tokens so far, and those of its answer."""

    name: str
    step: int
    tokens: list[int]
    answer: list[int]


class Draw:
    """Stands in the place of transformers' logits processors: draws the tokens, and counts what is computed.

    transformers keeps `tensors_required` rows of int32 on the device for it, has it fill them before each forward pass,
    and takes the largest of the scores that it leaves.
    """

    tensors_required = 3  # both halves of the key, and the step
    do_processing = True

    def __init__(
        self, wanted: Mapping[str, Wanted], sampling: Sampling, ends: Ends, work: Work, watch: int | None = None
    ) -> None:
        self.wanted, self.sampling, self.ends, self.work, self.watch = wanted, sampling, ends, work, watch
        self.watched: dict[str, torch.Tensor] = {}  # each candidate's logits at step `watch`
        self.cache: Any = None  # transformers' own, and how many tokens a block of it has
        self.page = 0
        self._drawing: list[Drawing] = []
        self._seen: dict[str, torch.Tensor] = {}

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Requests carry no settings of their own."""

    def fill_defaults(self, rows: torch.Tensor) -> None:
        """Before the first forward pass."""
        rows.zero_()

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: torch.Tensor) -> None:
        """Before each forward pass: keys and steps of the sequences that get a token."""
        self._drawing = []
        for request in requests_in_batch:
            state, prompt = request.state, self.wanted[request.state.request_id].prompt
            # What was interrupted is read again together with its own tokens: only positions tell the step.
            read = state.position_offset
            self.work.prompt_computed += max(0, min(read, len(prompt)) - (read - request.query_length))
            if request.has_new_token:
                tokens = state.initial_tokens + state.generated_tokens
                self._drawing.append(Drawing(state.request_id, read - len(prompt), tokens, tokens[len(prompt) :]))
        count = len(self._drawing)
        keys = torch.tensor([self.wanted[each.name].key for each in self._drawing], dtype=torch.int64)
        arg_storage[:2, :count] = keys.view(torch.int32).view(-1, 2).T.to(arg_storage.device)
        arg_storage[2, :count] = torch.tensor([each.step for each in self._drawing], dtype=torch.int32)
        self.work.generated += count
        held = round((1 - self.cache.compute_free_capacity()) * self.cache.num_blocks) * self.page
        self.work.most_held = max(self.work.most_held, held)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """After each forward pass: `[n, vocabulary]` scores to ones of which the drawn token's is the largest."""
        for row, each in enumerate(self._drawing):
            if each.step == self.watch:
                self.watched[each.name] = scores[row].clone()
        size = max(1, MOST_SCORES // scores.shape[1])
        for start in range(0, len(self._drawing), size):  # the rows after them are of prompts that are half read
            drawing = self._drawing[start : start + size]
            part = slice(start, start + len(drawing))
            keys = rows[:2, part].T.contiguous().view(torch.int64)[:, 0]
            seen = self._seen_by(drawing, scores) if self.sampling.repetition_penalty != 1 else None
            chosen = choose(scores[part], keys, rows[2, part].long(), self.sampling, seen)[0]
            for row, each in enumerate(drawing):
                if self._over(self.wanted[each.name].place, each.answer):
                    chosen[row] = min(self.ends.tokens)
            scores[part] = float("-inf")
            scores[part].scatter_(1, chosen[:, None], 0.0)
        return scores

    def _over(self, place: int, answer: list[int]) -> bool:
        """Whether the answer ends with the token before: transformers learns it by an end token."""
        ends = self.ends
        return bool(answer and ends.tokens) and answer[-1] in ends.watched and ends.over(place, answer)

    def _seen_by(self, drawing: Sequence[Drawing], scores: torch.Tensor) -> torch.Tensor:
        """`[n, vocabulary]` bool, the tokens of each prompt and answer."""
        for each in drawing:
            if each.name not in self._seen:
                self._seen[each.name] = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
                self._seen[each.name][each.tokens] = True
            self._seen[each.name][each.tokens[-1]] = True
        return torch.stack([self._seen[each.name] for each in drawing])
