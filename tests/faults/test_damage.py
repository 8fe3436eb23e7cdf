"""A checkpoint that is not what was written is refused by name, wherever it is read."""

import contextlib
import io
import json
import logging
import os
import pickle
import random
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from aixsim_cli.data.tokenizer import vocab_size
from aixsim_cli.errors import UserError
from aixsim_cli.models.kind import find_source
from aixsim_cli.models.titan.model import meta_model, model_args
from aixsim_cli.models.titan.saved import read_checkpoint, write_checkpoint
from aixsim_cli.models.titan.storage import CheckpointPlanner, CheckpointReader, CheckpointWriter
from aixsim_cli.pretrain.checkpointer import checkpoints_in
from aixsim_cli.pretrain.dataloader import _PlainUnpickler
from aixsim_cli.run.folder import locked
from aixsim_cli.run.manifest import (
    MANIFEST_FILE,
    begin_saving,
    is_being_saved,
    read_manifest,
    verify,
    write_manifest,
)
from tests.faults.conftest import steps

LISTS_NOTHING = '{"format": 1, "files": {}}'


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Weights, and the checkpoint folder that holds them."""
    model = meta_model(model_args("aixsim", "debug", vocab_size("builtin")))
    weights = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    folder = tmp_path_factory.mktemp("checkpoint") / "step-1"
    write_checkpoint(weights, folder)
    return weights, folder


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written[1], tmp_path / "checkpoint" / "step-1")


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def test_whole_checkpoint_loads(written):
    weights, folder = written
    loaded = read_checkpoint(folder).state_dict
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("seed", range(20))
def test_one_flipped_byte(copy, seed):
    random.seed(seed)
    files = sorted(path for path in copy.iterdir() if path.name != MANIFEST_FILE)
    # the large file has nearly all the bytes; each file gets its turn
    path = files[seed % len(files)]
    flip(path, random.randrange(path.stat().st_size))
    with pytest.raises(UserError, match=f"step-1/{path.name}: damaged"):
        read_checkpoint(copy)


@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
def test_truncated(copy, keep):
    path = copy / "__0_0.distcp"
    size = path.stat().st_size
    os.truncate(path, {0: 0, 1: 1, 0.5: size // 2, -1: size - 1}[keep])
    with pytest.raises(UserError, match=r"__0_0.distcp: damaged: has"):
        read_checkpoint(copy)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_missing_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing"):
        read_checkpoint(copy)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 100_000, '{"format": 1}', '{"format": 1, "files": 3}', LISTS_NOTHING],
)
def test_damaged_manifest(copy, text):
    (copy / MANIFEST_FILE).write_text(text)
    with pytest.raises(UserError, match=r"manifest.json"):
        read_checkpoint(copy)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_file_that_the_manifest_does_not_list(copy, name):
    manifest = json.loads((copy / MANIFEST_FILE).read_text())
    del manifest["files"][name]
    (copy / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"{name}: not in manifest.json"):
        read_checkpoint(copy)


@pytest.mark.parametrize("name", ["config.json", "more.safetensors"])
def test_a_hugging_face_file_that_the_manifest_does_not_list(tmp_path, name):
    (tmp_path / "model.safetensors").write_text("x")
    write_manifest(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    verify(tmp_path)
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=f"{name}: not in manifest.json"):
        verify(tmp_path)


def test_weights_that_are_no_numbers(written, tmp_path):
    weights = dict(written[0])
    weights["norm.weight"] = weights["norm.weight"] * float("nan")
    write_checkpoint(weights, tmp_path / "step-1")
    with pytest.raises(UserError, match=r"norm\.weight: 128 of 128 numbers are NaN or infinite"):
        read_checkpoint(tmp_path / "step-1")


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/../../b"])
def test_manifest_stays_in_its_folder(copy, name):
    files = {name: {"bytes": 1, "sha256": "0"}}
    (copy / MANIFEST_FILE).write_text(json.dumps({"format": 1, "files": files}))
    with pytest.raises(UserError, match="names a file outside the folder"):
        verify(copy)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_metadata_runs_no_code(copy, tmp_path):
    marker = tmp_path / "executed"
    (copy / ".metadata").write_bytes(pickle.dumps(Malicious(marker)))
    write_manifest(copy)
    with pytest.raises(UserError, match=r"metadata: refused: names posix.system"):
        read_checkpoint(copy)
    assert not marker.exists()


def test_entries_run_no_code(tmp_path):
    """An entry that is no tensor is a pickle too."""
    marker = tmp_path / "executed"
    dcp.save(
        {"train_state": Malicious(marker)},
        storage_writer=CheckpointWriter(tmp_path / "step-1"),
        no_dist=True,
    )
    state = {"train_state": 0}
    reader = CheckpointReader(tmp_path / "step-1")
    with pytest.raises(BaseException, match="train_state: refused: holds more than plain values"):
        dcp.load(state, storage_reader=reader, planner=CheckpointPlanner(), no_dist=True)
    assert not marker.exists() and state == {"train_state": 0}


def test_position_in_the_data_runs_no_code(tmp_path):
    marker = tmp_path / "executed"
    with pytest.raises(UserError, match=r"dataloader: refused: its state names posix.system"):
        _PlainUnpickler(io.BytesIO(pickle.dumps(Malicious(marker)))).load()
    assert not marker.exists()


def test_metadata_names_no_other_file(copy):
    metadata = CheckpointReader(copy).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = "../step-1/__0_0.distcp"
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    write_manifest(copy)
    with pytest.raises(UserError, match="names a file outside the folder"):
        read_checkpoint(copy)


def test_hugging_face_folder_with_a_manifest(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    write_manifest(tmp_path)
    find_source(str(tmp_path))
    flip(tmp_path / "model.safetensors", 500)
    with pytest.raises(UserError, match=r"model.safetensors: damaged"):
        find_source(str(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "adapter_model.bin",
        "generation_config.json",
        "transform.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_what_a_model_is_read_of_is_listed(tmp_path, name):
    """transformers puts an adapter that lies beside a model on top of it."""
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path)
    (tmp_path / "README.md").write_text("more")
    verify(tmp_path)
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name}: not in manifest.json"):
        verify(tmp_path)


def folders(root, **kinds):
    """Checkpoint folders: whole, torn (never completed), flipped (damaged since) or unlisted."""
    for name, kind in kinds.items():
        path = root / name.replace("_", "-")
        path.mkdir(parents=True)
        (path / "__0_0.distcp").write_bytes(bytes(100))
        if kind != "unlisted":
            begin_saving(path)
        if kind not in ("torn", "unlisted"):
            write_manifest(path)
        if kind == "flipped":
            flip(path / "__0_0.distcp", 50)
    return root


def left(root):
    return sorted((path.name for path in root.iterdir()), key=lambda name: int(name[5:]))


def test_resume_takes_the_newest_whole_one(tmp_path, caplog):
    root = folders(
        tmp_path / "checkpoint", step_2="whole", step_4="whole", step_6="flipped", step_8="torn"
    )
    with caplog.at_level(logging.WARNING):
        assert checkpoints_in(root).agree() == 4
    assert left(root) == ["step-2", "step-4"]
    assert left(tmp_path / "checkpoint.set-aside") == ["step-6", "step-8"]
    assert "step-6/__0_0.distcp: damaged" in caplog.text
    assert "step-8: incomplete" in caplog.text


def test_setting_aside_replaces_nothing(tmp_path):
    for kind in ("torn", "torn"):
        root = folders(tmp_path / "checkpoint", step_8=kind)
        assert checkpoints_in(root).agree() is None
    aside = sorted(path.name for path in (tmp_path / "checkpoint.set-aside").iterdir())
    assert aside == ["step-8", "step-8.1"]


def test_all_damaged_is_not_started_anew(tmp_path):
    root = folders(tmp_path / "checkpoint", step_2="flipped", step_4="flipped")
    with pytest.raises(UserError, match="no checkpoint is complete"):
        checkpoints_in(root).agree()
    assert left(root) == ["step-2", "step-4"]


def test_checkpoints_without_a_manifest_are_not_started_anew(tmp_path):
    """Another program's, or their manifests were deleted: a torn one is told apart by its mark."""
    root = folders(tmp_path / "checkpoint", step_2="unlisted", step_4="unlisted", step_6="torn")
    with pytest.raises(UserError, match=r"step-4, step-2: without a manifest.json.*load_step"):
        checkpoints_in(root).agree()
    assert left(root) == ["step-2", "step-4", "step-6"]


