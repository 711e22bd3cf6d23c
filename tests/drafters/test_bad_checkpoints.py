"""Damaged, misplaced and half-written checkpoints: found before an engine starts, and never left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import rewritten
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYER, hub_cache, old_pickle, sharded
from places import SUPPORT
from safetensors.torch import load_file, save_file
from tiny import VOCAB, drafter_tensors, target_config, write_released

from vllm_gumiho.drafters import checkpoints
from vllm_gumiho.drafters.checkpoints import drafter_in, open_checkpoint, save_speculators
from vllm_gumiho.drafters.conversion import convert_checkpoint
from vllm_gumiho.engines.smollm2 import smollm2_folder
from vllm_gumiho.errors import CheckpointError, TargetError

TENSORS = drafter_tensors(num_heads=2)
SMALL = {"num_heads": 1, "num_layers": 1}


def refusal(path: Path, **target) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path).verify(**target)
    assert "\n" not in str(error.value)
    return str(error.value)


def flip(file: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    file.write_bytes(content)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> tuple[Path, bytes]:
    folder = save_speculators(tmp_path_factory.mktemp("ours") / "head", TENSORS, "org/target", LAYER).path
    return folder, (folder / "model.safetensors").read_bytes()


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 0.999999), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_checkpoint_of_ours_is_found(ours, place, bit):
    folder, whole = ours
    file = folder / "model.safetensors"
    file.write_bytes(whole)
    open_checkpoint(folder).verify()
    flip(file, int(place * len(whole)), bit)
    assert str(folder) in refusal(folder)


def test_a_damaged_checkpoint_is_refused_where_a_user_meets_it_and_its_config_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    folder = save_speculators(tmp_path / "head", TENSORS, "org/target", LAYER).path
    flip(folder / "model.safetensors", -5)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its SHA-256 is .*fetch both again, or remove"):
        rewritten({"model": str(folder)}, load_format="auto")
    with pytest.raises(CheckpointError, match="its SHA-256 is"):
        convert_checkpoint(folder, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
    assert not (tmp_path / "cache").exists()


def test_dummy_weights_need_no_sound_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    folder = save_speculators(tmp_path / "head", TENSORS, "org/target", LAYER).path
    flip(folder / "model.safetensors", -5)
    assert rewritten({"model": str(folder)})["num_speculative_tokens"] == 4


def test_a_file_changed_on_purpose_is_taken_without_its_checksum(tmp_path):
    folder = save_speculators(tmp_path, TENSORS, "org/target", LAYER).path
    save_file(load_file(folder / "model.safetensors") | {"fc.bias": torch.zeros(64)}, folder / "model.safetensors")
    assert "remove 'sha256' from config.json if you changed the file yourself" in refusal(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    open_checkpoint(folder).verify()


@pytest.mark.parametrize("value", ["abc", 3, [], {"model.safetensors": 3}, {"model.safetensors": "0" * 63}])
def test_a_checksum_entry_that_is_none_is_named(tmp_path, value):
    folder = write_released(tmp_path, TENSORS, target_config() | {"sha256": value})
    assert "config.json: sha256 " in refusal(folder) + "config.json: sha256 " * (value == [])


def test_a_flipped_bit_of_an_archive_of_tensors_is_found(tmp_path):
    file = write_released(tmp_path, TENSORS) / "pytorch_model.bin"
    whole = file.read_bytes()
    at = whole.index(TENSORS["fc.weight"].numpy().tobytes()[:64])
    flip(file, at + 1)
    assert not torch.equal(dict(open_checkpoint(tmp_path).tensors())["fc.weight"], TENSORS["fc.weight"])
    assert f"{file}: not what was written" in refusal(tmp_path)


def test_archives_without_checksums_are_taken(tmp_path):
    from torch.utils.serialization import config

    computed = config.save.compute_crc32
    try:
        config.save.compute_crc32 = False
        write_released(tmp_path / "zip", TENSORS)
    finally:
        config.save.compute_crc32 = computed
    open_checkpoint(tmp_path / "zip").verify()
    open_checkpoint(old_pickle(tmp_path / "old", TENSORS)).verify()


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_values_that_are_not_finite_are_found_before_an_engine_starts(tmp_path, suffix):
    tensors = TENSORS | {"fc.weight": TENSORS["fc.weight"].clone().index_fill_(0, torch.tensor(3), float("nan"))}
    folder = write_released(tmp_path, tensors, suffix=suffix)
    assert "fc.weight holds NaN or infinity" in refusal(folder)
    with pytest.raises(CheckpointError, match=r"fc\.weight holds NaN or infinity; nothing is written"):
        save_speculators(tmp_path / "out", tensors, "org/target", LAYER)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("offset", [VOCAB, -1])
def test_a_reduced_vocabulary_that_leaves_the_targets_is_refused(tmp_path, offset):
    offsets = torch.zeros(32, dtype=torch.int64)
    folder = write_released(tmp_path, TENSORS | {"d2t": offsets}, suffix="safetensors")
    open_checkpoint(folder).verify(vocab_size=VOCAB)
    offsets[0] = offset
    write_released(tmp_path, TENSORS | {"d2t": offsets}, suffix="safetensors")
    assert f"d2t points outside the target's vocabulary of {VOCAB}" in refusal(folder, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, tuple[Path, bytes]]:
    tensors = drafter_tensors(**SMALL)
    folders = {
        suffix: write_released(tmp_path_factory.mktemp(suffix), tensors, suffix=suffix)
        for suffix in ("bin", "safetensors")
    } | {"old": old_pickle(tmp_path_factory.mktemp("old") / "checkpoint", tensors)}
    files = {kind: next(folder.iterdir()) for kind, folder in folders.items()}
    return {kind: (file, file.read_bytes()) for kind, file in files.items()}


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["bin", "safetensors", "old"]),
    damage=st.lists(st.tuples(st.integers(-6000, 6000), st.integers(0, 255)), min_size=1, max_size=5),
)
def test_random_damage_is_refused_or_leaves_a_whole_drafter(small, kind, damage):
    file, whole = small[kind]
    content = bytearray(whole)
    for place, value in damage:
        content[place % len(content)] = value
    file.write_bytes(content)
    message = None
    try:
        opened = open_checkpoint(file.parent)
        opened.verify()
        tensors = dict(opened.tensors())
    except CheckpointError as error:
        message = str(error)
    if message is not None:
        assert str(file.parent) in message
        return
    assert {name: t.shape for name, t in tensors.items()} == {n: t.shape for n, t in drafter_tensors(**SMALL).items()}


def test_a_hub_cache_links_to_its_own_blobs(tmp_path):
    snapshot = hub_cache(tmp_path / "models--org--head", TENSORS)
    assert next(snapshot.glob("*.safetensors")).is_symlink()
    open_checkpoint(snapshot).verify()
    assert drafter_in(snapshot)


def test_a_folder_of_links_into_a_hub_cache_is_legal(tmp_path):
    hub_cache(tmp_path / "models--org--head", TENSORS)
    (tmp_path / "mine").mkdir()
    for file in (tmp_path / "models--org--head" / "blobs").iterdir():
        (tmp_path / "mine" / file.name).symlink_to(file)
    open_checkpoint(tmp_path / "mine").verify()


def test_a_link_in_place_of_the_folder_or_within_it_is_the_users_own(tmp_path):
    folder = write_released(tmp_path / "v1", TENSORS, suffix="safetensors")
    (folder / "data").mkdir()
    (folder / "model.safetensors").rename(folder / "data" / "weights")
    (folder / "model.safetensors").symlink_to("data/weights")
    (tmp_path / "current").symlink_to("v1")
    open_checkpoint(tmp_path / "current").verify()
    (tmp_path / "named.safetensors").symlink_to(folder / "data" / "weights")
    open_checkpoint(tmp_path / "named.safetensors").verify()


@pytest.mark.parametrize("linked", ["model.safetensors", "config.json", "model-00002-of-00003.safetensors"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_out_of_the_checkpoint_is_refused_and_named(tmp_path, linked, relative):
    folder = tmp_path / "head"
    if "-of-" in linked:
        sharded(folder, TENSORS, "safetensors")
    else:
        write_released(folder, TENSORS, target_config(), "safetensors")
    elsewhere = tmp_path / "blobs" / "elsewhere"
    elsewhere.parent.mkdir()
    (folder / linked).rename(elsewhere)
    (folder / linked).symlink_to(os.path.relpath(elsewhere, folder) if relative else elsewhere)
    message = refusal(folder)
    assert f"{folder / linked}: is a link to {elsewhere}, outside the checkpoint; copy the file" in message


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to nowhere"])
def test_what_is_no_file_is_refused_and_not_read(tmp_path, name, kind):
    if name == "config.json":
        write_released(tmp_path, TENSORS)
    make = {
        "pipe": os.mkfifo,
        "folder": os.mkdir,
        "device": lambda path: os.symlink("/dev/zero", path),
        "link to nowhere": lambda path: os.symlink("absent", path),
    }[kind]
    make(tmp_path / name)
    reason = "a link to nowhere" if kind == "link to nowhere" else "not a regular file"
    message = refusal(tmp_path)
    assert f"{tmp_path / name}: is {reason}" in message or "outside the checkpoint" in message
    assert not drafter_in(tmp_path)


def test_a_second_save_that_fails_leaves_the_first(tmp_path, monkeypatch):
    saved = save_speculators(tmp_path / "head", TENSORS, "org/target", LAYER)
    before = {file.name: file.read_bytes() for file in saved.path.iterdir()}

    def full(*given, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_json", full)
    other = drafter_tensors(seed=1, num_heads=2)
    with pytest.raises(CheckpointError, match="the checkpoint cannot be written"):
        save_speculators(tmp_path / "head", other, "org/target", LAYER)
    assert {file.name: file.read_bytes() for file in saved.path.iterdir()} == before


@pytest.mark.parametrize("place", ["a file in the way", "under a file"])
def test_a_place_that_cannot_be_written_is_one_error(tmp_path, place):
    (tmp_path / "file").write_text("kept")
    target = tmp_path / "file" if place == "a file in the way" else tmp_path / "file" / "deeper"
    with pytest.raises(CheckpointError, match=f"{target}: the checkpoint cannot be written"):
        save_speculators(target, TENSORS, "org/target", LAYER)
    with pytest.raises(CheckpointError, match=str(target)):
        convert_checkpoint(write_released(tmp_path / "source", TENSORS, target_config()), target)
    with pytest.raises(TargetError, match="cannot be written"):
        smollm2_folder(target)
    assert (tmp_path / "file").read_text() == "kept"


def mounted(folder: Path, options: str, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a command with a small file system mounted at ``folder``, in a mount namespace of its own."""
    folder.mkdir()
    script = 'mount -t tmpfs -o "$1" tmpfs "$0" || exit 77; shift; exec "$@"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(folder), options, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(SUPPORT), **environment},
    )
    if done.returncode == 77 or "unshare" in done.stderr.split("\n")[0]:
        pytest.skip("mounting is not allowed here")
    return done


