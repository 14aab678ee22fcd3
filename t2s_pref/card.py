"""The card of a dataset on the Hub, from what the steps noted and from the rows: its YAML and its text.

This package writes between two marks; what somebody writes before or after them stays, and so do fields of the YAML
that it does not set.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from t2s_pref import __version__, lineage
from t2s_pref.columns import CHOSEN, DB_ID, INPUT, INSTRUCTION, OUTPUT, REJECTED, SYSTEM, VERDICT
from t2s_pref.errors import UserError
from t2s_pref.prompts import messages
from t2s_pref.tally import CAUSES
from t2s_pref.verdicts import WRONG

TAG = lineage.KEY
BEGIN = "<!-- t2s_pref: what is between these marks is written anew by each push -->"
END = "<!-- t2s_pref: end -->"
TAGS = ("text-to-sql", "sql", TAG)
SYNTHETIC = ("synthetic",)
PAIR_TAGS = ("dpo", "preference")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
LARGEST = "1M<n<10M"
MOST_SHOWN = 2000  # characters of a part of the example

# What each column that may be pushed holds.
COLUMNS = {
    INSTRUCTION: "what is asked for, or the first part of the prompt",
    INPUT: "the second part of the prompt: schema and question",
    SYSTEM: "the system message",
    "history": "earlier turns, `[user, assistant]`",
    OUTPUT: "the gold SQL",
    CHOSEN: "the preferred answer",
    REJECTED: "an answer of the policy",
    "chosen_from": "who wrote `chosen`: `gold` or the policy itself, `own`",
    DB_ID: "the database",
    "dialect": "the SQL dialect",
    "alternatives": "further accepted golds",
    VERDICT: "what running `rejected` has shown",
    "distance": "how far the syntax tree of `rejected` is from the gold's, from 0 to 1",
    "source_index": "the row of the source",
    "rejected_index": "which of the row's candidates `rejected` is",
    "round": "the round of on-policy training",
    "adapter": "the policy's adapter",
    "policy_hash": "a hash of all that the policy is",
    "prompt": "the messages that were sampled from",
    "completion": "the answer, as a message",
    "chat_template_kwargs": "what TRL hands to the chat template, as in sampling",
}


class Split(NamedTuple):
    """A split of the dataset: its name, how many rows, prompts and databases it has."""

    name: str
    rows: int
    prompts: int
    databases: int


class Described(NamedTuple):
    """What a card tells of."""

    repo_id: str
    name: str  # in dataset_info.json
    splits: list[Split]
    columns: list[str]
    verdicts: Counter[str]  # of the rows; the empty one of a row that has none
    example: Mapping[str, Any]
    noted: list[dict[str, Any]]

    @property
    def written(self) -> bool:
        """Whether it is noted which model wrote the answers."""
        return any(each["step"] in (lineage.SAMPLED, lineage.TAUGHT) for each in self.noted)

    @property
    def pairs(self) -> bool:
        """Whether it is preference data."""
        return REJECTED in self.columns


def metadata(of: Described, given: Mapping[str, Any], license: str | None, sources: Iterable[str]) -> dict[str, Any]:
    """The fields of the YAML that are ours, merged with those that are `given` there; `license` and sources win."""
    rows = sum(split.rows for split in of.splits)
    tags = [*listed(given.get("tags")), *(PAIR_TAGS if of.pairs else ()), *TAGS, *(SYNTHETIC if of.written else ())]
    noted = [each.get("source") for each in of.noted if each["step"] == lineage.LOADED]
    sources = [*listed(given.get("source_datasets")), *sources, *(name for name in noted if name != of.repo_id)]
    fields: dict[str, Any] = {"license": license} if license else {}
    if "license" not in given and not license:
        fields["license"] = "unknown"
    fields["task_categories"] = list(dict.fromkeys([*listed(given.get("task_categories")), "text-generation"]))
    fields["tags"] = list(dict.fromkeys(tags))
    fields["size_categories"] = [next((name for most, name in SIZES if rows < most), LARGEST)]
    if sources := list(dict.fromkeys(name for name in sources if name)):
        fields["source_datasets"] = sources
    return fields


def body(of: Described, before: str) -> str:
    """The text of the card: ours, in what somebody else wrote `before`.

    Raises:
        [`UserError`]: where our marks are not as they were, and nothing tells whose words are whose.
    """
    # the rows' own text must not end or begin what is ours
    ours = f"{BEGIN}\n\n{_text(of).replace('<!-- t2s_pref:', '<!-- t2s_pref')}\n\n{END}"
    first, last = before.find(BEGIN), before.find(END)
    if (before.count(BEGIN), before.count(END)) == (1, 1) and first < last:
        return before[:first] + ours + before[last + len(END) :]
    if BEGIN in before or END in before:
        raise UserError(
            f"The card of {of.repo_id} has our marks {before.count(BEGIN)} and {before.count(END)} times; it must be "
            f"{BEGIN!r} and then {END!r} once each, or none of them: take out the text between them too."
        )
    if before.strip():
        return f"{before.rstrip()}\n\n{ours}\n"
    return f"# {of.repo_id.rpartition('/')[2]}\n\n{ours}\n"


def listed(value: Any) -> list[str]:
    """A field that YAML may hold as one text or as a list of them."""
    return [value] if isinstance(value, str) else [each for each in value or () if isinstance(each, str)]


def _text(of: Described) -> str:
    parts = [_what(of), _counts(of), _made(of), _outcome(of), _example(of), _columns(of), _use(of)]
    return "\n\n".join(part for part in parts if part)


def _what(of: Described) -> str:
    rows = sum(split.rows for split in of.splits)
    prompts = sum(split.prompts for split in of.splits)
    if not of.pairs:
        return f"{rows:,} supervised rows for text-to-SQL, on {prompts:,} prompts: each `output` answers its prompt."
    text = f"{rows:,} preference pairs for text-to-SQL, on {prompts:,} prompts. "
    if any(each["step"] == lineage.SAMPLED for each in of.noted):
        text += "`rejected` is SQL that a language model itself wrote for the prompt; `chosen` is the gold, or "
        text += "the model's own where `chosen_from` says so. "
    else:
        text += "Who wrote them is not noted. "
    wrong = sum(count for verdict, count in of.verdicts.items() if verdict in WRONG)
    if wrong == rows:
        text += "Each `rejected` was **proven wrong by execution**: it ran and returned something else, or the engine "
        return f"{text}refused it, while `chosen` ran and its result is determined by the data."
    if of.verdicts.keys() <= {""}:
        return f"{text}No `verdict` says that a `rejected` was run, so **it may be right**."
    return f"{text}{wrong:,} of them were proven wrong by execution, as `verdict` says; **the others may be right**."


def _counts(of: Described) -> str:
    kind = "pairs" if of.pairs else "rows"
    rows = [[split.name, split.rows, split.prompts, split.databases or "-"] for split in of.splits]
    text = _table(["split", kind, "prompts", "databases"], rows)
    return f"{text}\n\nNo prompt is in two splits." if len(of.splits) > 1 else text


def _made(of: Described) -> str:
    tables = [table for each in of.noted if (table := _step(each))]
    return "\n\n".join(["## How it was made", f"With t2s_pref {__version__}.", *tables])


def _step(noted: dict[str, Any]) -> str:
    """What one step noted, as a table; empty where it has one of its own, or says nothing."""
    step = noted["step"]
    rows: list[list[Any]] = []
    if step == lineage.LOADED:
        rows.append(["source", _named({"name": noted.get("source"), "revision": noted.get("revision")})])
    elif step in (lineage.SAMPLED, lineage.TAUGHT):
        role = "policy" if step == lineage.SAMPLED else "teacher"
        rows += [[role, _named(noted.get("model"))], ["adapter", _named(noted.get("adapter")) or "none"]]
        rows += [["dtype", noted["dtype"]]] if noted.get("dtype") else []
        settings = (noted.get("settings") or {}).items()
        rows += [[name, _value(value)] for name, value in settings if value not in (None, [], ())]
        rows += [["kept in the format", noted["kept_as"]]] if noted.get("kept_as") else []
        rows += [["most candidates a row", noted["most_candidates"]]] if noted.get("most_candidates") else []
        keys = (noted.get("training") or {}).items()
        rows += [[f"`{name}` in LLaMA-Factory", _value(value)] for name, value in keys]
    elif step == lineage.PROVEN:
        rows += [["run by", noted.get("engines")], ["seconds a query", noted.get("timeout")]]
        rows += [["seconds a gold", noted.get("gold_timeout")]]
    elif step == lineage.PAIRED:
        names = ("keep", "dedup", "chosen", "select", "max_per_row")
        rows += [[name, _value(noted[name])] for name in names if noted.get(name) is not None]
    return _table([f"`{step}`", ""], rows) if rows else ""


def _outcome(of: Described) -> str:
    """What became of the candidates, and their verdicts."""
    parts = []
    for noted in of.noted:
        if noted["step"] not in (lineage.PAIRED, lineage.EXPLAINED):
            continue
        pairs = noted["step"] == lineage.PAIRED
        whole = noted.get("candidates") or 0
        kept = noted.get("pairs" if pairs else "kept") or 0
        causes = noted.get("dropped") or {}
        rows = [["kept as pairs" if pairs else "kept chains of thought", f"{kept:,}", _share(kept, whole)]]
        rows += [[f"dropped: {_words(name)}", f"{count:,}", _share(count, whole)] for name, count in causes.items()]
        what = "candidates" if pairs else "samples of the teacher"
        where = f", split `{noted['split']}`" if noted.get("split") else ""
        parts.append(_table([f"{whole:,} {what} of {noted.get('rows') or 0:,} rows{where}", "", ""], rows))
        verdicts = noted.get("verdicts") or {}
        judged = sum(verdicts.values())
        if verdicts:
            rows = [[f"`{name}`", f"{count:,}", _share(count, judged)] for name, count in verdicts.items()]
            parts.append(_table(["verdict", "candidates", ""], rows))
    return "\n\n".join(["## What became of the candidates", *parts]) if parts else ""


def _words(cause: str) -> str:
    return CAUSES[cause][0] if cause in CAUSES else cause


def _example(of: Described) -> str:
    names = (CHOSEN, REJECTED) if of.pairs else (OUTPUT,)
    prompt = "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in messages(of.example))
    parts = [("prompt", prompt), *((name, of.example[name]) for name in names)]
    if of.example.get(VERDICT):
        parts.append((VERDICT, of.example[VERDICT]))
    shown = [f"`{name}`:\n\n{_fenced(text)}" for name, text in parts]
    return "\n\n".join(["## A pair" if of.pairs else "## A row", *shown])


def _fenced(text: str) -> str:
    text = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} ..."
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}text\n{text}\n{fence}"


def _columns(of: Described) -> str:
    rows = [[f"`{name}`", COLUMNS[name]] for name in of.columns if name in COLUMNS]
    return "\n\n".join(["## Columns of `alpaca`", _table(["column", ""], rows)])


def _use(of: Described) -> str:
    answers = "`prompt`, `chosen` and `rejected`" if of.pairs else "`prompt` and `completion`"
    trainer = "DPO" if of.pairs else "SFT"
    split = of.splits[0].name
    keys = next((each.get("training") for each in reversed(of.noted) if each["step"] == lineage.SAMPLED), None)
    known = keys or {"template": "..."}
    template = "\n".join(f"{name}: {_value(value)}" for name, value in known.items())
    about = "the prompts that were sampled from" if keys else "fill in that of your model"
    ranking = "stage: dpo\npref_beta: 0.1\npref_loss: sigmoid" if of.pairs else "stage: sft"
    return f"""## How to use it

