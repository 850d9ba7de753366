"""Packing: names, manifests, wheels for another machine, models that are what they say; and what is refused."""
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrkit.image import Image, ImageError, choose_image, list_images, platforms, read_sheet
from cxrkit.manifest import FINGERPRINT, MANIFEST, METADATA, ManifestError, read_manifest, read_weights_header, restore_names, verify_package
from cxrkit.models import PackageError, check_models, choose_blend, package_models
from cxrkit.package import check_in_sync, check_metadata, check_names, describe_commit, fill_owner, pack_folder, package_code, safe_name
from cxrkit.wheels import WheelError, check_wheels, fetch_wheels, lock_text, package_wheels, resolve, submission_requirements
from fakeruns import blend_fake, train_fake, write_project

ROOT = Path(__file__).resolve().parents[1]
GOOD = {"id": "alice/cxrkit-models", "title": "cxrkit models", "subtitle": "Weights of a made-up model", "licenses": [{"name": "other"}]}
IMAGE = Image("toy", "3.12", packages={"numpy": "2.0.2", "torch": "2.10.0+cu128", "typing-extensions": "4.15.0"}, additions={"pydicom": ""})


def dataset(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder/METADATA).write_text(json.dumps(GOOD))
    return folder


def write_files(folder: Path, **contents: bytes) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items(): (folder/name).write_bytes(content)
    return {name: folder/name for name in contents}


def wheel(shelf: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any") -> Path:
    "A wheel that holds nothing but its metadata."
    base = f"{name.replace('-', '_')}-{version}"
    path = shelf/f"{base}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(f"{base}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"+"".join(f"Requires-Dist: {r}\n" for r in requires))
        z.writestr(f"{base}.dist-info/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n")
        z.writestr(f"{base}.dist-info/RECORD", "")
    return path


def index(shelf: Path) -> tuple[str, ...]: return ("--no-index", "--find-links", str(shelf))


# ---- names, metadata, manifests

@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=60))
def test_safe_names_survive_and_stay(name):
    safe = safe_name(name)
    assert re.fullmatch(r"[A-Za-z0-9._-]+", safe) and safe_name(safe) == safe and len(safe) == len(name)


@pytest.mark.parametrize("name, why", [("a.zip", "unpacks archives"), ("a.tar.gz", "unpacks archives"), ("a.pth", "save safetensors"), ("a.ckpt", "save safetensors"),
                                       (".hidden", "hidden"), (METADATA, "one of ours"), (MANIFEST, "one of ours"), ("sub/a.txt", "a path")])
def test_files_that_would_not_arrive_are_refused(name, why):
    with pytest.raises(PackageError, match=why): check_names([name])


def test_fifty_files_at_most_and_all_faults_at_once():
    assert len(check_names([f"{i}.txt" for i in range(48)])) == 48
    with pytest.raises(PackageError, match="51 files at the top"): check_names([f"{i}.txt" for i in range(49)])
    with pytest.raises(PackageError, match="a.zip.*b.pth"): check_names(["a.zip", "b.pth"])


@pytest.mark.parametrize("change, words", [
    ({"id": "alice"}, "expected 'owner/slug'"), ({"id": "alice/short"}, "6 to 50"), ({"id": "alice/Upper-Case"}, "6 to 50 of a-z"), ({"id": "alice/"+"x"*51}, "6 to 50"),
    ({"title": "short"}, "title: expected 6 to 50"), ({"title": "x"*51}, "title"), ({"subtitle": "too short"}, "subtitle: expected 20 to 80"), ({"licenses": []}, "exactly one"),
    ({"licenses": [{"name": "a"}, {"name": "b"}]}, "exactly one"), ({"title": "INSERT_TITLE_HERE"}, "placeholder"), ({"id": "INSERT_OWNER_HERE/cxrkit-models"}, "owner is not filled in")])
def test_metadata_that_kaggle_would_refuse(change, words):
    check_metadata(GOOD)
    with pytest.raises(PackageError, match=words): check_metadata(GOOD | change)


def test_committed_metadata_is_complete_but_for_the_owner():
    for kind in ("code", "wheels", "models"):
        committed = json.loads((ROOT/"kaggle_datasets"/kind/METADATA).read_text())
        check_metadata(committed | {"id": "somebody/"+committed["id"].split("/")[1]})


