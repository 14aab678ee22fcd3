"""Reading prompts: every distinct token goes through the model once.

The beginning that prompts share is read first, and only as far as no earlier one agrees with it. What differs is read
as one tree of branches, packed into a single sequence without padding: a token sees its own ancestors only.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from t2s_pref.attention import HIDDEN, NAME, base_of
from t2s_pref.kv import Beginning, Beginnings, KeysValues, ReadingCache
from t2s_pref.plan import common
from t2s_pref.protocol import Work

# Tokens that go through the model at a time: enough to keep its matrix products busy, and a bound on the rest.
CHUNK = 2048


class Branches(NamedTuple):
    """The prompts of some rows beyond their beginning: keys and values by layer (`[rows, heads, longest, width]`,
    padded at the end), lengths, and the logits of each prompt's last token."""

    layers: list[KeysValues]
    lengths: list[int]
    logits: torch.Tensor


def forward_takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward, below an adapter if there is one, has this argument."""
    return argument in inspect.signature(base_of(model).forward).parameters


class Reader:
    """Reads prompts with a model and remembers their beginnings."""

    def __init__(self, model: PreTrainedModel, beginnings: Beginnings, work: Work) -> None:
        self.model, self.beginnings, self.work = model, beginnings, work
        self.device = model.get_input_embeddings().weight.device
        self.layers = base_of(model).config.get_text_config(decoder=True).num_hidden_layers
        self._picks_logits = forward_takes(model, "logits_to_keep")

    def beginning(self, tokens: tuple[int, ...]) -> Beginning:
        """Keys and values of these tokens, read only beyond what is known of them."""
        known, length = self.beginnings.nearest(tokens)
        if known is not None and length == len(known.tokens) == len(tokens):
            return known
        return self._remember(tokens, self._go_on(known, length, tokens[length:])[0])

    def _go_on(
        self, known: Beginning | None, length: int, tokens: Sequence[int]
    ) -> tuple[Sequence[KeysValues], torch.Tensor | None]:
        """Keys and values of the first `length` known tokens and of these after them, and the last logits."""
        past = tuple(layer.first(length) for layer in known.layers) if known is not None and length else ()
        logits = None
        for first in range(0, len(tokens), CHUNK):
            piece = tokens[first : first + CHUNK]
            positions = range(length + first, length + first + len(piece))
            added, logits = self._forward(piece, positions, past, None, [len(piece) - 1])
            past = tuple(map(KeysValues.then, past, added)) if past else tuple(added)
        return past, logits

    def _remember(self, tokens: tuple[int, ...], layers: Sequence[KeysValues]) -> Beginning:
        # a copy: what is only looked at would hold on to all that was read with it
        beginning = Beginning(tokens, tuple(KeysValues(*(each.clone() for each in layer)) for layer in layers))
        if tokens:
            self.beginnings.add(beginning)
        return beginning

    def branches(self, shared: tuple[int, ...], rests: Sequence[tuple[int, ...]]) -> tuple[Beginning, Branches]:
        """Read the prompts that go on from a shared beginning, each for one token or more."""
        if len(rests) == 1:
            return self._alone(shared, rests[0])
        beginning = self.beginning(shared)
        order = sorted(range(len(rests)), key=rests.__getitem__)
        found: list[Branches] = []
        trees = _trees([rests[row] for row in order])
        for tree in trees:
            found.append(self._tree(beginning, tree))
        longest = max(map(len, rests))
        back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=self.device)
        layers = [
            KeysValues(
                *(
                    torch.cat([torch.nn.functional.pad(each, (0, 0, 0, longest - each.shape[2])) for each in of])[
                        back.to(of[0].device)
                    ]
                    for of in zip(*parts, strict=True)
                )
            )
            for parts in zip(*(branches.layers for branches in found), strict=True)
        ]
        logits = torch.cat([branches.logits for branches in found])
        return beginning, Branches(layers, [len(rest) for rest in rests], logits[back.to(logits.device)])

    def _alone(self, shared: tuple[int, ...], rest: tuple[int, ...]) -> tuple[Beginning, Branches]:
        """A single prompt, in as few passes as it takes."""
        known, length = self.beginnings.nearest(shared)
        layers, logits = self._go_on(known, length, (*shared[length:], *rest))
        if known is None or not length == len(known.tokens) == len(shared):
            known = self._remember(shared, [layer.first(len(shared)) for layer in layers])
        after = [KeysValues(*(each[:, :, len(shared) :] for each in layer)) for layer in layers]
        return known, Branches(after, [len(rest)], logits)

    def _tree(self, beginning: Beginning, rests: Sequence[tuple[int, ...]]) -> Branches:
        """Branches in the order of their tokens, as one packed sequence."""
        if len(rests) == 1:  # a chain, however long
            return self._alone(beginning.tokens, rests[0])[1]
        tokens: list[int] = []
        depths: list[int] = []
        paths: list[list[int]] = []
        blocks: list[tuple[int, list[int]]] = []
        for place, rest in enumerate(rests):
            agreed = common(rests[place - 1], rest) if place else 0
            path = paths[-1][:agreed] if place else []
            blocks.append((len(tokens), path))
            paths.append([*path, *range(len(tokens), len(tokens) + len(rest) - agreed)])
            tokens += rest[agreed:]
            depths += range(agreed, len(rest))
        start = len(beginning.tokens)
        mask = torch.full((len(tokens), start + len(tokens)), HIDDEN)
        mask[:, :start] = 0
        for (first, path), (last, _) in zip(blocks, [*blocks[1:], (len(tokens), [])], strict=True):
            if path:
                mask[first:last, [start + node for node in path]] = 0
            mask[first:last, start + first : start + last].triu_(1)
        positions = [start + depth for depth in depths]
        added, logits = self._forward(tokens, positions, beginning.layers, mask, [path[-1] for path in paths])
        longest = max(map(len, rests))
        index = torch.tensor([path + [0] * (longest - len(path)) for path in paths])
        layers = [KeysValues(*(each[0][:, index.to(each.device)].transpose(0, 1) for each in layer)) for layer in added]
        return Branches(layers, [len(rest) for rest in rests], logits)

    def _forward(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        past: Sequence[KeysValues] | None,
        mask: torch.Tensor | None,
        keep: list[int],
    ) -> tuple[list[KeysValues], torch.Tensor]:
        """One pass over packed tokens; `mask` (`[tokens, past + tokens]`) is causal where there is none."""
        before = past[0].keys.shape[2] if past else 0
        if mask is None and before:
            mask = torch.full((len(tokens), before + len(tokens)), HIDDEN).triu_(before + 1)
        if mask is not None:
            mask = mask.to(self.device, self.model.dtype)[None, None]
        elif base_of(self.model).config._attn_implementation == NAME:
            mask = torch.zeros(1, 1, 1, 1, device=self.device, dtype=self.model.dtype)
        cache = ReadingCache(past if before else None, self.layers)
        wanted = torch.tensor(keep, device=self.device)
        logits = self.model(
            input_ids=torch.tensor([tokens], device=self.device),
            attention_mask=mask,
            position_ids=torch.tensor([positions], device=self.device),
            past_key_values=cache,
            use_cache=True,
            # the others would be [tokens, vocabulary]: gigabytes that nobody reads
            **({"logits_to_keep": wanted} if self._picks_logits else {}),
        ).logits[0]
        self.work.prompt_computed += len(tokens)
        return cache.added(), logits if self._picks_logits else logits[wanted.to(logits.device)]


def _trees(rests: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Branches in order, cut where a tree would be more than a chunk; a branch that is so alone is alone."""
    trees: list[list[tuple[int, ...]]] = []
    nodes = 0
    for place, rest in enumerate(rests):
        fresh = len(rest) - (common(rests[place - 1], rest) if trees else 0)
        if not trees or nodes + fresh > CHUNK:
            trees.append([])
            nodes, fresh = 0, len(rest)
        trees[-1].append(rest)
        nodes += fresh
    return trees
