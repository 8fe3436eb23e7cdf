"""A folder that takes a name: nothing is lost that its maker did not make, whoever is killed."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aixsim_cli.errors import Stopped, UserError
from aixsim_cli.models.kind import find_source
from aixsim_cli.run import replace
from aixsim_cli.run.manifest import verify, write_manifest
from aixsim_cli.run.replace import new_folder
from aixsim_cli.run.signals import ends_on_sigterm


def make(target, text="new", **options):
    with new_folder(target, maker="tests", **options) as folder:
        (folder / "weights").write_text(text)


def tree(root):
    """Every path below, and what files hold."""
    return {
        str(p.relative_to(root)): p.read_bytes() if p.is_file() and not p.is_symlink() else None
        for p in root.rglob("*")
    }


def left(root):
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def made(tmp_path):
    make(tmp_path / "hf", "old")
    return tmp_path / "hf"


@pytest.mark.parametrize("kind", ["refused", "failed"])
def test_parents_that_were_made_for_nothing_go_again(tmp_path, kind):
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "a" / "b" / "target"
    with pytest.raises(UserError), new_folder(target, maker="tests") as folder:
        (folder / "weights").write_text("half")
        if kind == "refused":
            target.symlink_to(tmp_path)
            (folder / "weights").unlink()
        else:
            raise UserError("no")
    if kind == "refused":
        assert left(target.parent) == ["target"]
    else:
        assert left(tmp_path / "there") == []


def test_a_new_folder_is_whole_and_alone(tmp_path):
    make(tmp_path / "a" / "hf")
    verify(tmp_path / "a" / "hf")
    assert left(tmp_path / "a") == ["hf"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a" / "hf").stat().st_mode & 0o777 == 0o777 & ~mask


def test_an_empty_folder_is_no_obstacle(tmp_path):
    (tmp_path / "hf").mkdir()
    make(tmp_path / "hf")
    assert (tmp_path / "hf" / "weights").read_text() == "new"


def test_a_failure_leaves_what_was(made):
    before = tree(made.parent)
    with (
        pytest.raises(ZeroDivisionError),
        new_folder(made, maker="tests", force=True) as folder,
    ):
        (folder / "weights").write_text("half")
        raise ZeroDivisionError
    assert tree(made.parent) == before


def test_force_replaces_what_the_maker_made_and_nobody_changed(made):
    with pytest.raises(UserError, match="exists; expected a new folder, or --force"):
        make(made)
    make(made, force=True)
    assert (made / "weights").read_text() == "new" and left(made.parent) == ["hf"]


def foreign_file(target):
    (target / "thesis.txt").write_text("years")


def foreign_folder(target):
    (target / "checkpoint" / "step-1").mkdir(parents=True)


def changed(target):
    (target / "weights").write_text("fine-tuned")


def other_maker(target):
    shutil.rmtree(target)
    target.mkdir()
    (target / "weights").write_text("x")
    write_manifest(target)


def no_manifest(target):
    (target / "manifest.json").unlink()


def a_file(target):
    shutil.rmtree(target)
    target.write_text("thesis")


def a_link(target):
    target.rename(target.with_name("elsewhere"))
    target.symlink_to("elsewhere")


def a_link_within(target):
    (target / "weights").rename(target.parent / "precious")
    (target / "weights").symlink_to(target.parent / "precious")


OBSTACLES = {
    foreign_file: "holds thesis.txt, which tests did not write",
    foreign_folder: "holds checkpoint, which tests did not write",
    changed: "was changed since",
    other_maker: "was not made by tests",
    no_manifest: "was not made by tests",
    a_file: "exists and is no folder",
    a_link: "is a symbolic link",
    a_link_within: "holds weights",
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda o: o.__name__)
def test_anything_else_is_refused_before_the_work(made, obstacle, force):
    obstacle(made)
    before = tree(made.parent)
    with (
        pytest.raises(UserError, match=OBSTACLES[obstacle]),
        new_folder(made, maker="tests", force=force),
    ):
        pytest.fail("started to work")
    assert tree(made.parent) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda o: o.__name__)
@pytest.mark.parametrize("existed", [False, True])
def test_anything_that_appears_meanwhile_is_kept(tmp_path, obstacle, force, existed):
    target = tmp_path / "hf"
    if existed and not force:
        pytest.skip("refused at once")
    if existed:
        make(target, "old")
    with pytest.raises(UserError), new_folder(target, maker="tests", force=force) as folder:
        (folder / "weights").write_text("new")
        if not existed:
            make(tmp_path / "elsewhere-first", "other")
            (tmp_path / "elsewhere-first").rename(target)
        obstacle(target)
        before = tree(tmp_path)
    after = tree(tmp_path)
    assert after == {k: v for k, v in before.items() if not k.startswith(".hf.aixsim")}


def test_what_changes_between_the_last_look_and_the_rename_is_put_back(made, monkeypatch):
    rename = os.rename

    def late(source, target):
        if source == made:
            foreign_file(made)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(UserError, match=r"thesis\.txt.*nothing was replaced"):
        make(made, force=True)
    assert (made / "thesis.txt").read_text() == "years" and left(made.parent) == ["hf"]
    assert (made / "weights").read_text() == "old"


def test_a_target_that_is_taken_between_the_two_renames_loses_nobody_anything(made, monkeypatch):
    rename = os.rename

    def late(source, target):
        rename(source, target)
        if source == made:
            made.mkdir()
            foreign_file(made)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(UserError, match="somebody else"):
        make(made, force=True)
    monkeypatch.undo()
    home = made.parent / ".hf.aixsim"
    assert (made / "thesis.txt").read_text() == "years"
    assert (home / "old" / "weights").read_text() == "old"
    with pytest.raises(UserError, match="somebody else"):
        make(made, force=True)
    assert (home / "old" / "weights").read_text() == "old"


def test_source_and_target_are_apart(made):
    for target in (made, made / "within", made.parent, made.parent / "x" / ".." / "hf"):
        before = tree(made.parent)
        with pytest.raises(UserError, match="source"):
            make(target, force=True, source=made)
        assert tree(made.parent) == before
    (made.parent / "link").symlink_to("hf")
    with pytest.raises(UserError, match="is the source itself"):
        make(made, force=True, source=made.parent / "link")


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_place_without_a_name_of_its_own(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "thesis.txt").write_text("years")
    monkeypatch.chdir(tmp_path / "here")
    before = tree(tmp_path)
    with pytest.raises(UserError):
        make(Path(name), force=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["", ".", "..", "/", "owner/name"])
def test_a_place_that_nobody_wrote_is_not_interrupted(name):
    assert replace.interrupted(Path(name)) is None


def test_two_at_once(made):
    with new_folder(made, maker="tests", force=True) as folder:
        (folder / "weights").write_text("first")
        with pytest.raises(UserError, match="another process is writing it"):
            make(made, "second", force=True)
    assert (made / "weights").read_text() == "first" and left(made.parent) == ["hf"]


def killed_at(target, call, count, how="SIGKILL"):
    """Make a folder in a process that is killed before the `count`-th call of `os.call`."""
    code = f"""