def test_one_without_a_manifest_is_read_when_asked_for_and_a_torn_one_never(tmp_path, caplog):
    root = folders(tmp_path / "checkpoint", step_2="unlisted", step_4="torn")
    with caplog.at_level(logging.WARNING):
        checkpoints_in(root).check(2)
    assert "step-2: has no manifest.json" in caplog.text
    with pytest.raises(UserError, match="step-4: incomplete, its saving did not end"):
        checkpoints_in(root).check(4)


def test_a_step_is_spelled_in_one_way(tmp_path):
    root = folders(tmp_path / "checkpoint", step_2="whole", step_007="whole")
    assert checkpoints_in(root).steps() == [2]


class Killed(BaseException):
    pass


def test_what_a_kill_leaves_of_a_deletion_is_torn(tmp_path, monkeypatch):
    """After every single file and folder that is taken away."""
    taken, limit = 0, None

    def counted(does):
        def call(path, *arguments, **keywords):
            nonlocal taken
            if limit is not None and taken == limit:
                raise Killed
            taken += 1
            return does(path, *arguments, **keywords)

        return call

    real = os.scandir

    @contextlib.contextmanager
    def in_order(path):
        """The mark first, as a file system may well list it."""
        with real(path) as entries:
            yield sorted(entries, key=lambda entry: entry.name)

    monkeypatch.setattr(os, "scandir", in_order)
    for name in ("unlink", "rmdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    for count in range(20):
        root = folders(
            tmp_path / str(count) / "checkpoint", step_2="whole", step_4="whole", step_6="whole"
        )
        (root / "step-2" / "more").mkdir()
        for name in ("a.distcp", "more/b.distcp"):
            (root / "step-2" / name).write_bytes(bytes(10))
        begin_saving(root / "step-2")
        write_manifest(root / "step-2")
        taken, limit = 0, count
        killed = False
        try:
            checkpoints_in(root).remove_old(keep=2)
        except Killed:
            killed = True
        limit = None
        if not killed:
            break
        if (root / "step-2").exists():
            whole = (root / "step-2" / MANIFEST_FILE).exists()
            assert whole or is_being_saved(root / "step-2"), count
            assert checkpoints_in(root).agree() == 6
            # and where there is no other, it is not taken for another program's
            for name in ("step-4", "step-6"):
                shutil.rmtree(root / name)
            assert whole or checkpoints_in(root).agree() is None, count
    assert count > 5 and not (root / "step-2").exists()


def test_a_folder_with_nothing_in_it_is_torn(tmp_path):
    """A kill between the folder's making and the mark in it, in the first save of all."""
    (tmp_path / "checkpoint" / "step-2").mkdir(parents=True)
    assert is_being_saved(tmp_path / "checkpoint" / "step-2")
    assert checkpoints_in(tmp_path / "checkpoint").agree() is None
    assert left(tmp_path / "checkpoint.set-aside") == ["step-2"]
    assert not is_being_saved(tmp_path / "checkpoint" / "step-4")


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    names = ("step_2", "step_4", "step_6", "step_8")
    root = folders(tmp_path / "checkpoint", **dict.fromkeys(names, "whole"))
    checkpoints_in(root).remove_old(keep=1, best=root / "step-4")
    assert left(root) == ["step-4", "step-8"]


def test_the_owner_of_a_folder_is_not_written_through_a_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json").symlink_to(tmp_path / "mine")
    with (
        pytest.raises(UserError, match=r"\.run\.json is not of a run"),
        locked(tmp_path / "run", "job.dump_folder"),
    ):
        pytest.fail("is held")
    # nor one that is the owner's
    (tmp_path / "mine").write_text('{"pid": 1, "host": "h"}')
    with locked(tmp_path / "run", "job.dump_folder"):
        assert (tmp_path / "mine").read_text() == '{"pid": 1, "host": "h"}'


def test_the_step_asked_for_is_refused_and_another_offered(tmp_path):
    root = folders(tmp_path / "checkpoint", step_2="whole", step_4="flipped")
    with pytest.raises(UserError, match=r"step-4/.*the newest other checkpoint is step 2"):
        checkpoints_in(root).check(4)
    with pytest.raises(UserError, match=r"got 3; .* has: 4, 2"):
        checkpoints_in(root).check(3)


def test_steps_after_the_one_asked_for_are_not_written_over(train, tmp_path):
    folder, asked = tmp_path / "run", ("--checkpoint.load_step", 2)
    train(folder)
    older = read_manifest(folder / "checkpoint" / "step-4")
    # what is refused moves nothing
    train(folder, *asked, "--training.steps", 2, code=2)
    assert read_manifest(folder / "checkpoint" / "step-4") == older
    said = train(folder, *asked, "--optimizer.lr", "3e-4")
    aside = folder / "checkpoint.set-aside" / "step-4"
    assert f"{folder}/checkpoint/step-4: the run starts before it; set aside as {aside}" in said
    verify(aside)
    assert read_manifest(aside) == older
    assert steps(folder) == [1, 2, 3, 4, 3, 4]
    verify(folder / "checkpoint" / "step-4")
    assert read_manifest(folder / "checkpoint" / "step-4") != older


@pytest.mark.parametrize(
    "kinds, remaining",
    [
        (["whole", "whole", "whole", "whole"], [6, 8]),
        (["whole", "torn", "torn", "torn"], [2, 4, 6, 8]),
        (["whole", "torn", "whole", "whole"], [4, 6, 8]),
        (["whole", "whole", "flipped", "flipped"], [2, 4, 6, 8]),
        (["flipped", "whole", "flipped", "torn"], [4, 6, 8]),
    ],
)
def test_retention_keeps_the_last_whole_one(tmp_path, kinds, remaining):
    names = dict(zip(("step_2", "step_4", "step_6", "step_8"), kinds, strict=True))
    root = folders(tmp_path / "checkpoint", **names)
    checkpoints_in(root).remove_old(keep=2)
    assert left(root) == [f"step-{step}" for step in remaining]


def test_checkpoints_whose_names_were_exchanged_are_not_gone_on_from(train, tmp_path):
    """The steps in between would be trained twice, and the later checkpoint written over."""
    folder = tmp_path / "run" / "checkpoint"
    train(tmp_path / "run")
    (folder / "step-2").rename(tmp_path / "aside")
    (folder / "step-4").rename(folder / "step-2")
    (tmp_path / "aside").rename(folder / "step-4")
    kept = {path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
    said = train(tmp_path / "run", "--training.steps", 6, "--checkpoint.load_step", 2, code=2)
    assert f"{folder}/step-2: is the checkpoint of step 4" in said
    said = train(tmp_path / "run", "--training.steps", 6, code=2)
    assert f"{folder}/step-4: is the checkpoint of step 2" in said
    assert f"{folder}/step-2: is the checkpoint of step 4" in said
    # one of them may be set aside by now
    assert kept <= {path.stat().st_ino for path in (tmp_path / "run").rglob("*")}
