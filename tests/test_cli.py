import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from t2s_pref import demo_files, load_sft
from t2s_pref.cli import build_parser, main

ROOT = Path(__file__).parent.parent
MODEL, TRAIN = demo_files().model, demo_files().train


def t2s_pref(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "t2s_pref", *map(str, arguments)], capture_output=True, text=True, check=False, **kwargs
    )


@pytest.fixture
def sft(tmp_path):
    """A file of the first twelve bundled rows."""
    path = tmp_path / "sft.json"
    path.write_text(json.dumps(json.loads(Path(TRAIN).read_text(encoding="utf-8"))[:12]), encoding="utf-8")
    return path


def reject(sft, output, *more):
    common = ["--base-model", MODEL, "--sft-data", sft, "--output", output, "--max-new-tokens", 64]
    return ["reject", *map(str, [*common, "--cache-dir", sft.parent / "cache", *more])]


def options(parser):
    (commands,) = (action for action in parser._actions if action.dest == "command")
    return {
        action.option_strings[-1]: action
        for action in commands.choices["reject"]._actions
        if action.option_strings and action.dest != "help"
    }


# -- what stands in the source document and in the README ------------------------------------------------------------


def test_the_source_documents_command_line_is_understood_as_it_stands():
    args = build_parser().parse_args(
        shlex.split(
            'reject --base-model /models/Qwen3-Coder-30B-A3B-Instruct --adapter-path "/saves/lora/bird_32_sft" '
            "--sft-data /data/dpo_datasets.json --output /data/dpo_datasets_multi.json --num-rejects 3 --dedup-rejects "
            "--seed 1234 --max-new-tokens 4096 --temperature 0.7 --top-p 0.9 --device cuda --max-samples 0"
        )
    )
    assert args.dedup_rejects == "exact"
    assert args.adapter_path == "/saves/lora/bird_32_sft"


def test_the_source_documents_numbers_are_the_defaults():
    defaults = {name: action.default for name, action in options(build_parser()).items()}
    expected = {
        "--base-model": "Qwen/Qwen3-Coder-30B-A3B-Instruct",
        "--adapter-path": "",
        "--num-rejects": 3,
        "--dedup-rejects": "none",
        "--seed": 1234,
        "--max-new-tokens": 4096,
        "--temperature": 0.7,
        "--top-p": 0.9,
        "--max-samples": 0,
        "--trust-remote-code": False,
        "--dtype": "auto",
        "--device": "auto",
    }
    assert {name: defaults[name] for name in expected} == expected


def test_the_readme_lists_every_option_with_its_default():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(--[a-z-]+)`[^|]*\| ([^|]*) \|", readme, re.MULTILINE))
    found = options(build_parser())
    assert set(rows) == set(found)
    for name, action in found.items():
        shown = "off" if action.default is False else "none" if action.default in (None, "") else action.default
        assert rows[name].strip().strip("`") == ("required" if action.required else str(shown)), name


def test_the_commands_in_the_readme_are_understood():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^(?:accelerate launch .*? -m t2s_pref|t2s-pref) (.+)$", readme, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        build_parser().parse_args(shlex.split(command, comments=True))


def test_help_names_every_command_and_option():
    shown = t2s_pref("--help").stdout + t2s_pref("reject", "--help").stdout
    assert all(name in shown for name in ["reject", "demo", *options(build_parser())])


# -- a run -----------------------------------------------------------------------------------------------------------


def test_reject_writes_pairs_their_entry_and_a_summary(sft, tmp_path):
    done = t2s_pref(*reject(sft, tmp_path / "out" / "my_dpo.json", "--dedup-rejects", "normalized"))
    assert done.returncode == 0, done.stderr
    pairs = json.loads((tmp_path / "out" / "my_dpo.json").read_text(encoding="utf-8"))
    golds = {row["input"]: row["output"] for row in load_sft(str(sft))}
    assert pairs
    assert all(set(pair) == {"instruction", "input", "chosen", "rejected", "db_id"} for pair in pairs)
    assert all(golds[pair["input"]] == pair["chosen"] != pair["rejected"] for pair in pairs)
    entry = json.loads((tmp_path / "out" / "dataset_info.json").read_text())["my_dpo"]
    assert entry["file_name"] == "my_dpo.json"
    assert entry["ranking"] is True
    assert re.search(rf"kept as pairs +{len(pairs)} ", done.stdout)
    assert "tokens a second" in done.stdout


