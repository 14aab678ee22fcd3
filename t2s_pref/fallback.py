"""Candidates through transformers' own `generate`, with the same noise: for models that nothing faster is right for.

Sliding windows, recurrent states and other memories need their own code, which `generate` knows. Prompts are never
padded, because not every such model can tell padding from text: only prompts of one length are decoded together. A
prompt is read once and its cache copied for its candidates, where the model has one that can be copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from t2s_pref.attention import base_of
from t2s_pref.choice import Sampling, candidate_key, choose
from t2s_pref.decoding import Drawn, Ends, OutOfMemoryError, out_of_memory
from t2s_pref.plan import slots_within
from t2s_pref.protocol import Request, Work
from t2s_pref.reading import forward_takes


class GenerateDecoder:
    """Draws candidates with `generate`; called like a [`~t2s_pref.decoding.Decoder`]."""

    def __init__(self, model: PreTrainedModel, work: Work | None = None) -> None:
        self.model, self.work = model, work or Work()
        self.device = model.get_input_embeddings().weight.device
        self.ceiling = float("inf")
        self._copies = forward_takes(model, "past_key_values")

    @torch.inference_mode()
    def draw(self, requests: Sequence[Request], sampling: Sampling, ends: Ends, budget: int) -> Iterator[Drawn]:
        """Draw every candidate of the requests, holding `budget` tokens at a time where that is possible.

        Raises:
            [`OutOfMemoryError`]: where memory does not suffice for one candidate.
        """
        longest_first = sorted(range(len(requests)), key=lambda place: -len(requests[place].prompt))
        for length, places in groupby(longest_first, key=lambda place: len(requests[place].prompt)):
            waiting = [(place, candidate) for place in places for candidate in requests[place].candidates]
            expected = max((requests[place].expected for place, _ in waiting), default=0)
            while waiting:
                expected = max(1, min(expected, max(requests[place].cap for place, _ in waiting)))
                within = int(min(budget, self.ceiling))
                at_once = slots_within(within, 0, len(waiting), length + expected)
                # a single one gets what it needs; of several, those that need more begin again with more room
                most = within // at_once - length if at_once > 1 else max(requests[place].cap for place, _ in waiting)
                drawn = None
                try:
                    with _without_settings(self.model):
                        drawn = self._generate(requests, waiting[:at_once], sampling, ends, most)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                if drawn is None:  # past the handler, whose traceback would keep the failed batch alive
                    if at_once == 1:
                        raise OutOfMemoryError
                    self.ceiling = at_once // 2 * (length + expected)
                    continue
                ended = [each for each in drawn if each.ended or len(each.tokens) >= requests[each.place].cap]
                yield from ended
                whole = {(each.place, each.candidate) for each in ended}
                if len(whole) < len(drawn):
                    expected = 2 * most
                waiting = [one for one in waiting if one not in whole]

    def _generate(
        self,
        requests: Sequence[Request],
        group: Sequence[tuple[int, int]],
        sampling: Sampling,
        ends: Ends,
        most: int,
    ) -> list[Drawn]:
        places = list(dict.fromkeys(place for place, _ in group))
        ids = torch.tensor([requests[place].prompt for place in places], device=self.device)
        rows = torch.tensor([places.index(place) for place, _ in group], device=self.device)
        length = ids.shape[1]
        known = {}
        self.work.prompt_asked += len(group) * length
        if self._copies and length > 1:
            cache = DynamicCache(config=base_of(self.model).config.get_text_config(decoder=True))
            self.model(
                input_ids=ids[:, :-1],
                past_key_values=cache,
                use_cache=True,
                **({"logits_to_keep": 1} if forward_takes(self.model, "logits_to_keep") else {}),
            )
            cache.reorder_cache(rows)
            known = {"past_key_values": cache}
            self.work.prompt_computed += len(places) * (length - 1) + len(group)
        else:
            self.work.prompt_computed += len(group) * length
        caps = [min(most, requests[place].cap) for place, _ in group]
        keys = torch.tensor([candidate_key(requests[place].row_seed, candidate) for place, candidate in group])
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max(caps),
            eos_token_id=sorted(ends.tokens) or None,
            # what stands after an end is cut off again, so any token will do
            pad_token_id=min(ends.tokens, default=0),
            use_cache=True,
        )
        self.work.most_held = max(self.work.most_held, len(group) * (length + max(caps)))
        written = self.model.generate(
            ids[rows],
            attention_mask=torch.ones_like(ids[rows]),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Noise(keys.to(self.device), length, sampling)]),
            stopping_criteria=StoppingCriteriaList([_Stop(length, group, caps, ends)]),
            **known,
        )[:, length:].tolist()
        return [
            self._cut(place, candidate, tokens[:cap], ends)
            for (place, candidate), tokens, cap in zip(group, written, caps, strict=True)
        ]

    def _cut(self, place: int, candidate: int, tokens: list[int], ends: Ends) -> Drawn:
        answer, ended, count = ends.cut(place, tokens)
        self.work.generated += count
        return Drawn(place, candidate, answer, ended)


@contextmanager
def _without_settings(model: PreTrainedModel) -> Iterator[None]:
    """Nothing of the model's own generation settings takes effect, not even where ours say nothing."""
    base = base_of(model)
    before = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = before


class _Noise(LogitsProcessor):
    """Leaves one token possible, the one that the noise chooses."""

    def __init__(self, keys: torch.Tensor, start: int, sampling: Sampling) -> None:
        self.keys, self.start, self.sampling = keys, start, sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        steps = torch.full_like(self.keys, input_ids.shape[1] - self.start)
        seen = None
        if self.sampling.repetition_penalty != 1:
            seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, input_ids, True)
        token, _ = choose(scores, self.keys, steps, self.sampling, seen)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0)


class _Stop(StoppingCriteria):
    """Ends a sequence at its own cap, and where its text says so."""

    def __init__(self, start: int, group: Sequence[tuple[int, int]], caps: Sequence[int], ends: Ends) -> None:
        self.start, self.group, self.caps, self.ends = start, group, caps, ends
        self.over = [False] * len(caps)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        count = input_ids.shape[1] - self.start
        last = input_ids[:, -1].tolist() if self.ends.watched else [-1] * len(self.caps)
        for row, token in enumerate(last):
            if not self.over[row]:
                told = token in self.ends.watched and self.ends.over(
                    self.group[row][0], input_ids[row, self.start :].tolist()
                )
                self.over[row] = told or count >= self.caps[row]
        return torch.tensor(self.over, device=input_ids.device)