`default` has {answers} as messages, for TRL; `alpaca` has strings, for LLaMA-Factory and for everything else.

```python
from datasets import load_dataset

conversations = load_dataset("{of.repo_id}", split="{split}")
strings = load_dataset("{of.repo_id}", "alpaca", split="{split}")
```

TRL, with the model that is to be trained:

```python
from trl import {trainer}Config, {trainer}Trainer

args = {trainer}Config("trained", max_length=None)
{trainer}Trainer(model, args=args, train_dataset=conversations, processing_class=tokenizer).train()
```

LLaMA-Factory, with no local file (the template gives {about}):

```yaml
dataset_dir: "REMOTE:{of.repo_id}"
dataset: {of.name}
{template}
{ranking}
```

The whole file is written by

```bash
t2s-pref train-config --dataset-dir REMOTE:{of.repo_id} --dataset {of.name} --base-model ... --output train.yaml
```"""


def _table(header: list[Any], rows: list[list[Any]]) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def _named(source: Any) -> str:
    """A model, an adapter or a dataset by its name, with what tells its version."""
    if not (isinstance(source, dict) and source.get("name")):
        return ""
    version = [f"{word} `{source[key]}`" for key, word in VERSIONS.items() if source.get(key)]
    return " ".join([f"`{source['name']}`", *version])


VERSIONS = {"revision": "at", "content": "with the content hash", "version": "called"}


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _share(count: int, of: int) -> str:
    return f"{100 * count / of:.1f} %" if of else ""