import os, signal, shutil
from pathlib import Path
from aixsim_cli import main
from aixsim_cli.run.replace import new_folder
from aixsim_cli.run.signals import ends_on_sigterm
real, seen = getattr({call}), [0]
def fault(*a, **k):
    seen[0] += 1
    if seen[0] == {count}:
        os.kill(os.getpid(), signal.{how})
    return real(*a, **k)
setattr({call}, fault)
def make(**keywords):
    target = Path({str(target)!r})
    with ends_on_sigterm(), new_folder(target, maker="tests", force=True) as folder:
        (folder / "weights").write_text("new")
main.app = make
main.main()
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


# between what is said and what follows it: the manifest, the two renames, the deletion of the old
MOMENTS = [
    ("os, 'replace'", 1),
    ("os, 'rename'", 1),
    ("os, 'rename'", 2),
    ("shutil, 'rmtree'", 1),
]


@pytest.mark.parametrize(("call", "count"), MOMENTS)
def test_a_kill_leaves_the_old_or_the_new_and_the_next_puts_it_in_order(made, caplog, call, count):
    done = killed_at(made, call, count)
    assert done.returncode == -signal.SIGKILL, done.stderr
    between = (call, count) == ("os, 'rename'", 2)
    home = made.parent / ".hf.aixsim"
    where = home / "old" if between else made
    verify(where)
    assert (where / "weights").read_text() == ("new" if "rmtree" in call else "old")
    hint = replace.interrupted(made)
    assert (hint is not None) == between
    if between:
        with pytest.raises(UserError, match=r"hf: a conversion was killed .*\.hf\.aixsim/old"):
            find_source(str(made))
    (made.parent / ".hf.other").mkdir()
    with pytest.raises(UserError, match="--force to replace it"):
        make(made)
    assert ("put back" in caplog.text) == between
    assert str(home) in caplog.text
    verify(made)
    assert left(made.parent) == [".hf.other", "hf"]


