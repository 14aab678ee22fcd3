"""Keys and values: of prompt beginnings, held once and used again, and of the sequences that are being decoded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from t2s_pref.plan import common

# A window on the slots grows in steps, so that few shapes occur.
WINDOW = 16


class KeysValues(NamedTuple):
    """Of one layer, both `[1, heads, tokens, width]`; the two widths may differ."""

    keys: torch.Tensor
    values: torch.Tensor

    def first(self, tokens: int) -> KeysValues:
        """Of the first tokens only."""
        return KeysValues(self.keys[:, :, :tokens], self.values[:, :, :tokens])

    def then(self, more: KeysValues) -> KeysValues:
        """Followed by those of further tokens."""
        return KeysValues(torch.cat([self.keys, more.keys], 2), torch.cat([self.values, more.values], 2))


@dataclass(frozen=True)
class Beginning:
    """The first tokens of some prompts, with their keys and values, layer by layer."""

    tokens: tuple[int, ...]
    layers: tuple[KeysValues, ...]


class Beginnings:
    """What was computed of prompts' beginnings, for the batches, rounds and runs to come; the oldest are dropped first.

    Rows of one schema come in many batches, and another schema still shares its system prompt.
    """

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[int, ...], Beginning] = OrderedDict()
        self.tokens = 0

    def nearest(self, prompt: Sequence[int]) -> tuple[Beginning | None, int]:
        """The one that agrees with `prompt` the furthest, and for how many tokens."""
        prompt = tuple(prompt)
        if prompt in self._held:
            self._held.move_to_end(prompt)
            return self._held[prompt], len(prompt)
        best, length = None, 0
        for held in self._held.values():
            if (agreed := common(held.tokens, prompt)) > length:
                best, length = held, agreed
        if best is not None:
            self._held.move_to_end(best.tokens)
        return best, length

    def add(self, beginning: Beginning) -> None:
        """Hold one more."""
        if beginning.tokens not in self._held:
            self._held[beginning.tokens] = beginning
            self.tokens += len(beginning.tokens)

    def shrink(self, most: int) -> None:
        """Drop the oldest until at most so many tokens are held."""
        while self._held and self.tokens > most:
            self.tokens -= len(self._held.popitem(last=False)[0])


class ReadingCache(Cache):
    """While a prompt is read: what comes before it is shown to each layer, and what it adds is kept apart.

    Args:
        past: keys and values of the tokens before, layer by layer, on the devices of the layers; `None` where there
            are none.
        layers: how many layers the model has.
    """

    def __init__(self, past: Sequence[KeysValues] | None, layers: int) -> None:
        super().__init__(layers=[_ReadingLayer(past[number] if past else None) for number in range(layers)])

    def added(self) -> list[KeysValues]:
        """What the forward pass has added, layer by layer."""
        return [KeysValues(layer.keys, layer.values) for layer in self.layers]


class _ReadingLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, past: KeysValues | None) -> None:
        super().__init__()
        self.past = past

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object) -> KeysValues:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        added = KeysValues(key_states, value_states)
        return added if self.past is None else self.past.then(added)

    def get_seq_length(self) -> int:
        return 0 if self.past is None else self.past.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """While sequences are decoded: a slot of `room` tokens for each, of which the first `count` slots are in use.

    Before each step, `place` says where each sequence writes its next token, and how many of its tokens it sees.
    """

    def __init__(self, like: Sequence[KeysValues], slots: int, room: int) -> None:
        self.slots, self.room, self.count, self.window = slots, room, 0, WINDOW
        self._places: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        super().__init__(layers=[_SlotLayer(layer, self) for layer in like])

    def place(self, own: torch.Tensor, longest: int) -> None:
        """The sequences' next tokens go to `own` (`[count]`), none of them beyond `longest`."""
        self.window = min(self.room, -(-(longest + 1) // WINDOW) * WINDOW)
        self._places = {own.device: (torch.arange(len(own), device=own.device), own)}

    def places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots and places of the step, on a layer's device."""
        if device not in self._places:
            slots, own = next(iter(self._places.values()))
            self._places[device] = (slots.to(device), own.to(device))
        return self._places[device]

    def move(self, to: torch.Tensor, of: torch.Tensor) -> None:
        """Copy the slots `of` over the slots `to`."""
        for layer in self.layers:
            there, here = to.to(layer.keys.device), of.to(layer.keys.device)
            layer.keys[there], layer.values[there] = layer.keys[here], layer.values[here]

    def write(self, number: int, start: int, added: KeysValues, times: torch.Tensor) -> None:
        """Into the slots of layer `number` from `start` on: `added` (`[rows, heads, tokens, width]`), each row as often
        as `times` says."""
        layer, count = self.layers[number], added.keys.shape[2]
        rows = times.to(layer.keys.device)
        into = slice(start, start + len(rows))
        layer.keys[into, :, :count], layer.values[into, :, :count] = added.keys[rows], added.values[rows]
        # what was there before is hidden, but nothing hides an infinity of half precision
        layer.keys[into, :, count:], layer.values[into, :, count:] = 0, 0

    def grow(self, slots: int, room: int) -> None:
        """Take other slots of more room; what the sequences in use hold is kept."""
        self.slots, self.room = slots, room
        for layer in self.layers:
            layer.keys, layer.values = (self._larger(held) for held in (layer.keys, layer.values))

    def _larger(self, held: torch.Tensor) -> torch.Tensor:
        larger = held.new_zeros(self.slots, held.shape[1], self.room, held.shape[3])
        larger[: self.count, :, : held.shape[2]] = held[: self.count]
        return larger


class _SlotLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, like: KeysValues, cache: SlotCache) -> None:
        super().__init__()
        self.cache, self.is_initialized = cache, True
        self.keys, self.values = (
            held.new_zeros(cache.slots, held.shape[1], cache.room, held.shape[3]) for held in like
        )

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object) -> KeysValues:
        cache = self.cache
        slots, own = cache.places(self.keys.device)
        self.keys[slots, :, own], self.values[slots, :, own] = key_states[:, :, 0], value_states[:, :, 0]
        return KeysValues(self.keys[: cache.count, :, : cache.window], self.values[: cache.count, :, : cache.window])

    def get_seq_length(self) -> int:
        return self.cache.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.window, 0

    def get_max_length(self) -> int:
        return -1
