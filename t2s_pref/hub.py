"""Datasets on the Hub that explain themselves: `push_to_hub`.

A push is one commit: both configurations, `dataset_info.json` and the card appear together or not at all. The token is
huggingface_hub's to find, in the environment (HF_TOKEN) or where `hf auth login` has put it; none is taken here.
"""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, DatasetInfo, Features, SplitDict, SplitInfo, Value
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    HfApi,
    hf_hub_download,
)
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from t2s_pref import __version__, lineage
from t2s_pref.card import TAG, Described, Split, body, listed, metadata
from t2s_pref.columns import (
    ADAPTER,
    ALTERNATIVES,
    CHOSEN,
    CHOSEN_FROM,
    DB_ID,
    DIALECT,
    DISTANCE,
    HISTORY,
    INPUT,
    INSTRUCTION,
    OUTPUT,
    REJECTED,
    REJECTED_INDEX,
    ROUNDS,
    SOURCE_INDEX,
    STRINGS,
    SYSTEM,
    VERDICT,
    each_split,
)
from t2s_pref.errors import UserError, one_line
from t2s_pref.files import public_name
from t2s_pref.layouts import answer_columns, to_trl
from t2s_pref.load import ALPACA
from t2s_pref.patience import LostError, failure, patiently
from t2s_pref.preferences import TYPES
from t2s_pref.registry import DATASET_INFO, entry_of, info_text, parse_info
from t2s_pref.splits import prompts_of, split_by_prompt

DEFAULT = "default"
FOLDERS = {DEFAULT: "data", ALPACA: ALPACA}  # as datasets' own push_to_hub has it
README = "README.md"
SHARD_BYTES = 500 << 20

_SPLIT = re.compile(r"\w+(\.\w+)*", re.ASCII)
_OURS = re.compile(rf"({'|'.join(FOLDERS.values())})/{_SPLIT.pattern}-\d{{5}}-of-\d{{5}}\.parquet")
# What a repository may hold that no data were pushed to.
_NO_DATA = re.compile(rf"README\.md|\.git\w+|LICENSE(\..*)?|{re.escape(DATASET_INFO)}")

# What goes to the Hub beside prompt and answers, where a dataset has it: known columns, none of which holds a path.
CARRIED = (
    *(SYSTEM, HISTORY, DB_ID, DIALECT, OUTPUT, ALTERNATIVES, CHOSEN_FROM, VERDICT, DISTANCE),
    *(SOURCE_INDEX, REJECTED_INDEX, *ROUNDS),
)


def push_to_hub(
    dataset: Dataset | DatasetDict,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    test_size: float = 0.0,
    license: str | None = None,
    source_datasets: Iterable[str] = (),
) -> CommitInfo:
    """Push preference pairs, or supervised rows, to a dataset of the Hub that trains and explains itself.

    It gets two configurations, `default` (`to_trl`'s messages) and `alpaca` (strings, with gold, verdict and where each
    pair is from), a `dataset_info.json` by which LLaMA-Factory trains with `dataset_dir: "REMOTE:<repo_id>"`, and a
    card from what the steps noted. Pushed again, these are replaced and all else there stays: other configurations,
    other entries, and what somebody wrote into the card outside of our marks.

    Args:
        dataset: as for `to_trl`. Of a `DatasetDict`, no prompt may be in two splits.
        repo_id: `owner/name`; made where it does not exist.
        private: whether a new one is private. Where it exists and is public, `True` is refused.
        revision: branch to push to, made where it does not exist. LLaMA-Factory reads `main` only.
        create_pr: open a pull request instead.
        test_size: the share of prompts that go into a split `test`, by `split_by_prompt`; of a `Dataset` only.
        license: as the Hub writes it (`cc-by-4.0`).
        source_datasets: Hub ids; that of a `load_sft` from the Hub is known.

    Returns:
        `CommitInfo` of huggingface_hub. A push that changes nothing makes no commit.

    Raises:
        [`UserError`]: on what `to_trl` refuses, on a prompt in two splits, on a repository that holds another dataset,
            and where the Hub refuses. Nothing is changed there.
        `ConnectionError`: where the Hub fails for about a minute. The dataset there is as it was.
    """
    _check(repo_id, revision)
    splits = _splits(dataset, test_size)
    described = _described(splits, repo_id)
    api = HfApi(library_name="t2s_pref", library_version=__version__)
    with tempfile.TemporaryDirectory() as folder:
        configs = {ALPACA: splits, DEFAULT: dict(to_trl(DatasetDict(splits), keep_in_memory=True))}
        files = {name: path for config in configs for name, path in _write(config, configs[config], Path(folder))}
        return patiently(
            lambda: _commit(api, described, configs, files, private, revision, create_pr, license, source_datasets),
            f"pushing to {repo_id}",
            "The dataset there is as it was, or has the whole push: it is one commit. Push again to go on",
        )