def test_owner_and_slug_are_filled_in_once(tmp_path):
    folder = dataset(tmp_path/"d")
    assert fill_owner(folder, None) == "alice/cxrkit-models" and fill_owner(folder, "bob", "cxrkit-models-2") == "bob/cxrkit-models-2"
    assert fill_owner(folder, None) == "bob/cxrkit-models-2"
    with pytest.raises(PackageError, match="slug"): fill_owner(folder, None, "x")
    assert fill_owner(folder, None) == "bob/cxrkit-models-2", "a refused slug was written"


def test_repacking_removes_the_old_and_keeps_what_is_the_same(tmp_path):
    folder = dataset(tmp_path/"d")
    first = pack_folder(folder, "models", write_files(tmp_path/"s", **{"a.txt": b"a", "b.txt": b"b"}), {})
    before = (folder/"a.txt").stat().st_mtime_ns
    assert pack_folder(folder, "models", write_files(tmp_path/"s", **{"a.txt": b"a", "b.txt": b"b"}), {}) == first
    pack_folder(folder, "models", write_files(tmp_path/"s", **{"a.txt": b"a", "c.txt": b"c"}), {})
    assert sorted(verify_package(folder, extra=False)) == ["a.txt", "c.txt"] and not (folder/"b.txt").exists()
    assert (folder/"a.txt").stat().st_mtime_ns == before, "an unchanged file was written again; its upload could not resume"


def test_interrupted_packing_is_not_a_package(tmp_path, monkeypatch):
    folder = dataset(tmp_path/"d")
    pack_folder(folder, "models", write_files(tmp_path/"s", **{"a.txt": b"a"}), {})
    sources = write_files(tmp_path/"s", **{"a.txt": b"new", "z.txt": b"z"})

    def full_disk(source, target): raise OSError(28, "No space left on device")
    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"): pack_folder(folder, "models", sources, {})
    with pytest.raises(ManifestError, match="no fingerprint.json"): verify_package(folder)
    assert not list(folder.glob(".*"))


def test_strangers_hidden_files_and_folders_do_not_travel(tmp_path):
    folder = dataset(tmp_path/"d")
    sources = write_files(tmp_path/"s", **{"a.txt": b"a"})
    for name in ("kaggle.json", ".env", "notes"):
        (folder/name).mkdir() if name == "notes" else (folder/name).write_text("secret")
        with pytest.raises(PackageError, match=re.escape(name)): pack_folder(folder, "models", sources, {})
        shutil.rmtree(folder/name) if name == "notes" else (folder/name).unlink()
    pack_folder(folder, "models", sources, {})
    (folder/".env").write_text("secret")
    with pytest.raises(ManifestError, match=".env would be uploaded"): verify_package(folder, extra=False)


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f/"a.txt").write_bytes(b"b"), "a.txt .expected sha256"), (lambda f: (f/"a.txt").unlink(), "a.txt .missing"), (lambda f: (f/"a.txt").write_bytes(b"longer"), "expected 1 bytes, got 6"),
    (lambda f: (f/MANIFEST).write_text((f/MANIFEST).read_text().replace('"kind": "models"', '"kind": "wheels"')), "two versions are mixed"),
    (lambda f: (f/FINGERPRINT).write_text("{}"), "expected format 1, got None"), (lambda f: (f/MANIFEST).write_bytes(b"\xff\xfe"), "not JSON")])
def test_damaged_packages_are_refused_by_name(damage, words, tmp_path):
    folder = dataset(tmp_path/"d")
    pack_folder(folder, "models", write_files(tmp_path/"s", **{"a.txt": b"a"}), {})
    damage(folder)
    with pytest.raises(ManifestError, match=words): verify_package(folder)


def test_dates_before_1980_do_not_reach_a_zip(tmp_path):
    folder = dataset(tmp_path/"d")
    sources = write_files(tmp_path/"s", **{"old.txt": b"1970"})
    os.utime(sources["old.txt"], (0, 0))
    pack_folder(folder, "models", sources, {})
    shutil.make_archive(str(tmp_path/"zipped"), "zip", folder)


