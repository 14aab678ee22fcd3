"""Draw the candidates of a batch: prompts read once, sequences in slots, noise of each one's own.

Finished sequences leave at once, the last ones take their slots, and those that wait enter. On a GPU the host looks
only every few steps, so that it never stands in the GPU's way.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from t2s_pref.attention import HIDDEN, NAME, Sharing, attention_of, base_of, decoding
from t2s_pref.choice import Sampling, candidate_key, choose
from t2s_pref.kv import WINDOW, Beginning, Beginnings, KeysValues, SlotCache
from t2s_pref.plan import slots_within
from t2s_pref.protocol import Request, Work
from t2s_pref.reading import Reader

logger = logging.getLogger(__name__)

# Steps between two looks of the host at what was drawn. A CPU is never ahead of it.
STRIDE = {"cpu": 1}
LONG_STRIDE = 8


class Drawn(NamedTuple):
    """The token ids of one candidate of one request, without the end token; `ended` is False where the cap cut it."""

    place: int
    candidate: int
    tokens: list[int]
    ended: bool


@dataclass(frozen=True)
class Ends:
    """What ends an answer: a token of `tokens`; or, after one of `watched`, that `over` says so of the request's place
    and of all tokens so far."""

    tokens: frozenset[int]
    watched: frozenset[int] = frozenset()
    over: Callable[[int, list[int]], bool] = lambda place, tokens: False

    def cut(self, place: int, tokens: list[int]) -> tuple[list[int], bool, int]:
        """An answer up to its end, without an end token; whether it has one; and how many tokens that took."""
        for count, token in enumerate(tokens, start=1):
            if token in self.tokens:
                return tokens[: count - 1], True, count
            if token in self.watched and self.over(place, tokens[:count]):
                return tokens[:count], True, count
        return tokens, False, len(tokens)


class OutOfMemoryError(Exception):
    """Not even one sequence fits."""


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that an allocation failed, on a GPU or in main memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("out of memory", "can't allocate memory", "not enough memory"))
    )


@dataclass
class _Live:
    """A sequence in a slot, as the host sees it; `start` is how many tokens its slot held before the answer."""

    place: int
    candidate: int
    cap: int
    start: int
    beginning: Beginning
    tokens: list[int] = field(default_factory=list)
    ended: bool | None = None

    @property
    def name(self) -> tuple[int, int]:
        """Which it is of all."""
        return self.place, self.candidate

    @property
    def own(self) -> int:
        """Where the last token goes."""
        return self.start + len(self.tokens) - 1


class Decoder:
    """Draws candidates with one model.

    Args:
        model: with the attention interface of transformers.
        held_once: whether the beginning that sequences share is held once, by attention that joins the parts. If not,
            each slot has its whole prompt, and attention is the model's own.
        beginnings: what is known of earlier prompts.
        work: is counted up.
    """

    def __init__(
        self, model: PreTrainedModel, held_once: bool, beginnings: Beginnings | None = None, work: Work | None = None
    ) -> None:
        self.model, self.held_once, self.work = model, held_once, work or Work()
        self.beginnings = Beginnings() if beginnings is None else beginnings
        self.reader = Reader(model, self.beginnings, self.work)
        self.device = self.reader.device
        self.stride = STRIDE.get(self.device.type, LONG_STRIDE)
        self.choose = choose
        # a batch that held so many tokens has met the end of memory
        self.ceiling = float("inf")

    @torch.inference_mode()
    def draw(self, requests: Sequence[Request], sampling: Sampling, ends: Ends, budget: int) -> Iterator[Drawn]:
        """Draw every candidate of the requests, holding `budget` tokens at a time where that is possible.

        Raises:
            [`OutOfMemoryError`]: where memory does not suffice for one candidate.
        """
        batch = _Batch(self, requests, sampling, ends, budget)
        try:
            while batch.pending():
                with self._attention():  # not while the caller has its turn: it may use the model itself
                    while batch.pending() and not batch.done:
                        self._advance(batch)
                yield from batch.finished()
        finally:
            batch.clear()

    def _advance(self, batch: _Batch) -> None:
        try:
            batch.advance()
            return
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # past the handler, whose traceback would keep the failed step's tensors alive
        self.ceiling = min(self.ceiling, batch.give_way())

    @contextmanager
    def _attention(self) -> Iterator[None]:
        current = base_of(self.model).config._attn_implementation
        name = NAME if self.held_once else current if current in ("sdpa", "eager") else "sdpa"
        with attention_of(self.model, name):
            yield


class _Batch:
    """The sequences of one call, in slots and waiting for one."""

    def __init__(
        self, decoder: Decoder, requests: Sequence[Request], sampling: Sampling, ends: Ends, budget: int
    ) -> None:
        self.decoder, self.requests, self.sampling, self.ends, self.budget = decoder, requests, sampling, ends, budget
        self.device = decoder.device
        self.queue = deque((place, list(each.candidates)) for place, each in enumerate(requests) if each.candidates)
        self.shared = [tuple(request.prompt[: self._shared(request)]) for request in requests]
        self.rests = [
            tuple(request.prompt[len(shared) :]) for request, shared in zip(requests, self.shared, strict=True)
        ]
        own = [
            len(rest) + (0 if decoder.held_once else len(shared))
            for rest, shared in zip(self.rests, self.shared, strict=True)
        ]
        expected = [min(request.cap, max(1, request.expected)) for request in requests]
        self.room = _rounded(max(map(sum, zip(own, expected, strict=True)), default=1))
        self.most_room = max((length + request.cap for length, request in zip(own, requests, strict=True)), default=1)
        self.held = sum(map(len, set(self.shared)))
        self.limit = max(1, sum(len(request.candidates) for request in requests))
        self.slots = slots_within(budget, self.held, self.limit, self.room)
        self.ends_on_device = torch.tensor(sorted(ends.tokens), device=self.device, dtype=torch.long)
        self.live: list[_Live] = []
        self.done: list[Drawn] = []
        self.cache: SlotCache | None = None
        self.stalled: list[int] = []
        self.state: dict[str, torch.Tensor] = {}
        self.sharings: list[Sharing] = []
        self.entered = self.last_try = False
        self.expected_room = self.room
        self.last: set[tuple[int, int]] = set()  # what has waited for the others once

    def _shared(self, request: Request) -> int:
        return max(0, min(request.shared, len(request.prompt) - 1))

    def pending(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.queue or self.live)

    def advance(self) -> None:
        """Let those that wait enter where enough slots are free; a stride of steps where not."""
        free = self.slots - len(self.live)
        waiting = sum(len(candidates) for _, candidates in self.queue)
        if self.queue and free >= min(waiting, max(len(self._next(self.slots)), self.slots // 4)):
            self._enter(free)
        else:
            self._steps()

    def finished(self) -> list[Drawn]:
        """The candidates that have ended since the last call."""
        done, self.done = self.done, []
        return done

    def clear(self) -> None:
        """Let go of all memory but the beginnings."""
        self.cache, self.state, self.sharings = None, {}, []

    # -- entering ----------------------------------------------------------------------------------------------------

    def _next(self, free: int) -> list[int]:
        """The candidates that enter next where so many slots are free: of one row all, or what there are slots for."""
        candidates = self.queue[0][1]
        return candidates[:free] if len(candidates) > self.slots else candidates

    def _enter(self, free: int) -> None:
        entering: list[tuple[int, list[int]]] = []
        shared = self.shared[self.queue[0][0]]
        while self.queue and self.shared[self.queue[0][0]] == shared and 0 < len(some := self._next(free)) <= free:
            place, candidates = self.queue.popleft()
            entering.append((place, some))
            free -= len(some)
            if rest := candidates[len(some) :]:
                self.queue.appendleft((place, rest))
        self.entered = False
        try:
            self._read(shared, entering)
        except (RuntimeError, MemoryError):
            if not self.entered:  # else they leave as those before them
                self.queue.extendleft(reversed(entering))  # a row may now wait in two pieces
            raise

    def _read(self, shared: tuple[int, ...], entering: list[tuple[int, list[int]]]) -> None:
        decoder, once = self.decoder, self.decoder.held_once
        beginning, branches = decoder.reader.branches(shared, [self.rests[place] for place, _ in entering])
        decoder.beginnings.shrink(max(self.budget - self.slots * self.room, self.held))
        if self.cache is None:
            like = [KeysValues(*(each[:1] for each in layer)) for layer in branches.layers]
            self.cache = SlotCache(like, self.slots, self.room)
            self.state = self._empty(self.slots, branches.logits.shape[-1])
        times = [len(candidates) for _, candidates in entering]
        first, count = len(self.live), len(self.live) + sum(times)
        rows = torch.tensor([row for row, number in enumerate(times) for _ in range(number)], device=self.device)
        for number, layer in enumerate(branches.layers):
            if not once and shared:
                before = beginning.layers[number]
                layer = KeysValues(
                    *(
                        torch.cat([held.expand(len(entering), -1, -1, -1), each], 2)
                        for held, each in zip(before, layer, strict=True)
                    )
                )
            self.cache.write(number, first, layer, rows)
        start = [length + (0 if once else len(shared)) for length in branches.lengths]
        fresh = [
            _Live(place, candidate, self.requests[place].cap, length, beginning)
            for (place, candidates), length in zip(entering, start, strict=True)
            for candidate in candidates
        ]
        state, into = self.state, slice(first, count)
        for name, values in (
            ("key", [candidate_key(self.requests[live.place].row_seed, live.candidate) for live in fresh]),
            ("cap", [live.cap for live in fresh]),
            ("own", [live.start for live in fresh]),
            ("base", [len(shared) if once else 0] * len(fresh)),
        ):
            state[name][into] = torch.tensor(values, device=self.device)
        state["step"][into], state["alive"][into] = 0, True
        if "seen" in state:
            state["seen"][into] = False
            for slot, live in enumerate(fresh, start=first):
                state["seen"][slot, torch.tensor(self.requests[live.place].prompt, device=self.device)] = True
        logits = branches.logits.to(self.device)[rows]
        self.live += fresh
        self.entered = True
        self.cache.count = count
        drawn = torch.full((len(fresh), 1), -1, device=self.device)
        self._choose(logits, into, drawn[:, 0], None)
        self.decoder.work.prompt_asked += sum(len(self.requests[live.place].prompt) for live in fresh)
        self._settle(first, drawn)
        self._note()

    def _empty(self, slots: int, vocabulary: int) -> dict[str, torch.Tensor]:
        names = ("key", "cap", "own", "base", "step", "token")
        state = {name: torch.zeros(slots, dtype=torch.long, device=self.device) for name in names}
        state["alive"] = torch.zeros(slots, dtype=torch.bool, device=self.device)
        if self.sampling.repetition_penalty != 1:
            state["seen"] = torch.zeros(slots, vocabulary, dtype=torch.bool, device=self.device)
        return state

    # -- stepping ----------------------------------------------------------------------------------------------------

    def _steps(self) -> None:
        stride = self.decoder.stride
        while (longest := max(live.own for live in self.live)) + stride > self.cache.room:
            self._grow(longest + stride)
        cache, state, count = self.cache, self.state, len(self.live)
        drawn = torch.full((count, stride), -1, device=self.device)
        sort = None if stride == 1 else torch.tensor(self.stalled, dtype=torch.long, device=self.device)
        places = torch.arange(cache.room, device=self.device)
        kind = torch.float32 if self.decoder.held_once else self.decoder.model.dtype
        used = slice(0, count)
        for step in range(stride):
            own = state["own"][used].clone()
            cache.place(own, longest + step)
            mask = torch.zeros(count, cache.window, device=self.device, dtype=kind)
            mask.masked_fill_(places[: cache.window] > own[:, None], HIDDEN)
            with decoding(self.sharings):
                logits = self.decoder.model(
                    input_ids=state["token"][used, None],
                    attention_mask=mask[:, None, None],
                    position_ids=(state["base"][used] + own)[:, None],
                    past_key_values=cache,
                    use_cache=True,
                ).logits[:, -1]
            state["own"][used] += state["alive"][used]
            self._choose(logits.to(self.device), used, drawn[:, step], sort)
            sort = None if stride == 1 else torch.empty(0, dtype=torch.long, device=self.device)
        self._settle(0, drawn)

    def _choose(self, logits: torch.Tensor, used: slice, drawn: torch.Tensor, sort: torch.Tensor | None) -> None:
        """The next token of each sequence, noted in `drawn` and in the state; nothing here waits for a GPU."""
        state = self.state
        key, step, alive = state["key"][used], state["step"][used], state["alive"][used]
        seen = state["seen"][used] if "seen" in state else None
        token, unsure = self.decoder.choose(logits, key, step, self.sampling, seen, sort)
        go = alive if unsure is None else alive & ~unsure
        if unsure is not None:  # it stays where it is, and the next stride sorts its whole vocabulary
            state["own"][used] -= (alive & unsure).long()
        token = torch.where(go, token, state["token"][used])
        drawn.copy_(torch.where(go, token, -1))
        state["token"][used] = token
        step = step + go
        state["step"][used] = step
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        state["alive"][used] = alive & ~(go & (torch.isin(token, self.ends_on_device) | (step >= state["cap"][used])))

    def _settle(self, first: int, drawn: torch.Tensor) -> None:
        """Take in what was drawn for the slots from `first` on; those that have ended leave."""
        self.stalled = [slot for slot in self.stalled if slot < first]
        ends = self.ends
        for slot, tokens in enumerate(drawn.tolist(), start=first):
            live = self.live[slot]
            for token in tokens:
                if token < 0:
                    break
                self.decoder.work.generated += 1
                if token in ends.tokens:
                    live.ended = True
                    break
                live.tokens.append(token)
                if token in ends.watched and ends.over(live.place, live.tokens):
                    live.ended = True
                    break
                if len(live.tokens) >= live.cap:
                    live.ended = False
                    break
            else:
                continue
            if live.ended is None:
                self.stalled.append(slot)
        gone = [slot for slot in range(first, len(self.live)) if self.live[slot].ended is not None]
        self.done += [
            Drawn(live.place, live.candidate, live.tokens, live.ended) for live in map(self.live.__getitem__, gone)
        ]
        self._close(gone)

    def _close(self, gone: list[int]) -> None:
        """The last sequences take the slots of those that are gone."""
        count = len(self.live) - len(gone)
        leaving = set(gone)
        to = [slot for slot in gone if slot < count]
        of = [slot for slot in range(count, len(self.live)) if slot not in leaving]
        if to:
            there, here = (torch.tensor(slots, device=self.device) for slots in (to, of))
            for tensor in self.state.values():
                tensor[there] = tensor[here]
            self.cache.move(there, here)
            for slot, other in zip(to, of, strict=True):
                self.live[slot] = self.live[other]
        moved = dict(zip(of, to, strict=True))
        self.stalled = [moved.get(slot, slot) for slot in self.stalled if slot not in leaving]
        del self.live[count:]
        self.cache.count = count
        self._share()

    def _share(self) -> None:
        """Which slots are around which beginning."""
        if not self.decoder.held_once:
            return
        around: dict[int, list[int]] = {}
        for slot, live in enumerate(self.live):
            around.setdefault(id(live.beginning), []).append(slot)
        self.sharings = [
            Sharing(
                self.live[slots[0]].beginning,
                None if len(around) == 1 else torch.tensor(slots, device=self.device),
            )
            for slots in around.values()
        ]

    # -- memory ------------------------------------------------------------------------------------------------------

    def _grow(self, needed: int) -> None:
        """Room for longer answers than were expected, for as many sequences as then fit; the shortest of the others
        begin again later, which changes none of their tokens. An answer that is far too long waits for the others
        first: the room that one takes would be lost to all."""
        room = _rounded(max(needed, min(self.cache.room * 5 // 4, self.most_room)))
        slots = slots_within(self.budget, self.held, self.limit, room)
        wanted = len(self.live) + sum(len(candidates) for _, candidates in self.queue)
        if room > 2 * self.expected_room and slots < min(self.slots, wanted):
            end = self.cache.room - self.decoder.stride
            long = [slot for slot, live in enumerate(self.live) if live.own > end and live.name not in self.last]
            if 0 < len(long) < len(self.live):
                self.last |= {self.live[slot].name for slot in long}
                self.queue.extend((self.live[slot].place, [self.live[slot].candidate]) for slot in long)
                self._close(long)
                return
        ranked = sorted(range(len(self.live)), key=lambda slot: -len(self.live[slot].tokens))
        later = sorted(ranked[slots:])
        self.queue.extendleft((self.live[slot].place, [self.live[slot].candidate]) for slot in reversed(later))
        self._close(later)
        self.decoder.beginnings.shrink(max(self.budget - slots * room, self.held))
        state = self._empty(slots, self.state["seen"].shape[-1] if "seen" in self.state else 0)
        for name, tensor in state.items():
            tensor[: len(self.live)] = self.state[name][: len(self.live)]
        self.cache.grow(slots, room)
        self.slots, self.room, self.state = slots, room, state
        self._note()

    def _note(self) -> None:
        work = self.decoder.work
        work.most_held = max(work.most_held, self.slots * self.room + self.decoder.beginnings.tokens)

    def give_way(self) -> int:
        """After memory has ended: half as many sequences, those in the slots from their beginning; how many tokens the
        batch may hold from now on."""
        attempted = min(self.slots, self.limit)
        # what has ended is handed over already
        self.queue.extendleft((live.place, [live.candidate]) for live in reversed(self.live) if live.ended is None)
        self.live = []
        self.clear()
        self.stalled = []
        self.decoder.beginnings.shrink(0)
        if attempted == 1:
            if self.last_try:
                raise OutOfMemoryError
            self.last_try = True  # now without what was held of other prompts
        self.limit = max(1, attempted // 2)
        self.slots = slots_within(self.budget, self.held, self.limit, self.room)
        logger.warning("Out of memory with %d sequences at a time; going on with %d.", attempted, self.slots)
        return self.held + self.slots * self.room


def _rounded(tokens: int) -> int:
    return -(-tokens // WINDOW) * WINDOW
