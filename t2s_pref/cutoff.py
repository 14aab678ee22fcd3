"""How long rows are for LLaMA-Factory, under which template and thinking mode: what `cutoff_len` has to be.

A row whose tokens, prompt and the longer answer together, are at most `cutoff_len` is not cut. A longer one loses the
end of its prompt, of its answers, or of both (`tokens_kept`), without a word.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from t2s_pref.columns import HISTORY
from t2s_pref.entries import Entry, Trained, noted
from t2s_pref.errors import UserError, one_line
from t2s_pref.lineage import SAMPLED
from t2s_pref.prompts import messages
from t2s_pref.templates import TEMPLATES, answer_ids, prompt_ids, ready, training_keys
from t2s_pref.tokens import THINK_TAGS, count_tokens, encode_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ROUND_TO = 64  # tokens that a measured cutoff_len is rounded up to
ROOM = 64  # tokens that a row may have more under a template that is not known here
TURN_END = 8  # tokens that an unknown template may put after an answer


class Length(NamedTuple):
    """How many tokens the prompt of a row has, and the longer one of its answers."""

    prompt: int
    answer: int


def thinking_mode(entries: Sequence[Entry], rows: Sequence[tuple[str, Trained]]) -> bool:
    """Whether the answers think: all of them do, or none.

    SQL that was sampled in thinking mode is trained on in it, because the prompt differs. That a teacher thought says
    nothing: where its thoughts were kept, they stand in the answers.

    Raises:
        [`UserError`]: some do and others do not, which LLaMA-Factory trains as "thoughts against none"; or the data
            were sampled in both modes.
    """
    places: dict[bool, tuple[str, int]] = {}
    before, number = None, 0
    for name, trained in rows:
        number = number + 1 if name == before else 0
        before = name
        for answer in trained.answers:
            places.setdefault(any(tag in answer for tag in THINK_TAGS), (name, number))
    if len(places) > 1:
        with_, without = (f"row {row} of {name!r}" for name, row in (places[True], places[False]))
        raise UserError(
            f"An answer in {with_} has a think block, one in {without} has none; LLaMA-Factory would train thoughts "
            "against none. Give datasets of one answer format."
        )
    if True in places:
        return True
    settings = [record.get("settings") for record in noted(entries, SAMPLED)]
    modes = {bool(each.get("enable_thinking")) for each in settings if isinstance(each, dict)}
    if len(modes) > 1:
        raise UserError("Some of these data were sampled with thinking on, others with it off; give those of one mode.")
    return True in modes


def template_keys(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    rows: Sequence[Trained],
    enable_thinking: bool,
    stage: str,
) -> dict[str, str | bool]:
    """The keys of the training file that decide what the prompt is: as sampled, or under the template that is given."""
    prompts = [trained.row for trained in rows]
    if template is None:
        keys = training_keys(tokenizer, prompts, enable_thinking)
    elif not template.strip():
        raise UserError(f"template is {template!r}; give the name of one, or leave it out to have one found.")
    elif template not in TEMPLATES:
        logger.warning(
            "template %r is none of %s: LLaMA-Factory stops if it has none of this name; whether its prompt is the one "
            "that is sampled with is not checked, and lengths are those of the model's own chat template",
            *(template, ", ".join(TEMPLATES)),
        )
        keys = {"template": template, "enable_thinking": enable_thinking}
    else:
        keys = {"template": template, **({"enable_thinking": enable_thinking} if TEMPLATES[template].thinks else {})}
        sampled = encode_chats(tokenizer, tokenizer.name_or_path, [messages(row) for row in prompts], enable_thinking)
        prepared = ready(template, tokenizer)
        trained = (prompt_ids(template, prepared, row, enable_thinking) for row in prompts)
        if other := sum(one != two for one, two in zip(sampled, trained, strict=True)):
            logger.warning(
                "template %r gives %d of %d rows another prompt than the model's own chat template, which is sampled "
                "with; leave template out to have one found",
                *(template, other, len(rows)),
            )
    if keys.get("enable_thinking") and not any(tag in rows[0].answers[0] for tag in THINK_TAGS):
        logger.warning(
            "the answers were sampled in thinking mode without their thoughts: what is trained is an empty think block "
            "and the SQL; answers in the format think keep them"
        )
    # Else stage sft puts an empty think block before each answer of the history.
    thinks = keys["template"] not in TEMPLATES or TEMPLATES[keys["template"]].thinks
    if stage == "sft" and thinks and any(row.get(HISTORY) for row in prompts):
        keys["mask_history"] = True
    return keys


def row_lengths(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Trained], keys: dict[str, Any], enable_thinking: bool
) -> list[Length]:
    """The tokens of each row, as LLaMA-Factory counts them."""
    template = keys["template"]
    if template in TEMPLATES:
        tokenizer = ready(template, tokenizer)
        return [
            Length(
                len(prompt_ids(template, tokenizer, trained.row, enable_thinking, trained.answers[0])),
                max(len(answer_ids(template, tokenizer, answer, enable_thinking)) for answer in trained.answers),
            )
            for trained in rows
        ]
    chats = [messages(trained.row) for trained in rows]
    prompts = encode_chats(tokenizer, tokenizer.name_or_path, chats, enable_thinking)
    answers = [max(count_tokens(tokenizer, list(trained.answers))) + TURN_END for trained in rows]
    return [Length(len(prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)]


def tokens_kept(prompt: int, answer: int, cutoff: int) -> Length:
    """What LLaMA-Factory 0.9.5 leaves of a prompt and an answer, each cut at its end: its `infer_seqlen`.

    >>> tokens_kept(130, 40, 150), tokens_kept(16, 604, 200), tokens_kept(100, 100, 150)
    (Length(prompt=110, answer=40), Length(prompt=16, answer=184), Length(prompt=75, answer=75))
    """
    if 2 * answer < cutoff:
        most = cutoff
    elif 2 * prompt < cutoff:
        most = cutoff - prompt
    else:
        most = int(cutoff * (answer / (prompt + answer)))
    answer = min(most, answer)
    return Length(min(cutoff - answer, prompt), answer)


def cutoff_len(
    given: int | None,
    rows: Sequence[tuple[str, Trained]],
    lengths: Sequence[Length],
    most: int | None,
    template: str,
) -> int:
    """The `cutoff_len` of these rows, or the one that is given; warns where a row is cut.

    Args:
        given: tokens, `None` for those of the longest row, rounded up to a multiple of 64 and at most `most`.
        rows: the name of the dataset and the row, for the warning.
        lengths: of the rows.
        most: tokens that the model has positions for, `None` where it does not say.
        template: 64 tokens more than the longest row has, before rounding, where it is none of `TEMPLATES`.

    Raises:
        [`UserError`]: not even the shortest prompt and a token fit into what is given.
    """
    totals = [sum(length) for length in lengths]
    longest = max(totals)
    needed = longest if template in TEMPLATES else longest + ROOM
    cutoff = given or min(-(-needed // ROUND_TO) * ROUND_TO, most or math.inf)
    shortest = min(length.prompt for length in lengths)
    if cutoff <= shortest:
        raise UserError(
            f"cutoff_len is {cutoff}, and not even the shortest prompt fits, of {shortest} tokens; the longest row has "
            f"{longest}."
        )
    if cut := [place for place, total in enumerate(totals) if total > cutoff]:
        name, _ = rows[cut[0]]
        number = cut[0] - next(place for place, (other, _) in enumerate(rows) if other == name)
        limit = "cutoff_len" if given else "the model's positions,"
        logger.warning(
            "%d of %d rows are longer than %s %d and will be cut (%s): the longest has %d tokens, the first is row %d "
            "of %r",
            *(len(cut), len(rows), limit, cutoff, _lost([(rows[at][1], lengths[at]) for at in cut], cutoff)),
            *(longest, number, name),
        )
    if most and cutoff > most:
        logger.warning("cutoff_len is %d, but the model has positions for %d tokens only", cutoff, most)
    return cutoff


def _lost(cut: Sequence[tuple[Trained, Length]], cutoff: int) -> str:
    """What rows that are cut lose."""
    prompts = answers = turns = 0
    for trained, length in cut:
        if len(trained.answers) == 1 and trained.row.get(HISTORY):  # supervised training cuts it turn by turn
            turns += 1
            continue
        kept = tokens_kept(*length, cutoff)
        prompts += kept.prompt < length.prompt
        answers += kept.answer < length.answer
    losses = ((prompts, "prompts lose their end"), (answers, "answers lose their end of turn"))
    losses += ((turns, "rows with a history lose ends of its turns or of the answer"),)
    return ", ".join(f"{count} {what}" for count, what in losses if count)


def load_tokenizer(
    model: str, revision: str | None, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase, int | None]:
    """The tokenizer of a model, with its chat template, and how many tokens the model has positions for.

    Raises:
        [`UserError`]: where one of them is missing or broken.
    """
    from transformers import AutoConfig, AutoTokenizer

    where = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(model, **where)
        tokenizer = AutoTokenizer.from_pretrained(model, **where)
    except Exception as error:  # missing and broken files, code that is not trusted: each its own exception
        raise UserError(f"Config and tokenizer of {model!r} cannot be loaded: {one_line(error)}") from error
    if not tokenizer.encode("SELECT", add_special_tokens=False):  # transformers makes an empty one of no files at all
        raise UserError(f"{model!r} has no tokenizer; give the folder of a whole model.")
    if not tokenizer.chat_template:
        raise UserError(f"{model!r} has no chat template; use the instruct model of its kind.")
    return tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None)