def test_manifest_is_read_with_the_standard_library_alone(tmp_path):
    folder = dataset(tmp_path/"d")
    pack_folder(folder, "models", write_files(tmp_path/"s", **{"a+b.whl": b"x"}), {})
    with zipfile.ZipFile(tmp_path/"cxrkit.whl", "w") as z:
        for name in ("__init__.py", "manifest.py", "provenance.py"): z.write(ROOT/"cxrkit"/name, f"cxrkit/{name}")
    code = f"import sys; sys.path.insert(0, {str(tmp_path/'cxrkit.whl')!r}); from cxrkit.manifest import verify_package; print(list(verify_package({str(folder)!r}, 'models')))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['a+b.whl']", done.stderr


@pytest.mark.parametrize("content", [b"", b"\x00"*7, b"\xff"*8+b"{}", (10**12).to_bytes(8, "little")+b"{}", (2).to_bytes(8, "little")+b"[["])
def test_broken_weights_headers_are_refused(content, tmp_path):
    (tmp_path/"m.safetensors").write_bytes(content)
    with pytest.raises(ManifestError, match="safetensors"): read_weights_header(tmp_path/"m.safetensors")


# ---- code

def clone(tmp_path: Path) -> Path:
    "A small repository of its own: one notebook, its export, settings."
    root = tmp_path/"clone"
    (root/"nbs").mkdir(parents=True)
    (root/"cxrkit").mkdir()
    shutil.copy(ROOT/"nbs"/"01_boxes.ipynb", root/"nbs")
    for name in ("settings.ini", "setup.py"): shutil.copy(ROOT/name, root)
    for name in ("__init__.py", "boxes.py"): shutil.copy(ROOT/"cxrkit"/name, root/"cxrkit")
    (root/"README.md").write_text("# cxrkit\n")
    shutil.copytree(ROOT/"kaggle_datasets"/"code", root/"kaggle_datasets"/"code", ignore=shutil.ignore_patterns("*.whl", "manifest.json", "fingerprint.json"))
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "start"]): subprocess.run([*git, *words], check=True, capture_output=True)
    return root


def test_code_is_stamped_with_the_commit_and_the_same_commit_gives_the_same_bytes(tmp_path):
    root = clone(tmp_path)
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    manifest = package_code(owner="alice", root=root)
    assert manifest["commit"] == commit and manifest["wheel"] == f"cxrkit-{manifest['version']}-0g{commit[:8]}-py3-none-any.whl"
    mark = (root/"kaggle_datasets"/"code"/FINGERPRINT).read_bytes()
    package_code(owner="alice", root=root)
    assert (root/"kaggle_datasets"/"code"/FINGERPRINT).read_bytes() == mark
    with zipfile.ZipFile(root/"kaggle_datasets"/"code"/manifest["wheel"]) as z:
        assert f"__commit__ = {commit!r}" in z.read("cxrkit/__init__.py").decode() and "cxrkit/boxes.py" in z.namelist()


def test_dirty_and_out_of_sync_trees_are_refused_unless_told(tmp_path):
    root = clone(tmp_path)
    check_in_sync(root)
    with open(root/"cxrkit"/"boxes.py", "a") as file: file.write("\nedited = 'by hand'\n")
    with pytest.raises(PackageError, match="uncommitted change.*cxrkit/boxes.py"): describe_commit(root)
    with pytest.raises(PackageError, match="boxes.py differs from what the notebooks export"): check_in_sync(root)
    manifest = package_code(owner="alice", allow_dirty=True, root=root)
    assert ".dirty-" in manifest["wheel"] and manifest["commit"].endswith("-dirty")


def test_orphan_module_is_out_of_sync(tmp_path):
    root = clone(tmp_path)
    (root/"cxrkit"/"left_over.py").write_text("x = 1\n")
    with pytest.raises(PackageError, match="left_over.py differs"): check_in_sync(root)


# ---- images and wheels

def test_shipped_sheets_are_read_completely():
    names = list_images(ROOT/"kaggle_datasets"/"wheels")
    assert {"py312-torch2.10", "py313-torch2.11"} <= set(names)
    for name, python, torch in (("py312-torch2.10", "3.12", "2.10.0+cu128"), ("py313-torch2.11", "3.13", "2.11.0+cu128")):
        image = choose_image(name, ROOT/"kaggle_datasets"/"wheels")
        lines = [x for x in (ROOT/"kaggle_datasets"/"wheels"/f"image-{name}.txt").read_text().splitlines() if x and x[0] != "#"]
        assert (image.python, image.packages["torch"], len(image.packages)) == (python, torch, len(lines)) and "pydicom" in image.additions


