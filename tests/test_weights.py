"""What identifies weights, and what is said where there are none. The Hub itself is in test_engines.py."""

import json
import os
import shutil

import pytest

from t2s_pref import UserError
from t2s_pref.weights import Source, content_hash, find_adapter, find_model, hash_file, hash_parts


@pytest.fixture
def memo(tmp_path):
    return tmp_path / "cache" / "weights.json"


@pytest.fixture
def folder(tmp_path):
    """Something like a model."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "qwen3"}')
    (made / "model-00001-of-00002.safetensors").write_bytes(b"first weights")
    (made / "model-00002-of-00002.safetensors").write_bytes(b"second weights")
    (made / "tokenizer.json").write_text("{}")
    return made


def replace_unseen(file, data):
    """Change a file so that its size and modification time stay as they were."""
    status = file.stat()
    assert len(data) == status.st_size
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


# -- the hash --------------------------------------------------------------------------------------------------------


def test_the_hash_is_that_of_the_content_whatever_its_path_and_time(folder, memo, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere" / "config.json", (1, 1))
    assert content_hash(tmp_path / "elsewhere", memo) == content_hash(folder, memo)


def test_a_folder_of_links_is_the_same_as_the_files_it_links_to(folder, memo, tmp_path):
    (tmp_path / "snapshot").mkdir()
    for file in folder.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    (tmp_path / "link").symlink_to(tmp_path / "snapshot")
    assert content_hash(tmp_path / "snapshot", memo) == content_hash(folder, memo)
    assert content_hash(tmp_path / "link", memo) == content_hash(folder, memo)


def test_another_byte_name_or_file_is_another_hash(folder, memo):
    hashes = [content_hash(folder, memo)]
    weights = folder / "model-00001-of-00002.safetensors"
    weights.write_bytes(b"First weights")
    hashes.append(content_hash(folder, memo))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    hashes.append(content_hash(folder, memo))
    weights.rename(folder / "model.safetensors")
    hashes.append(content_hash(folder, memo))
    (folder / "tokenizer.json").unlink()
    hashes.append(content_hash(folder, memo))
    assert len(set(hashes)) == 5


def test_two_files_that_change_places_are_another_model(folder, memo):
    before = content_hash(folder, memo)
    one, other = sorted(folder.glob("*.safetensors"))
    one_data, other_data = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_data)
    other.write_bytes(one_data)
    assert content_hash(folder, memo) != before


def test_what_training_leaves_beside_the_weights_does_not_matter(folder, memo):
    before = content_hash(folder, memo)
    left = ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "scaler.pt", "training_args.bin", "trainer_state.json"]
    for name in (*left, "events.out.tfevents.1.host", ".gitattributes", ".hidden"):
        (folder / name).write_bytes(b"anything")
    (folder / "checkpoint-100").mkdir()
    (folder / "checkpoint-100" / "model.safetensors").write_bytes(b"older weights")
    (folder / ".cache").mkdir()
    assert content_hash(folder, memo) == before


# -- the memo --------------------------------------------------------------------------------------------------------


def test_a_file_that_the_memo_knows_is_not_read_again(folder, memo):
    before = content_hash(folder, memo)
    # another hash in the memo shows that the file was not looked at
    known = json.loads(memo.read_text())
    memo.write_text(json.dumps(dict.fromkeys(known, "remembered")))
    assert content_hash(folder, memo) != before
    memo.unlink()
    assert content_hash(folder, memo) == before


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_read(folder, memo):
    before = content_hash(folder, memo)
    replace_unseen(folder / "model-00001-of-00002.safetensors", b"FIRST WEIGHTS")
    assert content_hash(folder, memo) != before


def test_a_file_whose_size_or_time_has_changed_is_read_again(folder, memo):
    before = content_hash(folder, memo)
    weights = folder / "model-00001-of-00002.safetensors"
    replace_unseen(weights, b"FIRST WEIGHTS")
    os.utime(weights, (1, 1))
    touched = content_hash(folder, memo)
    assert touched != before
    status = weights.stat()
    weights.write_bytes(b"FIRST WEIGHTS!")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert content_hash(folder, memo) not in (before, touched)


def test_the_memo_is_written_only_where_something_was_read(folder, memo):
    content_hash(folder, memo)
    written = memo.stat().st_ino
    content_hash(folder, memo)
    assert memo.stat().st_ino == written


def test_one_memo_serves_several_folders(folder, memo, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    replace_unseen(tmp_path / "other" / "tokenizer.json", b"[]")
    first, second = content_hash(folder, memo), content_hash(tmp_path / "other", memo)
    assert first != second
    assert len(json.loads(memo.read_text())) == 8
    assert (content_hash(folder, memo), content_hash(tmp_path / "other", memo)) == (first, second)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'"text"', b"\xff\xfe\x00", b'{"another": "entry"}'])
def test_a_damaged_memo_costs_only_one_more_reading(folder, memo, content):
    before = content_hash(folder, memo)
    memo.write_bytes(content)
    assert content_hash(folder, memo) == before
    assert len(json.loads(memo.read_text())) >= 4


def test_hashes_of_parts_do_not_collide_by_joining(tmp_path):
    lists = [[], [b""], [b"", b""], [b"ab"], [b"a", b"b"], [b"", b"ab"], [b"ab", b""]]
    assert len({hash_parts(parts) for parts in lists}) == len(lists)
    (tmp_path / "a").write_bytes(b"x" * 10_000_000)
    (tmp_path / "b").write_bytes(b"x" * 9_999_999 + b"y")
    assert hash_file(tmp_path / "a") != hash_file(tmp_path / "b")


# -- finding ---------------------------------------------------------------------------------------------------------


def refusal(find, *arguments):
    with pytest.raises(UserError) as refused:
        find(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_folder_is_found_with_its_hash_and_no_revision(folder, memo):
    assert find_model(str(folder), None, memo) == Source(str(folder), None, content_hash(folder, memo))
    (folder / "adapter_config.json").write_text("{}")
    assert find_adapter(str(folder), memo) == Source(str(folder), None, content_hash(folder, memo))


def test_a_path_under_home_is_understood(folder, memo, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_model("~/model", None, memo).name == str(folder)


def test_a_relative_path_is_a_path_where_there_is_such_a_folder(folder, memo, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "owner").mkdir()
    folder.rename(folder.parent / "owner" / "name")
    assert find_model("owner/name", None, memo).revision is None
    assert find_model("./owner/name", None, memo).identity == find_model("owner/name", None, memo).identity


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "../nothing", "~/nothing", "a/b/c", "folder/"])
def test_base_weights_that_do_not_exist_are_refused_by_name(memo, name):
    message = refusal(find_model, name, None, memo)
    assert repr(name) in message
    assert "does not exist" in message
    assert "Hub id" in message


def test_a_base_model_folder_without_a_config_is_refused(folder, memo):
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(find_model, str(folder), None, memo)


def test_a_file_given_as_a_base_model_is_refused_as_what_it_is(folder, memo):
    message = refusal(find_model, str(folder / "config.json"), None, memo)
    assert "is no folder" in message


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing", "a/b/c"])
def test_an_adapter_folder_that_does_not_exist_is_absent(memo, name):
    assert find_adapter(name, memo) is None


def test_what_is_there_but_is_no_adapter_is_refused(folder, memo):
    for name in (folder, folder / "config.json"):
        assert "is there but has no adapter_config.json" in refusal(find_adapter, str(name), memo)


@pytest.mark.parametrize("name", ["", "owner name/model", "-owner/name", "owner/na..me", "owner/name?", "x" * 200])
def test_a_malformed_name_is_refused_for_what_it_is(memo, name):
    expected = "neither an existing folder nor a Hub id of the form owner/name"
    assert expected in refusal(find_model, name, None, memo)
    assert expected in refusal(find_adapter, name, memo)


def test_offline_a_name_that_is_not_cached_is_refused_with_the_reason(memo):
    for message in (refusal(find_model, "owner/name", None, memo), refusal(find_adapter, "owner/name", memo)):
        assert "'owner/name' is neither a folder here nor in the Hub cache" in message
        assert "HF_HUB_OFFLINE is set" in message
