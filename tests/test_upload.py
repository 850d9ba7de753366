"""The real kaggle client, unpatched, in a subprocess, against a loopback Kaggle that misbehaves: a success is true, or it is not said."""
import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cxrkit.client import Client, KaggleError, judge_reply, known_secrets, redact
from cxrkit.manifest import METADATA, ManifestError, restore_names, verify_package
from cxrkit.package import pack_folder
from cxrkit.upload import upload_package
from kaggle_server import Dataset, KaggleServer, Version

REF = "alice/cxrkit-models"


@pytest.fixture
def packed(tmp_path) -> Path:
    "A packed dataset: a file large enough to break off in, an empty one, and a name that Kaggle would mangle."
    folder = tmp_path/"models"
    folder.mkdir()
    meta = {"id": REF, "title": "cxrkit models", "subtitle": "Weights of a made-up model", "licenses": [{"name": "other"}]}
    (folder/METADATA).write_text(json.dumps(meta))
    fill(folder, b"first ")
    return folder


def fill(folder: Path, text: bytes):
    "Pack new content into the folder."
    for name, content in {"weights.safetensors": text*30_000, "empty.txt": b"", "odd+name.whl": b"odd"}.items(): (folder.parent/name).write_bytes(content)
    pack_folder(folder, "models", {n: folder.parent/n for n in ("weights.safetensors", "empty.txt", "odd+name.whl")}, {"models": []})


@pytest.fixture
def kaggle():
    with KaggleServer() as server:
        yield server
        assert server.escapes == [], "the client tried to reach something else than the loopback server"


@pytest.fixture
def client(kaggle, tmp_path) -> Client:
    return Client(kaggle.environment(tmp_path/"home"), say=lambda text: None, pause=.05, grace=.5, patience=900.)


def exists(kaggle: KaggleServer) -> Dataset:
    "An older version is there already."
    kaggle.datasets[REF] = Dataset({"title": "cxrkit models", "licenseName": "other", "isPrivate": True}, [Version({"old.txt": b"old"})])
    return kaggle.datasets[REF]


def uploaded(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != METADATA}


def bytes_sent(kaggle: KaggleServer, name: str) -> int:
    return sum(size for n, size, _ in kaggle.puts if n == name)


def test_create_then_version(packed, kaggle, client, tmp_path):
    "The owner comes from the login; private; byte-equal; and what comes back under /kaggle/input has its real names again."
    meta = json.loads((packed/METADATA).read_text())
    (packed/METADATA).write_text(json.dumps(meta | {"id": "INSERT_OWNER_HERE/cxrkit-models"}))
    first = upload_package(packed, client)
    assert (first.ref, first.action, first.version) == (REF, "created", 1) and json.loads((packed/METADATA).read_text())["id"] == REF
    assert kaggle.datasets[REF].meta["isPrivate"] is True and kaggle.datasets[REF].newest.files == uploaded(packed)
    fill(packed, b"second ")
    second = upload_package(packed, client, message="better weights")
    assert (second.action, second.version) == ("versioned", 2) and second.url == f"https://www.kaggle.com/datasets/{REF}/versions/2"
    assert kaggle.datasets[REF].newest.files == uploaded(packed) and kaggle.datasets[REF].newest.notes == "better weights"
    mount = tmp_path/"input"
    mount.mkdir()
    for name, content in kaggle.datasets[REF].newest.files.items(): (mount/name).write_bytes(content)
    assert (restore_names(verify_package(mount, "models"), tmp_path/"links")/"odd+name.whl").read_bytes() == b"odd"


HARMLESS = ["put_503", "put_disconnect", "server_error", "rate_limit", "conflict", "forbidden", "status_lag", "listing_lag", "zipped_download", "drop_put", "lose_file", "truncate_file", "lost_reply"]


@pytest.mark.parametrize("fault", HARMLESS)
def test_fault_is_survived_with_equal_content(fault, packed, kaggle, client):
    dataset = exists(kaggle)
    kaggle.fault(fault, 2 if fault in ("forbidden", "status_lag", "listing_lag") else 1)
    done = upload_package(packed, client)
    assert dataset.newest.files == uploaded(packed) and done.version == len(dataset.versions)
    assert not any(kaggle.faults.values()), "the planted fault never struck"
    if fault == "put_503": assert any(r.startswith("bytes */") for _, _, r in kaggle.puts), "the upload did not resume"
    if fault in ("drop_put", "lose_file", "truncate_file"): assert done.version == 3, "an incomplete version was taken for a complete one"
    if fault == "conflict": assert bytes_sent(kaggle, "weights.safetensors") == (packed/"weights.safetensors").stat().st_size, "what had arrived was sent again"