@pytest.mark.parametrize("line", ["numpy=2.0", "==1.0", "numpy 2.0.2", "???"])
def test_unreadable_sheet_lines_are_refused(line):
    with pytest.raises(ImageError, match="cannot read the line"): read_sheet(line)


def test_committed_locks_upgrade_nothing():
    "What is committed for the two shipped images: hashes for all, nothing the image has, no torch, no numpy."
    folder = ROOT/"kaggle_datasets"/"wheels"
    for name in ("py312-torch2.10", "py313-torch2.11"):
        image, lock = choose_image(name, folder), (folder/f"lock-{name}.txt").read_text()
        pins = re.findall(r"^([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}$", lock, re.M)
        assert len(pins) == len([x for x in lock.splitlines() if not x.startswith("#")]) and {"effdet", "pandera", "imagecodecs"} <= {n for n, _ in pins}
        assert not [n for n, _ in pins if n in image.packages or n in ("torch", "numpy")]
        assert "http" not in lock and "//" not in lock


def test_two_images_in_one_dataset(tmp_path):
    shelf, root = tmp_path/"shelf", tmp_path/"root"
    shelf.mkdir()
    for cp in ("cp312", "cp313"): wheel(shelf, "codec", "1.0", "numpy>=2", tag=f"{cp}-{cp}-manylinux_2_28_x86_64")
    wheel(shelf, "helper", "2.0+local")
    wheel(shelf, "checker", "1.0", "helper", "codec")
    home = root/"kaggle_datasets"/"wheels"
    home.mkdir(parents=True)
    (home/METADATA).write_text(json.dumps(GOOD))
    for python, numpy in (("3.12", "2.0.2"), ("3.13", "2.1.3")): (home/f"image-py{python.replace('.', '')}.txt").write_text(f"# python: {python}\nnumpy=={numpy}\n")
    manifest = package_wheels(["py312", "py313"], requirements=["checker", "numpy>=2"], index=index(shelf), root=root)
    assert {n: [w.split("-")[2] for w in e["wheels"] if w.startswith("codec")] for n, e in manifest["images"].items()} == {"py312": ["cp312"], "py313": ["cp313"]}
    assert manifest["files"]["helper-2.0_local-py3-none-any.whl"]["name"] == "helper-2.0+local-py3-none-any.whl"
    assert {r["package"]: r["needed_by"] for r in manifest["images"]["py312"]["why"]} == {"checker": "cxrkit", "helper": "checker", "codec": "checker"}
    before = (home/FINGERPRINT).read_bytes()
    package_wheels(["py312", "py313"], requirements=["checker", "numpy>=2"], index=index(shelf), locked=True, root=root)
    assert (home/FINGERPRINT).read_bytes() == before
    found = {n: p for n, p in verify_package(home, "wheels", extra=False).items() if n.endswith(".whl") and ("cp3" not in n or "cp312" in n)}
    check_wheels(found, (home/"lock-py312.txt").read_text(), ["checker"], choose_image("py312", home))


@pytest.mark.parametrize("name, tag", [("built", "cp311-cp311-manylinux_2_28_x86_64"), ("built", "cp312-cp312-manylinux_2_39_x86_64"), ("built", "cp312-cp312-linux_aarch64"), ("built", "cp312-cp312-win_amd64")])
def test_wheels_for_another_machine_are_neither_found_nor_accepted(name, tag, tmp_path):
    path = wheel(tmp_path, name, "1.0", tag=tag)
    with pytest.raises(WheelError, match="no wheel of built for Python 3.12"): resolve(["built"], IMAGE, index(tmp_path))
    with pytest.raises(WheelError, match="not for Python 3.12"): check_wheels({path.name: path}, "", ["built"], IMAGE)