LISTING = "import os, sys; print(sorted(os.listdir(sys.argv[1])))"


def test_no_disk_space_for_a_converted_checkpoint_is_one_line_and_nothing_stays(tmp_path):
    source = write_released(tmp_path / "source", TENSORS, target_config())
    disk = tmp_path / "disk"
    script = f'"$0" -m vllm_gumiho.cli convert {source} {disk}/out; echo "exit $?"; "$0" -c "{LISTING}" {disk}'
    done = mounted(disk, "size=64k", "sh", "-c", script, sys.executable)
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"{disk}/out: the checkpoint cannot be written" in done.stderr
    assert "No space left on device" in done.stderr
    assert "free space there or give another folder" in done.stderr
    assert done.stdout.split("\n") == ["exit 2", "[]", ""]


REWRITE = """
import json, os, sys, tempfile
from fakes import rewritten
results = []
for tempfile.tempdir in sys.argv[2:]:
    try:
        spec = rewritten({"model": sys.argv[1]})
        results.append(spec["model"])
    except ValueError as error:
        results.append(f"{type(error).__name__}: {error}")
folder = os.environ["VLLM_CACHE_ROOT"]
print(json.dumps(results + [[name for _, _, files in os.walk(folder) for name in files]]))
"""


@pytest.mark.parametrize("options", ["ro", "size=4k,nr_inodes=2"], ids=["read-only", "full"])
def test_a_cache_that_takes_no_file_is_gone_around_or_named(tmp_path, options):
    checkpoint, disk, temporary = write_released(tmp_path / "c", TENSORS), tmp_path / "disk", tmp_path / "temporary"
    temporary.mkdir()
    command = (sys.executable, "-c", REWRITE, str(checkpoint), str(temporary), str(disk))
    done = mounted(disk, options, *command, VLLM_CACHE_ROOT=str(disk))
    published, message, left = json.loads(done.stdout)
    assert published.startswith(str(temporary))
    assert (Path(published) / "config.json").is_file()
    assert message.startswith("CheckpointError: no place for the draft's config.json (")
    assert "set VLLM_CACHE_ROOT to a writable folder" in message
    assert left == []