@pytest.mark.parametrize(("call", "count"), MOMENTS)
def test_sigterm_cleans_up(made, call, count):
    done = killed_at(made, call, count, "SIGTERM")
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    verify(made)
    assert (made / "weights").read_text() in ("old", "new")
    make(made, "again", force=True)
    assert left(made.parent) == ["hf"]


def test_sigterm_within_a_library_that_makes_another_error_of_it():
    with pytest.raises(Stopped) as end, ends_on_sigterm():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except BaseException as error:
            raise ValueError("damaged") from error
    assert end.value.signal == signal.SIGTERM


def test_sigterm_is_the_process_again_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with ends_on_sigterm():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_workspace_that_is_not_ours_is_left_alone(made):
    home = made.parent / ".hf.aixsim"
    home.mkdir()
    (home / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=r"thesis\.txt, which is not ours"):
        make(made, force=True)
    assert (home / "thesis.txt").read_text() == "years"


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        make(tmp_path / "file" / "hf")


# files that a trainer puts in place in a folder that holds other things too


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name, text in {"model": "old", "shard-2": "old", "notes": "mine"}.items():
        (folder / name).write_text(text)
    write_manifest(folder)
    # from here on what is not the model's
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "model").write_text("earlier")
    (folder / "results.json").write_text("{}")
    return folder


ASIDE = "set-aside"


def fill(folder):
    staged = replace.stage(folder, folder / ASIDE)
    (staged / "model").write_text("new")
    (staged / "sub").mkdir()
    (staged / "sub" / "extra").write_text("new")


def assert_new(folder):
    verify(folder)
    assert (folder / "model").read_text() == "new"
    assert left(folder) == ["checkpoint-2", "manifest.json", "model", "results.json", "sub"]
    assert (folder / "results.json").read_text() == "{}"


def test_published_files_take_the_place_of_the_models(run):
    fill(run)
    replace.publish(run, run / ASIDE, maker="a test")
    assert_new(run)


def test_what_was_staged_and_not_published_is_nothing(run):
    fill(run)
    verify(run)
    assert (run / "model").read_text() == "old"
    (run / ".staged" / "half").write_text("written")
    staged = replace.stage(run, run / ASIDE)
    assert left(staged) == [".incomplete"] and not (run / ASIDE).exists()


@pytest.mark.parametrize("count", range(1, 6))
def test_a_publishing_that_is_killed_is_completed(run, monkeypatch, count):
    """At every call that changes something."""
    calls = 0

    def fault(real):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == count:
                raise OSError(errno.EINTR, "killed")
            return real(*arguments, **options)

        return call

    fill(run)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fault(os.rename))
        patch.setattr(os, "replace", fault(os.replace))
        patch.setattr(shutil, "rmtree", fault(shutil.rmtree))
        with pytest.raises(OSError, match="killed"):
            replace.publish(run, run / ASIDE, maker="a test")
    if count <= 2:
        # the manifest of what was staged, and the rename that publishes it
        verify(run)
        assert (run / "model").read_text() == "old"
        fill(run)
        replace.publish(run, run / ASIDE, maker="a test")
    else:
        assert "in place" in replace.interrupted(run)
        replace.finish_publishing(run, run / ASIDE)
    assert replace.interrupted(run) is None
    staged = run / ".staged"
    assert not staged.exists()
    # whole, but not named yet: it could be a copy of somebody's
    shutil.rmtree(run / ASIDE, ignore_errors=count != 2)
    assert_new(run)


def test_a_damaged_manifest_of_the_old_model_is_no_obstacle(run):
    (run / "manifest.json").write_text('{"format"')
    fill(run)
    replace.publish(run, run / ASIDE, maker="a test")
    verify(run)
    assert (run / "model").read_text() == "new"
    # nobody knows any more whose it is
    assert (run / "shard-2").read_text() == "old"