def test_an_sdist_is_no_wheel(tmp_path):
    (tmp_path/"thing-1.0.tar.gz").write_bytes(b"")
    with pytest.raises(WheelError, match="an sdist does not count"): resolve(["thing"], IMAGE, index(tmp_path))
    with pytest.raises(WheelError, match="expected wheels only"): check_wheels({"thing-1.0.tar.gz": tmp_path/"thing-1.0.tar.gz"}, "", ["thing"], IMAGE)


def test_upgrades_are_refused_and_the_culprit_is_named(tmp_path):
    wheel(tmp_path, "middle", "1.0", "deep>=2")
    wheel(tmp_path, "deep", "2.0", "numpy>=2.3")
    with pytest.raises(WheelError, match=r"deep 2.0 depends on numpy>=2.3.*numpy==2.0.2"): resolve(["middle"], IMAGE, index(tmp_path))
    with pytest.raises(WheelError, match=r"cxrkit needs numpy>=2.1, but there is numpy 2.0.2"): resolve(["numpy>=2.1"], IMAGE, index(tmp_path))
    wheel(tmp_path, "torch", "2.13.0")
    with pytest.raises(WheelError, match="must come from the image"): resolve(["torch"], Image("bare", "3.12"), index(tmp_path))


def test_markers_and_extras_are_those_of_the_image(tmp_path):
    wheel(tmp_path, "main", "1.0", "only-new; python_version >= '3.13'", "only-old; python_version < '3.12'", "win; sys_platform == 'win32'", "extra-thing; extra == 'plus'", "typing_extensions")
    for name in ("only-new", "only-old", "win", "extra-thing"): wheel(tmp_path, name, "1.0")
    newer = Image("new", "3.13", packages=IMAGE.packages)
    names = lambda requirement, image: [w.name for w in resolve([requirement], image, index(tmp_path))[0]]
    assert names("main", IMAGE) == ["main"] and names("main", newer) == ["main", "only-new"] and names("main[plus]", IMAGE) == ["extra-thing", "main"]


def test_lock_pins_the_very_content(tmp_path):
    wheel(tmp_path, "thing", "1.0")
    wheels, why = resolve(["thing"], IMAGE, index(tmp_path))
    lock = lock_text(wheels, why, IMAGE)
    assert [p.name for p in fetch_wheels(lock, IMAGE, tmp_path/"a", index(tmp_path))] == ["thing-1.0-py3-none-any.whl"]
    wheel(tmp_path, "thing", "1.0", "something-new")
    with pytest.raises(WheelError, match="thing==1.0.*other content than the lock"): fetch_wheels(lock, IMAGE, tmp_path/"b", index(tmp_path))


def test_nothing_to_ship_is_fine(tmp_path):
    assert resolve(["numpy>=2", "pydicom>=3"], IMAGE, index(tmp_path))[0] == []


def test_requirements_of_the_project_leave_work_at_home_out():
    names = {re.split(r"[<>=!~ ]", r)[0] for r in submission_requirements(ROOT)}
    assert {"effdet", "imagecodecs", "pandera", "torch"} <= names and not names & {"kaggle", "papermill", "typer"}


def test_platforms_stop_at_the_images_glibc():
    tags = platforms(Image("x", "3.12", (2, 31)))
    assert tags[0] == "manylinux_2_31_x86_64" and "manylinux_2_32_x86_64" not in tags and "manylinux2014_x86_64" in tags


# ---- models

@pytest.fixture(scope="module")
def project(tmp_path_factory) -> dict:
    return write_project(tmp_path_factory.mktemp("project"))


def test_packed_models_are_worth_what_the_ledger_says(project, tmp_path):
    manifest, scores = package_models("toy", out=tmp_path/"models", owner="alice", load=False, root=project["root"])
    assert len(manifest["models"]) == 6 and list(scores["ledger"]) == pytest.approx(list(scores["recomputed"]))
    entry = manifest["models"][0]
    assert {"file", "sha256", "task", "backbone", "size", "mean", "std", "views", "fold", "epoch", "metric", "score", "oof", "versions", "labels", "level"} <= set(entry)
    assert manifest["cache"]["policy"]["scaling"] == "percentile" and manifest["cv"]["folds"] == [0, 1]
    assert all(n.endswith((".safetensors", ".parquet")) for n in manifest["files"])
    check_models(tmp_path/"models", project["root"], load=False)