# What is pushed


def _check(repo_id: str, revision: str | None) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        repo_id = repo_id if isinstance(repo_id, str) else repr(repo_id)
    else:
        if repo_id.count("/") == 1:
            if revision is not None and (not revision.strip() or revision.startswith("refs/heads/")):
                raise UserError(f"revision is {revision!r}; it must be the name of a branch.")
            return
    raise UserError(f"repo_id is {repo_id!r}; it must be owner/name, as on the Hub.")


def _splits(dataset: Dataset | DatasetDict, test_size: float) -> dict[str, Dataset]:
    """The splits by name, with what is pushed of them in the same columns, and no prompt in two."""
    whole = each_split(dataset, lambda part: part)
    if isinstance(whole, DatasetDict):
        if test_size:
            raise UserError(f"test_size splits a Dataset; this one has the splits {list(whole)} already.")
        if not whole:
            raise UserError("The DatasetDict has no splits; nothing was pushed.")
        splits = {str(split): part for split, part in whole.items()}
        if wrong := [split for split in splits if not _SPLIT.fullmatch(split) or split == "all"]:
            raise UserError(f"The split {wrong[0]!r} must be named in letters, digits and _, and not 'all'.")
    elif test_size:
        splits = dict(split_by_prompt(whole, test_size))
    else:
        name = str(whole.split or "")  # of a slice, load_dataset makes a name that is none
        splits = {name if _SPLIT.fullmatch(name) and name != "all" else "train": whole}
    answers = {answer_columns(part) for part in splits.values()}
    if len(answers) > 1:
        raise UserError(f"The splits {list(splits)} hold pairs and supervised rows; push them to two repositories.")
    in_split: dict[str, str] = {}
    for split, part in splits.items():
        if not len(part):
            raise UserError(f"The split {split!r} has no rows; nothing was pushed.")
        for row, prompt in enumerate(prompts_of(part)):
            if in_split.setdefault(prompt, split) != split:
                raise UserError(
                    f"Row {row} of the split {split!r} has a prompt that is in {in_split[prompt]!r} too, and what is "
                    "trained on would be tested on; split_by_prompt (test_size) splits pairs by their prompts."
                )
    return _aligned(splits, answers.pop())


def _aligned(splits: dict[str, Dataset], answers: tuple[str, ...]) -> dict[str, Dataset]:
    """The splits with the columns that are pushed, the same ones of the same types in each."""
    known = dict.fromkeys((INSTRUCTION, INPUT, *answers, *CARRIED))
    names = [name for name in known if any(name in part.column_names for part in splits.values())]
    features = Features({name: TYPES[name] for name in names})
    aligned = {}
    for split, part in splits.items():
        for name in names:
            found = part.features.get(name, Value("null"))
            # of anything else datasets would make text
            if TYPES[name] in STRINGS and found not in (Value("null"), *STRINGS):
                raise UserError(f"Column {name!r} of the split {split!r} is {found}; expected strings.")
        columns = {name: part[name][:] if name in part.column_names else [None] * len(part) for name in names}
        if ADAPTER in columns:  # a file of another tool may name it by its path
            columns[ADAPTER] = [value and public_name(value) for value in columns[ADAPTER]]
        try:
            aligned[split] = Dataset.from_dict(columns, features=features)
        except (TypeError, ValueError) as error:  # Arrow's are of these
            raise UserError(f"A column of the split {split!r} is not as expected: {one_line(error)}") from error
        lineage.add(aligned[split], part.info.description.splitlines())
    return aligned


