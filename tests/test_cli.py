import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from t2s_pref import demo_files, load_sft
from t2s_pref.cli import build_parser, main

ROOT = Path(__file__).parent.parent
MODEL, TRAIN, DATABASES = demo_files().model, demo_files().train, demo_files().databases


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


def options(parser, *names):
    """The options of these commands, or of all but the demo; what one has, the first that has it decides."""
    (commands,) = (action for action in parser._actions if action.dest == "command")
    return {
        action.option_strings[-1]: action
        for name in reversed(names or ("reject", "verify", "audit", "evaluate", "cot", "train-config", "push"))
        for action in commands.choices[name]._actions
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
        "--dedup-rejects": None,
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
        shown = "off" if action.default is False else "none" if action.default in (None, "", ()) else action.default
        assert rows[name].strip().strip("`") == ("required" if action.required else str(shown)), name


def test_the_commands_in_the_readme_are_understood():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^(?:accelerate launch .*? -m t2s_pref|t2s-pref) (.+)$", readme, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        build_parser().parse_args(shlex.split(command, comments=True))


def test_help_names_every_command_and_option():
    shown = t2s_pref("--help").stdout
    assert all(
        name in shown for name in ["reject", "verify", "audit", "evaluate", "cot", "train-config", "push", "demo"]
    )
    for command in ("reject", "verify", "audit", "evaluate", "cot", "train-config", "push"):
        shown = t2s_pref(command, "--help").stdout
        assert "None" not in shown
        assert all(name in shown for name in options(build_parser(), command))


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
    assert first.stdout.replace("a.json", "b.json").replace("--dataset a ", "--dataset b ") == again.stdout
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_file_is_messages_where_that_is_asked_for_and_the_next_command_is_said(sft, tmp_path, capsys):
    assert (
        main(
            reject(sft, tmp_path / "my dpo.json", "--max-samples", 2, "--formatting", "sharegpt", "--dataset-name", "m")
        )
        == 0
    )
    record = json.loads((tmp_path / "my dpo.json").read_text(encoding="utf-8"))[0]
    assert record["rejected"]["role"] == "assistant"
    assert record["messages"][-1]["role"] == "user"
    said = capsys.readouterr().out.splitlines()[-1]
    where = f"--dataset-dir {tmp_path} --dataset m"
    assert said == f"train on it: t2s-pref train-config {where} --base-model ... --output train.yaml"


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


# -- with databases --------------------------------------------------------------------------------------------------


def commands_of(sft, tmp_path, command, *more):
    """A run of one of the other commands on the bundled files."""
    common = ["--databases", DATABASES, "--cache-dir", sft.parent / "cache"]
    given = {
        "verify": ["--data", sft.parent / "pairs.json", "--output", tmp_path / "clean.json"],
        "audit": ["--sft-data", sft],
        "evaluate": ["--base-model", MODEL, "--sft-data", sft, "--max-new-tokens", 64, "--num-rejects", 2],
    }
    return [command, *map(str, [*given[command], *common, *more])]


def pairs_of(sft):
    """A file of pairs beside the SFT file: one proven wrong, one poisoned."""
    row = json.loads(sft.read_text(encoding="utf-8"))[0]
    pair = {"instruction": row["instruction"], "input": row["input"], "chosen": row["output"], "db_id": row["db_id"]}
    poisoned = f"SELECT * FROM ({row['output'].rstrip(';')})"
    pairs = [{**pair, "rejected": "SELECT nothing FROM nowhere"}, {**pair, "rejected": poisoned}]
    path = sft.parent / "pairs.json"
    path.write_text(json.dumps(pairs), encoding="utf-8")
    return pairs


def test_reject_with_databases_writes_only_what_is_proven_wrong(sft, tmp_path):
    proven = ["--databases", DATABASES, "--num-rejects", 2, "--max-candidates", 6]
    done = t2s_pref(*reject(sft, tmp_path / "dpo.json", *proven))
    assert done.returncode == 0, done.stderr
    assert "verify_rejected: SQLite" in done.stdout
    assert "none of them was executed" not in done.stdout
    pairs = json.loads((tmp_path / "dpo.json").read_text(encoding="utf-8"))
    assert pairs
    assert max(Counter(pair["input"] for pair in pairs).values()) == 2  # as many as were wanted, and distinct
    report = tmp_path / "report.json"
    again = ["--data", tmp_path / "dpo.json", "--output", tmp_path / "again.json", "--databases", DATABASES]
    done = t2s_pref("verify", *again, "--report", report, "--cache-dir", tmp_path / "other")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "again.json").read_text(encoding="utf-8")) == pairs
    assert json.loads(report.read_text())["poisoned"] == 0