def test_a_cached_run_prints_the_same_and_writes_the_same(sft, tmp_path):
    first = t2s_pref(*reject(sft, tmp_path / "a.json"))
    again = t2s_pref(*reject(sft, tmp_path / "b.json"))
    assert first.stdout.replace("a.json", "b.json") == again.stdout
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_jsonl_is_written_where_the_name_says_so(sft, tmp_path):
    assert main(reject(sft, tmp_path / "dpo.jsonl", "--max-samples", 2, "--dataset-name", "mine")) == 0
    lines = (tmp_path / "dpo.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["instruction"] for line in lines}
    assert list(json.loads((tmp_path / "dataset_info.json").read_text())) == ["mine"]


def test_max_samples_takes_the_first_rows_and_they_get_the_same_rejects(sft, tmp_path):
    assert main(reject(sft, tmp_path / "all.json")) == 0
    assert main(reject(sft, tmp_path / "few.json", "--max-samples", 4)) == 0
    everything, few = (json.loads((tmp_path / name).read_text()) for name in ("all.json", "few.json"))
    assert few == everything[: len(few)]
    assert len({pair["input"] for pair in few}) <= 4


def test_an_absent_adapter_is_warned_about_and_the_run_goes_on(sft, tmp_path):
    done = t2s_pref(*reject(sft, tmp_path / "dpo.json", "--adapter-path", tmp_path / "none"))
    assert done.returncode == 0
    assert "ADAPTER NOT FOUND" in done.stderr
    assert "was absent" in done.stdout


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sft-data", "no/such/file.json"], "no/such/file.json"),
        (["--base-model", "./no/model"], "does not exist"),
        (["--output", "pairs.csv"], ".jsonl"),
        (["--dataset-name", "a,b"], "a,b"),
        (["--num-rejects", "0"], "num_rejects is 0"),
        (["--top-p", "1.5"], "top_p is 1.5"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--max-samples", "-1"], "--max-samples is -1"),
        (["--device", "tpu"], "cuda:N"),
        (["--dialect", "klingon"], "klingon"),
        (["--adapter-path", "./none", "--strict-adapter"], "./none"),
        (["--temperature", "warm"], "--temperature"),
    ],
)
def test_a_mistake_is_one_line_without_a_traceback_and_a_non_zero_code(sft, tmp_path, more, message):
    done = t2s_pref(*reject(sft, tmp_path / "dpo.json", *more))
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "dpo.json").exists()


def test_an_output_that_cannot_be_written_is_refused_before_sampling(sft, tmp_path):
    (tmp_path / "dataset_info.json").write_text("{broken")
    done = t2s_pref(*reject(sft, tmp_path / "dpo.json"))
    assert done.returncode == 2
    assert not (tmp_path / "cache").exists()
    assert (tmp_path / "dataset_info.json").read_text() == "{broken"


def test_the_sft_file_is_never_overwritten_by_the_pairs(sft, tmp_path):
    before = sft.read_bytes()
    done = t2s_pref(*reject(sft, f"{tmp_path}/./sft.json"))
    assert done.returncode == 2
    assert "--output is --sft-data" in done.stderr
    assert sft.read_bytes() == before


def test_a_run_that_leaves_no_pair_is_an_error_that_shows_why(sft, tmp_path):
    done = t2s_pref(*reject(sft, tmp_path / "dpo.json", "--max-new-tokens", 1))
    assert done.returncode == 2
    assert re.search(r"reached the length cap +36 +100.0 %", done.stdout)
    assert "raise --max-new-tokens" in done.stdout
    assert not (tmp_path / "dpo.json").exists()


# -- start-up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["-c", "import t2s_pref"], ["-m", "t2s_pref", "--help"]])
def test_import_and_help_do_not_load_the_heavy_libraries(arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True
    ).stderr
    imported = {line.rpartition("|")[2].strip() for line in done.splitlines()}
    # what takes seconds; without it both take a tenth of one
    assert imported.isdisjoint({"torch", "transformers", "datasets", "sqlglot", "pandas", "pyarrow"})


def test_importing_everything_public_does_not_import_torch():
    code = "import sys; from t2s_pref import *; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