@pytest.mark.parametrize("fault, times, words", [
    ("quota", 1, "exceeded your private dataset storage quota"), ("ingest_failed", 1, "could not ingest"), ("lose_file", 2, "weights.safetensors is missing"),
    pytest.param("truncate_file", 2, "weights.safetensors: expected 180000 bytes, got 179999", marks=pytest.mark.slow),
    pytest.param("server_error", 99, "Internal error", marks=pytest.mark.slow), pytest.param("drop_put", 99, "Upload unsuccessful", marks=pytest.mark.slow)])
def test_fault_that_stays_is_an_error_and_never_a_success(fault, times, words, packed, kaggle, client):
    exists(kaggle)
    kaggle.fault(fault, times)
    with pytest.raises(KaggleError, match=words): upload_package(packed, client)


@pytest.mark.parametrize("fault, times", [("forbidden", 2), ("drop_put", 1), pytest.param("put_503", 1, marks=pytest.mark.slow), pytest.param("lost_reply", 1, marks=pytest.mark.slow), pytest.param("lose_file", 1, marks=pytest.mark.slow)])
def test_fault_of_a_creation_is_survived_with_equal_content(fault, times, packed, kaggle, client):
    "A new dataset answers 403 for a while; a file may miss in its first version."
    kaggle.fault(fault, times)
    done = upload_package(packed, client)
    assert not any(kaggle.faults.values()), "the planted fault never struck"
    dataset = kaggle.datasets[REF]
    assert dataset.meta["isPrivate"] is True and dataset.versions[done.version-1].files == uploaded(packed) and done.version == len(dataset.versions)


def test_creation_that_is_refused_is_an_error(packed, kaggle, client):
    kaggle.fault("quota")
    with pytest.raises(KaggleError, match="exceeded your private dataset storage quota"): upload_package(packed, client)
    assert REF not in kaggle.datasets