def _described(splits: dict[str, Dataset], repo_id: str) -> Described:
    columns = next(iter(splits.values())).column_names
    texts = [name for name in (INSTRUCTION, INPUT, CHOSEN, REJECTED, OUTPUT) if name in columns]
    counts, noted, verdicts, examples = [], {}, Counter(), []
    for split, part in splits.items():
        databases = len(set(part[DB_ID]) - {None, ""}) if DB_ID in columns else 0
        counts.append(Split(split, len(part), len(set(prompts_of(part))), databases))
        noted.update((json.dumps(each), each) for each in lineage.records(part))
        verdicts.update(verdict or "" for verdict in (part[VERDICT] if VERDICT in columns else [""] * len(part)))
        examples.append(min(part, key=lambda row: sum(len(row[name] or "") for name in texts)))
    name = repo_id.rpartition("/")[2]
    return Described(repo_id, name, counts, columns, verdicts, examples[0], list(noted.values()))


def _write(config: str, splits: dict[str, Dataset], folder: Path) -> Iterator[tuple[str, Path]]:
    """Write the Parquet files of a configuration; their paths in the repository, and here."""
    for split, part in splits.items():
        number = max(1, -(-part.data.nbytes // SHARD_BYTES))
        for index in range(number):
            name = f"{FOLDERS[config]}/{split}-{index:05d}-of-{number:05d}.parquet"
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            part.shard(number, index, contiguous=True).to_parquet(path)
            yield name, path


# How it gets there


def _commit(
    api: HfApi,
    of: Described,
    configs: dict[str, dict[str, Dataset]],
    files: dict[str, Path],
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    license: str | None,
    sources: Iterable[str],
) -> CommitInfo:
    """One try: look at what is there now, and replace what is ours of it."""
    repo = {"repo_id": of.repo_id, "repo_type": "dataset"}
    _make(api, of.repo_id, private)
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(**repo, branch=revision, exist_ok=True)
    there = api.repo_info(**repo, revision=revision)
    names = {file.rfilename for file in there.siblings or ()}

    def read(name: str) -> bytes:
        if name not in names:
            return b""
        return Path(hf_hub_download(**repo, filename=name, revision=there.sha)).read_bytes()

    card = _card(of, configs, files, read(README), names, license, sources)
    registry = _registry(of, read(DATASET_INFO))
    stale = sorted(name for name in names - set(files) if _OURS.fullmatch(name))
    operations = [
        *(CommitOperationAdd(name, str(path)) for name, path in files.items()),
        *(CommitOperationAdd(name, text.encode()) for name, text in ((README, card), (DATASET_INFO, registry))),
        *(CommitOperationDelete(name) for name in stale),
    ]
    rows = sum(split.rows for split in of.splits)
    title = f"{rows:,} {'preference pairs' if of.pairs else 'supervised rows'} by t2s_pref {__version__}"
    where = {"revision": revision, "create_pr": create_pr, "parent_commit": there.sha}
    try:
        return api.create_commit(**repo, operations=operations, commit_message=title, **where)
    except Exception as error:
        status, _ = failure(error)
        if create_pr and status is not None and (status == 0 or status >= 500):
            # a commit that was made is not made again; a request would be
            raise LostError(
                f"pushing to {of.repo_id}: the answer to the pull request is lost ({one_line(error)}); see whether it "
                "is among the discussions there before you push again."
            ) from error
        raise


def _make(api: HfApi, repo_id: str, private: bool | None) -> None:
    try:
        there = api.repo_info(repo_id, repo_type="dataset")
    except RepositoryNotFoundError:
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        return
    if private and not there.private:
        raise UserError(
            f"{repo_id} exists and is public, and private= is for a new one: make it private in its settings on the "
            "Hub first, or give another name."
        )


def _card(
    of: Described,
    configs: dict[str, dict[str, Dataset]],
    files: dict[str, Path],
    before: bytes,
    names: set[str],
    license: str | None,
    sources: Iterable[str],
) -> str:
    try:
        card = DatasetCard(before.decode("utf-8-sig"))
        given = card.data.to_dict()
        theirs = MetadataConfigs.from_dataset_card_data(card.data)
    except Exception as error:  # YAML's own errors, and those of these libraries
        raise UserError(f"The card of {of.repo_id} cannot be read ({one_line(error)}); mend its head.") from error
    _check_theirs(of.repo_id, given, theirs, names)
    for name, value in metadata(of, given, license, sources).items():
        setattr(card.data, name, value)
    MetadataConfigs(
        {
            config: {"data_files": [{"split": split, "path": f"{FOLDERS[config]}/{split}-*"} for split in splits]}
            for config, splits in configs.items()
        }
    ).to_dataset_card_data(card.data)
    DatasetInfosDict(
        {config: _info(splits, FOLDERS[config], files) for config, splits in configs.items()}
    ).to_dataset_card_data(card.data)
    return f"---\n{card.data.to_yaml(line_break=chr(10))}\n---\n\n{body(of, card.text.lstrip()).lstrip()}"


def _check_theirs(repo_id: str, given: dict[str, Any], configs: dict[str, dict[str, Any]], names: set[str]) -> None:
    """Refuse to push where something would be lost: data that we did not push, or a configuration on our files."""
    if TAG not in listed(given.get("tags")):
        theirs = [*configs, *sorted(name for name in names if not _NO_DATA.fullmatch(name))]
        if theirs:
            raise UserError(
                f"{repo_id} holds a dataset that t2s_pref did not push ({', '.join(theirs[:3])}), which would be "
                "replaced; give another name."
            )
    for config in set(configs) - set(FOLDERS):
        if configs[config].get("default"):
            raise UserError(f"The configuration {config!r} of {repo_id} is marked as the default one; ours is that.")
        patterns = re.findall(r"'([^']+)'", str(configs[config].get("data_files")))
        if any(fnmatch(name, pattern) for name in names if _OURS.fullmatch(name) for pattern in patterns):
            raise UserError(f"The configuration {config!r} of {repo_id} is on files that a push replaces; move them.")


def _info(splits: dict[str, Dataset], folder: str, files: dict[str, Path]) -> DatasetInfo:
    sizes = {split: part.data.nbytes for split, part in splits.items()}
    found = SplitDict()
    for split, part in splits.items():
        found.add(SplitInfo(split, num_bytes=sizes[split], num_examples=len(part)))
    download = sum(path.stat().st_size for name, path in files.items() if name.startswith(f"{folder}/"))
    features = next(iter(splits.values())).features
    return DatasetInfo(features=features, splits=found, download_size=download, dataset_size=sum(sizes.values()))


def _registry(of: Described, before: bytes) -> str:
    """`dataset_info.json` with an entry for each split, the first under the repository's name, and none for another."""
    info = parse_info(before, f"{DATASET_INFO} of {of.repo_id}") if before else {}
    whose = {"hf_hub_url": of.repo_id, "subset": ALPACA}
    info = {name: each for name, each in info.items() if not (isinstance(each, dict) and whose.items() <= each.items())}
    noted = {lineage.KEY: of.noted} if of.noted else {}
    for number, split in enumerate(of.splits):
        name = of.name if number == 0 else f"{of.name}_{split.name}"
        info[name] = {**whose, "split": split.name, **entry_of(of.columns), **noted}
    return info_text(info)