def test_results_of_the_old_model_do_not_stay_beside_the_new_one(run):
    (run / "results.json").unlink()
    fill(run)
    (run / ".staged" / "results.json").write_text("new")
    replace.publish(run, run / ASIDE, maker="a test", leave_out=["results.json", "card"])
    assert (run / "results.json").read_text() == "new"
    fill(run)
    replace.publish(run, run / ASIDE, maker="a test", leave_out=["results.json", "card"])
    assert not (run / "results.json").exists() and not (run / ASIDE).exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize("is_staged", [True, False])
@pytest.mark.parametrize("name", ["model", "card", "extra"])
def test_what_nobody_published_is_set_aside(run, caplog, name, is_staged, kind):
    """Under the name of a file of the model, of one that goes along, or of one that is new."""
    fill(run)
    (run / ".staged" / "card").write_text("new")
    replace.publish(run, run / ASIDE, maker="a test", leave_out=["card"])
    path = run / name
    path.unlink(missing_ok=True)
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
        (path / "file").write_text("mine")
    else:
        (run / "linked").write_text("mine")
        path.symlink_to("linked")
    staged = replace.stage(run, run / ASIDE)
    (staged / "sole").write_text("new")
    if is_staged:
        (staged / name).write_text("new")
    replace.publish(run, run / ASIDE, maker="a test", leave_out=["card"])
    verify(run)
    if name == "extra" and not is_staged:
        assert os.path.lexists(path) and not (run / ASIDE).exists()
        return
    aside = run / ASIDE / name
    assert f"{path}: " in caplog.text and f"set aside as {aside}" in caplog.text
    assert path.exists() == is_staged
    if kind == "link":
        assert aside.is_symlink() and (run / "linked").read_text() == "mine"
    else:
        assert (aside / "file" if kind == "folder" else aside).read_text() == "mine"


@pytest.mark.parametrize("damage", ["model", "manifest.json"])
def test_what_was_damaged_before_it_was_in_place_takes_the_place_of_nothing(run, damage):
    fill(run)
    write_manifest(run / ".staged")
    (run / ".staged").rename(run / ".published")
    (run / ".published" / damage).write_text("NEW")
    for _ in range(2):
        said = f"{run / '.published' / damage}: damaged.*without {run / '.published'} the run"
        with pytest.raises(UserError, match=said):
            replace.finish_publishing(run, run / ASIDE)
    verify(run)


def test_what_a_manifest_lists_is_on_the_disk_before_it(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "one").write_text("1")
    (tmp_path / "sub" / "two").write_text("2")
    written, sync = [], os.fsync

    def fsync(handle):
        written.append(os.fstat(handle).st_ino)
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_manifest(tmp_path)
    listed = {tmp_path / name for name in ("one", "sub/two", "sub")}
    manifest = written.index((tmp_path / "manifest.json").stat().st_ino)
    assert {path.stat().st_ino for path in listed} <= set(written[:manifest])


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("where", ["new", "old", "new/hf"])
@pytest.mark.parametrize("locked", [False, True])
def test_a_source_in_the_workspace_is_not_deleted(tmp_path, where, force, locked):
    """As who rescues by hand what a kill has left, or tries to."""
    source = tmp_path / ".hf.aixsim" / where
    make(source)
    if locked:
        (tmp_path / ".hf.aixsim" / "lock").touch()
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"where the source, .*, lies; expected a target"):
        make(tmp_path / "hf", force=force, source=source)
    # nor what only looks like a workspace
    if not locked:
        with pytest.raises(UserError, match="which is not ours; expected that name to be free"):
            make(tmp_path / "hf", force=force)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", [".staged", ".published"])
def test_a_folder_of_that_name_that_is_somebody_elses_is_kept(run, name):
    (run / name).mkdir()
    (run / name / "thesis.txt").write_text("years")
    replace.finish_publishing(run, run / ASIDE)
    fill(run)
    replace.publish(run, run / ASIDE, maker="a test")
    verify(run)
    assert (run / ASIDE / name / "thesis.txt").read_text() == "years"
    assert not (run / name).exists()


@pytest.mark.parametrize("text", ["", "mine"])
def test_the_lock_of_a_run_that_was_refused_is_no_obstacle(made, text):
    (made / ".run.lock").write_text(text)
    if text:
        with pytest.raises(UserError, match=r"holds \.run\.lock, which tests did not write"):
            make(made, force=True)
        return
    make(made, force=True)
    assert (made / "weights").read_text() == "new"