def test_models_are_chosen_by_runs_sweep_or_blend(project, tmp_path):
    root, truth, cache, folds = project["root"], project["truth"], project["cache"], project["folds"]
    better = [train_fake(root, truth, cache, folds, "30_train_cls", "study-better", "study", k, noise=.01) for k in (0, 1)]
    alone = train_fake(root, truth, cache, folds, "30_train_cls", "study-half", "study", 0, noise=0.)
    others = [r for r in project["models"] if r.name != "study"]
    sweep = tmp_path/"sweep.yaml"
    shutil.copytree(ROOT/"nbs"/"flow", root/"nbs"/"flow", dirs_exist_ok=True)
    shutil.copy(ROOT/"settings.ini", root)
    names = [("30_train_cls", n) for n in ("study", "study-better", "study-half", "none")]+[("31_train_det", "opacity")]
    (root/"data"/"toy").mkdir(parents=True, exist_ok=True)
    entries = "".join(f"  - {{flow: {f}, name: {n}, folds: [0, 1]}}\n" for f, n in names)
    sweep.write_text(f"name: s\ncomp: toy\nruns:\n  - {{flow: 10_cache, name: cache}}\n  - {{flow: 20_folds, name: folds, params: {{n_folds: 2}}}}\n{entries}")
    with pytest.raises(PackageError, match="no sealed blend of exactly these 6 runs.*papermill nbs/flow/40_blend.ipynb.*30_train_cls:study-better"): choose_blend("toy", sweep=sweep, root=root)
    best = blend_fake(root, truth, cache, folds, [*better, *others], "best")
    assert choose_blend("toy", sweep=sweep, root=root) == best == choose_blend("toy", blend="best", root=root) == choose_blend("toy", root=root)
    assert choose_blend("toy", runs="30_train_cls:study 30_train_cls:none 31_train_det:opacity", root=root) == project["blend"] and alone.fold == 0
    with pytest.raises(PackageError, match="say one of --runs, --sweep, --blend"): choose_blend("toy", runs="x", blend="y", root=root)
    with pytest.raises(PackageError, match="no sealed blend; run the flow 40_blend"): choose_blend("rsna_pneumonia", root=root)


def test_predictions_of_another_fold_beside_the_weights_are_noticed(project, tmp_path):
    "Somebody swaps the packed tables for those of other runs and makes the manifest match."
    import pandas as pd
    from cxrkit.manifest import write_manifest
    folder = tmp_path/"models"
    manifest, _ = package_models("toy", blend="blend", out=folder, owner="alice", load=False, root=project["root"])
    table = pd.read_parquet(folder/"coverage.parquet")
    pd.concat([table.assign(run_id=table.run_id.map(dict(zip(sorted(set(table.run_id)), [*sorted(set(table.run_id))[1:], sorted(set(table.run_id))[0]]))))]).to_parquet(folder/"coverage.parquet")
    write_manifest(folder, "models", {n: n for n in manifest["files"]}, {k: v for k, v in manifest.items() if k not in ("format", "kind", "files")})
    with pytest.raises(PackageError, match="the predictions packed beside it are of another fold or run"): check_models(folder, project["root"], load=False)


def test_a_package_that_fails_its_check_is_left_without_a_fingerprint(project, tmp_path, monkeypatch):
    import cxrkit.models as models
    monkeypatch.setattr(models, "score_model", lambda *a: .123)
    with pytest.raises(PackageError, match="study fold 0: ledger .*, recomputed 0.123"): package_models("toy", blend="blend", out=tmp_path/"models", owner="alice", load=False, root=project["root"])
    with pytest.raises(ManifestError, match="no fingerprint.json"): verify_package(tmp_path/"models")


def test_restored_names_are_links_to_read_only_files(tmp_path):
    folder = dataset(tmp_path/"d")
    pack_folder(folder, "wheels", write_files(tmp_path/"s", **{"a+1.whl": b"x"}), {})
    for path in folder.iterdir(): path.chmod(0o444)
    links = restore_names(verify_package(folder), tmp_path/"links")
    assert (links/"a+1.whl").is_symlink() and (restore_names(verify_package(folder), links)/"a+1.whl").read_bytes() == b"x"
    assert read_manifest(folder)["files"]["a_1.whl"]["name"] == "a+1.whl"
