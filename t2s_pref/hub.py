"""Datasets on the Hub that explain themselves: `push_to_hub`.

A push is one commit: both configurations, `dataset_info.json` and the card appear together or not at all. The token is
huggingface_hub's to find, in the environment (HF_TOKEN) or where `hf auth login` has put it; none is taken here.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, DatasetInfo, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    DatasetCardData,
    HfApi,
    hf_hub_download,
)
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from t2s_pref import __version__, lineage
from t2s_pref.card import TAG, Described, Split, body, metadata
from t2s_pref.columns import (
    ALTERNATIVES,
    CHOSEN_FROM,
    DB_ID,
    DIALECT,
    DISTANCE,
    HISTORY,
    INPUT,
    INSTRUCTION,
    OUTPUT,
    REJECTED_INDEX,
    ROUNDS,
    SOURCE_INDEX,
    SYSTEM,
    VERDICT,
    each_split,
)
from t2s_pref.errors import UserError, one_line
from t2s_pref.layouts import answer_columns, checked_rows, to_trl
from t2s_pref.load import ALPACA
from t2s_pref.patience import patiently
from t2s_pref.registry import DATASET_INFO, entry_of, info_text
from t2s_pref.splits import prompts_of, split_by_prompt

DEFAULT = "default"
FOLDERS = {DEFAULT: "data", ALPACA: ALPACA}  # as datasets' own push_to_hub has it
README = "README.md"
SHARD_BYTES = 500 << 20

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
    answers = {split: answer_columns(part) for split, part in splits.items()}
    if len(set(answers.values())) > 1:
        raise UserError(f"The splits {list(splits)} hold pairs and supervised rows; push them to two repositories.")
    described = _described(splits, repo_id, next(iter(answers.values())))
    api = HfApi(library_name="t2s_pref", library_version=__version__)
    with tempfile.TemporaryDirectory() as folder:
        configs = {
            ALPACA: {split: part.flatten_indices() for split, part in splits.items()},
            DEFAULT: {split: to_trl(part, keep_in_memory=True) for split, part in splits.items()},
        }
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
    """The splits by name, with what is pushed of them, and no prompt in two."""
    if isinstance(dataset, DatasetDict):
        if test_size:
            raise UserError(f"test_size splits a Dataset; this one has the splits {list(dataset)} already.")
        if not dataset:
            raise UserError("The DatasetDict has no splits; nothing was pushed.")
        splits = dict(each_split(dataset, lambda whole: whole))
    else:
        plain = each_split(dataset, lambda whole: whole)
        splits = dict(split_by_prompt(plain, test_size)) if test_size else {str(plain.split or "train"): plain}
    if any(not re.fullmatch(r"\w+(\.\w+)*", split) for split in splits):
        splits = {"train": next(iter(splits.values()))} if len(splits) == 1 else splits  # as load_dataset names a slice
    in_split: dict[str, str] = {}
    for split, part in splits.items():
        answers = answer_columns(part)
        if not len(part):
            raise UserError(f"The split {split!r} has no rows; nothing was pushed.")
        names = [name for name in CARRIED if name in part.column_names and name not in answers]
        splits[split] = part.select_columns([INSTRUCTION, INPUT, *answers, *names])
        for _ in checked_rows(splits[split], answers):
            pass
        for row, prompt in enumerate(prompts_of(part)):
            if in_split.setdefault(prompt, split) != split:
                raise UserError(
                    f"Row {row} of the split {split!r} has a prompt that is in {in_split[prompt]!r} too, and what is "
                    "trained on would be tested on; split_by_prompt (test_size) splits pairs by their prompts."
                )
    return splits


def _described(splits: dict[str, Dataset], repo_id: str, answers: tuple[str, ...]) -> Described:
    counts, noted, shortest = [], {}, None
    for split, part in splits.items():
        databases = len(set(part[DB_ID]) - {None, ""}) if DB_ID in part.column_names else 0
        counts.append(Split(split, len(part), len(set(prompts_of(part))), databases))
        noted.update((json.dumps(each), each) for each in lineage.records(part))
        for row in part:
            size = sum(len(row[name] or "") for name in (INSTRUCTION, INPUT, *answers))
            if shortest is None or size < shortest[0]:
                shortest = size, row
    columns = next(iter(splits.values())).column_names
    return Described(repo_id, repo_id.rpartition("/")[2], counts, columns, shortest[1], list(noted.values()))


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

    def read(name: str) -> str:
        if name not in names:
            return ""
        return Path(hf_hub_download(**repo, filename=name, revision=there.sha)).read_text(encoding="utf-8")

    card = _card(of, configs, files, read(README), names, license, sources)
    registry = _registry(of, read(DATASET_INFO))
    ours = re.compile(rf"({'|'.join(FOLDERS.values())})/\w+(\.\w+)*-\d{{5}}-of-\d{{5}}\.parquet")
    stale = sorted(name for name in names - set(files) if ours.fullmatch(name))
    operations = [
        *(CommitOperationAdd(name, str(path)) for name, path in files.items()),
        *(CommitOperationAdd(name, text.encode()) for name, text in ((README, card), (DATASET_INFO, registry))),
        *(CommitOperationDelete(name) for name in stale),
    ]
    rows = sum(split.rows for split in of.splits)
    return api.create_commit(
        **repo,
        operations=operations,
        commit_message=f"{rows:,} {'preference pairs' if of.pairs else 'supervised rows'} by t2s_pref {__version__}",
        revision=revision,
        create_pr=create_pr,
        parent_commit=there.sha,
    )


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
    before: str,
    names: set[str],
    license: str | None,
    sources: Iterable[str],
) -> str:
    try:
        card = DatasetCard(before)
    except Exception as error:  # YAML's own errors, and this library's
        raise UserError(f"The card of {of.repo_id} has a head that is no YAML ({one_line(error)}); mend it.") from error
    data: DatasetCardData = card.data
    given = data.to_dict()
    others = [each.get("config_name") for each in given.get("configs") or () if isinstance(each, dict)]
    ours = TAG in (given.get("tags") or ())
    foreign = {DEFAULT, ALPACA} & set(others) or (not others and _data_files(names))
    if foreign and not ours:
        shown = ", ".join(sorted(map(str, foreign))[:3])
        raise UserError(
            f"{of.repo_id} holds a dataset that t2s_pref did not push ({shown}), which would be replaced; give another "
            "name."
        )
    for name, value in metadata(of, given, license, sources).items():
        setattr(data, name, value)
    MetadataConfigs(
        {
            config: {"data_files": [{"split": split, "path": f"{FOLDERS[config]}/{split}-*"} for split in splits]}
            for config, splits in sorted(configs.items(), key=lambda item: item[0] != DEFAULT)
        }
    ).to_dataset_card_data(data)
    DatasetInfosDict(
        {config: _info(splits, FOLDERS[config], files) for config, splits in configs.items()}
    ).to_dataset_card_data(data)
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{body(of, card.text.lstrip()).lstrip()}"


def _data_files(names: set[str]) -> set[str]:
    kinds = (".parquet", ".json", ".jsonl", ".csv", ".arrow", ".txt", ".zip", ".gz", ".zst", ".tar")
    return {name for name in names if name.endswith(kinds)}


def _info(splits: dict[str, Dataset], folder: str, files: dict[str, Path]) -> DatasetInfo:
    sizes = {split: part.data.nbytes for split, part in splits.items()}
    found = SplitDict()
    for split, part in splits.items():
        found.add(SplitInfo(split, num_bytes=sizes[split], num_examples=len(part)))
    download = sum(path.stat().st_size for name, path in files.items() if name.startswith(f"{folder}/"))
    features = next(iter(splits.values())).features
    return DatasetInfo(features=features, splits=found, download_size=download, dataset_size=sum(sizes.values()))


def _registry(of: Described, before: str) -> str:
    """`dataset_info.json` with an entry for each split: the first under the repository's name."""
    info: Any = {}
    with suppress(ValueError, RecursionError):
        info = json.loads(before) if before else {}
    if not isinstance(info, dict):
        info = {}
    noted = {lineage.KEY: of.noted} if of.noted else {}
    for number, split in enumerate(of.splits):
        where = {"hf_hub_url": of.repo_id, "subset": ALPACA, "split": split.name}
        name = of.name if number == 0 else f"{of.name}_{split.name}"
        info[name] = {**where, **entry_of(of.columns), **noted}
    return info_text(info)