def test_verify_writes_the_clean_file_and_a_report_of_what_was_poisoned(sft, tmp_path):
    pairs = pairs_of(sft)
    done = t2s_pref(*commands_of(sft, tmp_path, "verify", "--report", tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "clean.json").read_text(encoding="utf-8")) == pairs[:1]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (report["pairs"], report["kept"], report["poisoned"]) == (2, 1, 1)
    assert [each["rejected"] for each in report["dropped"]] == [pairs[1]["rejected"]]
    assert re.search(r"poisoned: the rejected SQL is right +1 +50.0 %", done.stdout)


def test_verify_that_leaves_nothing_is_an_error_and_still_writes_the_report(sft, tmp_path):
    pairs = pairs_of(sft)
    (sft.parent / "pairs.json").write_text(json.dumps(pairs[1:]), encoding="utf-8")
    done = t2s_pref(*commands_of(sft, tmp_path, "verify", "--report", tmp_path / "report.json"))
    assert done.returncode == 2
    assert "No pair" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "clean.json").exists()
    assert json.loads((tmp_path / "report.json").read_text())["poisoned"] == 1


def test_audit_prints_a_table_and_writes_json(sft, tmp_path):
    rows = json.loads(sft.read_text(encoding="utf-8"))
    rows[4]["output"] = "SELECT nope FROM absent"
    sft.write_text(json.dumps(rows), encoding="utf-8")
    done = t2s_pref(*commands_of(sft, tmp_path, "audit", "--report", tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"row 4 \(\w+\): gold_error: no such table: absent\n +SELECT nope FROM absent", done.stdout)
    (finding,) = json.loads((tmp_path / "report.json").read_text())["findings"]
    assert (finding["row"], finding["detail"]) == (4, "no such table: absent")


def test_evaluate_prints_three_measures_and_writes_json(sft, tmp_path):
    done = t2s_pref(*commands_of(sft, tmp_path, "evaluate", "--report", tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"rows +strict +bird +spider", done.stdout)
    assert re.search(r"all databases +12  greedy +[\d.]+ % +[\d.]+ % +[\d.]+ %", done.stdout)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["accuracy"]) == {"greedy", "pass@1", "pass@2"}
    assert sum(report["verdicts"]["greedy"][""].values()) == report["rows"][""] == 12


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
        (["--databases", "no/such/folder"], "no/such/folder"),
        (["--max-candidates", "9"], "--max-candidates needs --databases"),
        (["--keep", "timeout"], "--keep needs --databases"),
        (["--timeout", "9"], "--timeout needs --databases"),
        (["--select", "hardest", "--max-per-row", "1"], "--select needs --databases"),
        (["--keep", "wrong", "--databases", DATABASES], "wrong"),
        (["--max-candidates", "0", "--databases", DATABASES], "max_candidates is 0"),
        (["--timeout", "0", "--databases", DATABASES], "timeout is 0"),
        (["--workers", "0", "--databases", DATABASES], "workers is 0"),
    ],
)
def test_a_mistake_is_one_line_without_a_traceback_and_a_non_zero_code(sft, tmp_path, more, message):
    done = t2s_pref(*reject(sft, tmp_path / "dpo.json", *more))
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "dpo.json").exists()


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("verify", ["--data", "absent.json"], "absent.json"),
        ("verify", ["--databases", "nowhere"], "nowhere"),
        ("verify", ["--output", "clean.csv"], ".jsonl"),
        ("audit", ["--sft-data", "absent.json"], "absent.json"),
        ("audit", ["--databases", "mysql://user:secret@127.0.0.1:1/x"], "cannot be reached"),
        ("audit", ["--gold-timeout", "-1"], "gold_timeout is -1"),
        ("evaluate", ["--base-model", "./no/model"], "does not exist"),
        ("evaluate", ["--databases", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_in_the_other_commands_is_one_line_too(sft, tmp_path, command, more, message):
    pairs_of(sft)
    done = t2s_pref(*commands_of(sft, tmp_path, command, "--report", tmp_path / "report.json", *more))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr + done.stdout
    assert not (tmp_path / "report.json").exists()
    assert not (tmp_path / "clean.json").exists()


@pytest.mark.parametrize(
    ("command", "option", "target"),
    [
        *(
            ("verify", "--output", "pairs.json"),
            ("verify", "--report", "pairs.json"),
            ("verify", "--report", "clean.json"),
        ),
        *(("audit", "--report", "sft.json"), ("evaluate", "--report", "sft.json")),
    ],
)
def test_no_command_writes_over_what_it_reads_or_twice_into_one_file(sft, tmp_path, command, option, target):
    pairs_of(sft)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    done = t2s_pref(*commands_of(sft, tmp_path, command, option, f"{tmp_path}/./{target}"))
    assert done.returncode == 2
    assert "would be overwritten" in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json")} == before


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


# -- other engines ---------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    from vllm_server import VllmServer

    with VllmServer(MODEL, loras=("step-900",)) as server:
        yield server


def test_reject_samples_from_a_server_and_goes_on_where_it_was(sft, tmp_path, server):
    common = ["--sft-data", sft, "--max-new-tokens", "48", "--cache-dir", tmp_path / "cache"]
    asked = ["--endpoint", f"{server.url}/v1", "--served-model", "demo", "--model-version", "1"]
    done = t2s_pref("reject", *common, *asked, "--output", tmp_path / "dpo.json")
    assert done.returncode == 0, done.stderr
    assert "vLLM 0.32.0 at an endpoint" in done.stdout
    drawn = len(server.bodies)
    again = t2s_pref("reject", *common, *asked, "--num-rejects", "4", "--output", tmp_path / "more.json")
    assert again.returncode == 0, again.stderr
    assert len(server.bodies) - drawn == drawn // 3


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--endpoint", ""], "it must be like http://localhost:8000/v1"),
        (["--endpoint", "http://127.0.0.1:9/?x=1"], "it must be like http://localhost:8000/v1"),
        (["--endpoint", "http://127.0.0.1:9", "--adapter-path", "a"], "--adapter-path is for a model here"),
        (["--endpoint", "http://127.0.0.1:9"], "see that the server runs"),
        (["--served-model", "demo"], "--served-model needs --endpoint"),
    ],
)
def test_mistakes_around_a_server_are_one_line(sft, tmp_path, more, expected):
    done = t2s_pref("reject", "--sft-data", sft, "--output", tmp_path / "dpo.json", *more)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_the_tokenizer_of_a_server_can_be_named_even_by_the_default(sft, tmp_path, server):
    name = "Qwen/Qwen3-Coder-30B-A3B-Instruct"
    asked = ["--endpoint", server.url, "--served-model", "demo", "--base-model", name]
    done = t2s_pref("reject", "--sft-data", sft, "--output", tmp_path / "dpo.json", *asked)
    assert done.returncode == 2
    assert f"{name!r} is neither a folder here nor in the Hub cache" in done.stderr


@pytest.mark.slow
def test_continuous_batching_writes_what_the_default_writes(sft, tmp_path):
    common = ["--base-model", MODEL, "--sft-data", sft, "--max-new-tokens", "48", "--cache-dir", tmp_path / "cache"]
    for name, more in (("a.json", []), ("b.json", ["--continuous-batching"])):
        done = t2s_pref("reject", *common, *more, "--output", tmp_path / name, "--dataset-name", "one")
        assert done.returncode == 0, done.stderr
    assert "continuous batching of transformers" in done.stdout
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