def test_upload_that_was_killed_is_resumed_by_the_next_command(packed, kaggle, client, tmp_path):
    "kill -9 in the middle of a file; the next command sends only what is missing."
    dataset, home, here = exists(kaggle), tmp_path/"home", str(Path(__file__).parents[1])
    kaggle.fault("put_503", 60) # each strike lets half of the rest through
    words = [sys.executable, "-c", "from cxrkit.cli import app; app()", "upload", "models", "--folder", str(packed)]
    first = subprocess.Popen(words, env=kaggle.environment(home) | {"CXRKIT_HOME": str(tmp_path), "PYTHONPATH": here}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while first.poll() is None and bytes_sent(kaggle, "weights.safetensors") == 0: time.sleep(.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kaggle.faults.clear()
    assert len(dataset.versions) == 1, "it was not killed in the middle"
    before, size = len(kaggle.puts), (packed/"weights.safetensors").stat().st_size
    assert upload_package(packed, client).version == 2 and dataset.newest.files == uploaded(packed)
    assert sum(n for name, n, _ in kaggle.puts[before:] if name == "weights.safetensors") < size, "it was sent once more from its beginning"


def test_creation_is_tried_where_nothing_is_visible_and_existing_names_become_versions(packed, kaggle, client):
    exists(kaggle)
    kaggle.fault("forbidden", 1) # status says 403 although the dataset exists
    done = upload_package(packed, client)
    assert (done.action, done.version) == ("created", 2) and [m for m, _ in kaggle.calls].count("CreateDatasetVersion") == 1
    assert kaggle.datasets[REF].newest.files == uploaded(packed)


def test_plain_client_by_hand_works_and_its_version_is_recognised(packed, kaggle, client):
    exists(kaggle)
    done = subprocess.run([sys.executable, "-m", "kaggle", "datasets", "version", "-p", str(packed), "-m", "by hand"], env=client.environment(), capture_output=True, text=True)
    assert "Dataset version is being created" in done.stdout
    assert upload_package(packed, client).action == "unchanged"


def test_edited_folder_does_not_leave(packed, kaggle, client):
    (packed/"weights.safetensors").write_bytes(b"something else")
    with pytest.raises(ManifestError, match="weights.safetensors"): upload_package(packed, client)
    fill(packed, b"first ")
    (packed/"notes.txt").write_text("private")
    with pytest.raises(ManifestError, match="notes.txt would be uploaded"): upload_package(packed, client)
    assert kaggle.calls == []


@pytest.mark.slow
def test_token_login_works_too(packed, kaggle, tmp_path):
    quiet = Client(kaggle.environment(tmp_path/"home", login="token"), say=lambda text: None, pause=.05, grace=.5)
    assert upload_package(packed, quiet).action == "created"


def test_wrong_key_is_one_sentence(packed, kaggle, client):
    env = kaggle.environment(packed.parent/"home") | {"KAGGLE_KEY": "not-the-key"}
    with pytest.raises(KaggleError, match="kaggle auth login"): upload_package(packed, Client(env, say=lambda text: None, pause=.05))


def test_credentials_never_appear(packed, kaggle, tmp_path):
    "The command line, as loud as it gets, with a fault in the middle: no spelling of the secret in any output or file."
    kaggle.fault("put_503")
    env = kaggle.environment(tmp_path/"home") | {"VERBOSE": "1", "CXRKIT_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", "from cxrkit.cli import app; app()", "upload", "models", "--folder", str(packed)], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "created: https://www.kaggle.com/datasets/alice/cxrkit-models/versions/1" in done.stdout, done.stdout+done.stderr
    secrets = [kaggle.key, kaggle.token, base64.b64encode(f"alice:{kaggle.key}".encode()).decode(), "signature-token"]
    written = done.stdout+done.stderr+"".join(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size < 10**5)
    assert not [s for s in secrets if s in written]


def test_failure_of_the_command_line_is_not_exit_zero(packed, kaggle, tmp_path):
    kaggle.fault("quota")
    env = kaggle.environment(tmp_path/"home") | {"CXRKIT_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", "from cxrkit.cli import app; app()", "upload", "models", "--folder", str(packed)],
                          env=env, capture_output=True, text=True)
    assert done.returncode != 0 and "quota" in done.stderr and "Traceback" not in done.stderr


def test_server_mangles_and_unpacks_as_kaggle_does(kaggle, client, tmp_path):
    "The faults are in the model of Kaggle, not only in ours: an unsafe folder, sent by hand, arrives mangled."
    import tarfile
    folder = tmp_path/"unsafe"
    folder.mkdir()
    (folder/METADATA).write_text(json.dumps({"id": "alice/unsafe-things", "title": "unsafe things", "licenses": [{"name": "other"}]}))
    (folder/"torch-2.1+cu118.whl").write_bytes(b"w")
    (tmp_path/"setup.py").write_text("")
    with tarfile.open(folder/"thing-1.0.tar.gz", "w:gz") as tar: tar.add(tmp_path/"setup.py", "thing-1.0/setup.py")
    subprocess.run([sys.executable, "-m", "kaggle", "datasets", "create", "-p", str(folder)], env=client.environment(), capture_output=True)
    assert set(kaggle.datasets["alice/unsafe-things"].newest.files) == {"torch-2.1cu118.whl", "thing-1.0/thing-1.0/setup.py"}


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))])
def test_any_mixture_of_faults_ends_equal_or_in_an_error(seed, packed, kaggle, client):
    rng, dataset = random.Random(seed), exists(kaggle)
    for fault in rng.sample([*HARMLESS, "quota", "ingest_failed"], 4): kaggle.fault(fault, rng.choice([1, 1, 2, 5]))
    try: done = upload_package(packed, client)
    except KaggleError as error: assert str(error)
    else: assert dataset.versions[done.version-1].files == uploaded(packed)


def test_test_environment_is_refused(monkeypatch):
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")
    with pytest.raises(KaggleError, match="talks to the real Kaggle"): Client().environment()


@pytest.mark.parametrize("path, text", [("kaggle.json", '{"username": "bob", "key": "abcd1234"}'), ("access_token", "KGAT_secretsecret\n")])
def test_secrets_in_files_are_known(tmp_path, path, text):
    (tmp_path/".kaggle").mkdir()
    (tmp_path/".kaggle"/path).write_text(text)
    secrets = known_secrets({"HOME": str(tmp_path)})
    assert secrets and not any(s in redact(f"said: {text}", secrets) for s in ("abcd1234", "KGAT_secretsecret"))


@pytest.mark.parametrize("words, code, text, kind", [
    ("datasets create", 0, "Your private Dataset is being created. Please check progress at …", "ok"),
    ("datasets create", 0, "", "refused"),
    ("datasets version", 0, "Dataset version creation error: Too many top-level files", "quota"),
    ("datasets version", 0, "Skipping folder: weights; use '--dir-mode' to upload folders\nDataset version is being created.", "dropped"),
    ("datasets version", 0, "The following are not valid tags and could not be added to the dataset: ['x']", "refused"),
    ("kernels push", 0, "Kernel push error: Maximum batch GPU session count of 2 reached.", "quota"),
    ("datasets status", 1, "HTTPSConnectionPool(host='api.kaggle.com', port=443): Max retries exceeded", "network"),
    ("datasets status", 1, "401 Client Error: Unauthorized", "login"),
    ("datasets version", 1, "Upload successful: 403.txt (1KB)\nodd", "unclear")])
def test_replies_are_judged_by_their_words(words, code, text, kind):
    assert judge_reply(words.split(), code, text) == kind
