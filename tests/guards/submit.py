"""Logged mistakes of the submission itself, each planted as its author made it: the number is that of the log."""
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tinysubmit import make_tasks, pack_models, rewrite, write_competition

from cxrkit.answers import Answers, fill, list_test, read_sample, save
from cxrkit.manifest import read_manifest, tell_models
from cxrkit.offline import NotReady, check_image, choose_lock, check_versions, open_models
from cxrkit.pace import Pace, make_levels
from cxrkit.recipe import Recipe, apply_recipe
from cxrkit.spec import load_spec
from cxrkit.submit import SubmissionError, check_submission

SPEC = load_spec("siim_covid19")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")/"models"
    pack_models(folder, folds=2)
    return folder


@pytest.fixture
def models(packed, tmp_path) -> Path:
    import shutil
    return Path(shutil.copytree(packed, tmp_path/"models"))


def here() -> dict:
    from importlib.metadata import version
    return {n: version(n) for n in ("torch", "timm", "effdet")}


@pytest.fixture(scope="module")
def networks(packed):
    "Manifest entries of one fold, and their networks."
    from cxrkit.inference import find_devices, load_models
    manifest, files = open_models(packed, here())
    entries = [m for m in manifest["models"] if m["fold"] == 0]
    return entries, load_models(entries, files, find_devices("cpu"))


class Reader:
    "Decoded files, out of memory, as slowly as wanted."
    def __init__(self, sizes, n, pause=0.): self.sizes, self.left, self.pause = sizes, n, pause

    def get(self, timeout=None):
        from cxrkit.stream import Decoded
        if timeout is not None and self.pause > timeout:
            time.sleep(max(0., timeout))
            raise TimeoutError("late")
        time.sleep(self.pause)
        return Decoded(tuple(np.full(s, 90, np.uint8) for s in self.sizes), 300, 400, self.pause)


def stream(networks, n, seconds=600., pause=0., batch_size=4, chunk=4):
    "A submission of n images; form and count."
    from cxrkit.inference import Count, predict_stream
    entries, tasks = networks
    images = pd.DataFrame({"image_id": [f"i{k:03}" for k in range(n)], "study_id": [f"s{k:03}" for k in range(n)], "path": "x.dcm"})
    sample = pd.DataFrame({"id": [*(f"{s}_study" for s in images.study_id), *(f"{i}_image" for i in images.image_id)], "PredictionString": ""})
    sizes = sorted({tuple(m["size"]) for m in entries})
    form, count = Answers(sample, SPEC), Count(images, None)
    combine = partial(apply_recipe, Recipe(method="nms", iou=.5), SPEC)
    for chunk_ in predict_stream(entries, tasks, images, Reader(sizes, n, pause), sizes, combine, Pace(make_levels(entries), time.monotonic()+seconds), batch_size, chunk):
        fill(form, chunk_.cls_preds, chunk_.box_preds, chunk_.images.image_id)
        count.add(chunk_)
    return form, count, sample


def test_guard_15_library_versions_clash_when_submitting(models):
    "timm and effdet of another release flatten features or move heads: refused before a weight is loaded."
    with pytest.raises(NotReady, match=r"effdet: trained with .*, here is 0\.3\.0"): open_models(models, here() | {"effdet": "0.3.0"})
    with pytest.raises(NotReady, match=r"timm: trained with .*, here is 0\.6\.13"): check_versions(read_manifest(models), here() | {"timm": "0.6.13"})
    with pytest.raises(NotReady, match="here is none"): check_versions(read_manifest(models), {k: v for k, v in here().items() if k != "effdet"})


def test_guard_16_submitted_without_tta_when_submitting(models, networks):
    "The submission uses the views of the manifest, and prints them with hashes and the expected score before it starts."
    told = tell_models(read_manifest(models))
    assert "expected siim_map 0.4000" in told and told.count(" 2   0.4000") == 6
    assert all(e["sha256"][:12] in told for e in read_manifest(models)["models"])
    assert all(views == ("identity", "hflip") for views in make_levels(networks[0])[0].views.values())


def test_guard_17_classifier_trained_at_384_fed_512(models, networks):
    "A size edited into the manifest differs from the weights' own; a network built otherwise differs from the manifest."
    from cxrkit.inference import check_task
    rewrite(models, lambda m: m["models"][0].update(size=[512, 512]))
    with pytest.raises(NotReady, match=r"study-f0-0123abcd.safetensors: size: the manifest says \[512, 512\], the weights \[96, 96\]"): open_models(models, here())
    with pytest.raises(ValueError, match=r"size: the manifest says \[512, 512\], the network has \[96, 96\]"): check_task(networks[0][0] | {"size": [512, 512]}, networks[1][0][networks[0][0]["run"]])


def test_guard_18_one_of_two_models_at_another_size_when_submitting(networks):
    "Each model gets the images of its own size; an image of another size is a reason, not a prediction."
    from cxrkit.inference import predict_isolated
    entries, tasks = networks
    images = pd.DataFrame({"image_id": ["a", "b"], "study_id": ["s", "t"], "height": 300, "width": 400})
    pixels = {tuple(m["size"]): {i: np.zeros(tuple(m["size"]), np.uint8) for i in "ab"} for m in entries}
    pixels[(128, 128)]["a"] = np.zeros((96, 96), np.uint8)
    _, _, bad = predict_isolated(entries, make_levels(entries)[0], tasks[0], images, pixels, 2)
    assert list(bad) == ["a"] and "(b, 1, 128, 128)" in bad["a"] and "96" in bad["a"]


def test_guard_19_folds_left_at_zero(models):
    "Trained on folds 0 and 1, submitted with fold 0 alone."
    rewrite(models, lambda m: m.update(models=[e for e in m["models"] if e["fold"] == 0]))
    with pytest.raises(NotReady, match="study: packed are folds 0, the expected score is of folds 0, 1"): open_models(models, here())


def test_guard_21_duplicate_studies_when_submitting(tmp_path):
    "An id asked for twice, and a study answered twice."
    root = write_competition(tmp_path/"data")
    sample = read_sample(root)
    pd.concat([sample, sample[:1]]).to_csv(root/"sample_submission.csv", index=False)
    with pytest.raises(SubmissionError, match="1 rows repeat an id, such as 'study0_study'"): read_sample(root)
    from cxrkit.tables import check_table, empty_table
    rows = [("x", 0, "study", "study0", label, .25) for label in SPEC.labels["study"]]
    cls = check_table(pd.DataFrame(rows, columns=["run_id", "fold", "level", "unit_id", "label", "prob"]), "cls_preds")
    with pytest.raises(ValueError, match="duplicate"): fill(Answers(sample, SPEC), pd.concat([cls, cls.assign(run_id="y")]), empty_table("box_preds"), [])


def test_guard_29_weights_of_an_earlier_epoch(models):
    "Epoch 2 under the name of epoch 7, with hashes that agree."
    from cxrkit.weights import save_weights
    save_weights(make_tasks()[0][3], models/"study-f0-0123abcd.safetensors", {"epoch": 2, "fold": 0, "metric": "siim_map", "score": .2})
    rewrite(models, lambda m: None)
    with pytest.raises(NotReady, match="study-f0-0123abcd.safetensors: epoch: the manifest says 7, the weights 2"): open_models(models, here())


def test_guard_31_decoding_takes_too_long(networks, tmp_path):
    "Files that decode so slowly that the time is up half-way: the rest keeps its defaults, and the file is complete."
    form, count, sample = stream(networks, 12, seconds=3., pause=.5, batch_size=1, chunk=1)
    assert 0 < count.late() < 12 and count.facts()["too_late"] == count.late()
    assert check_submission(save(form, tmp_path/"submission.csv", count.original_sizes()), sample, SPEC)["rows"] == 24


def test_guard_32_wheels_for_another_python():
    "Wheels of Python 3.7 on an image of 3.12; a wheel that replaces the image's numpy; pydicom too old for what was assumed."
    with pytest.raises(NotReady, match=r"here is Python 3\.12, the dataset has wheels for py37 \(Python 3\.7\)"): choose_lock({"images": {"py37": {"python": "3.7"}}}, {}, "3.12")
    with pytest.raises(NotReady, match=r"numpy: 2\.5\.0 would replace this machine's 2\.0\.2"): check_image({}, {"numpy": "2.5.0"}, {"numpy": "2.0.2"})
    with pytest.raises(NotReady, match=r"pydicom>=3\.0: assumed to be in the image, but it has 2\.4\.4"): check_image({"assumed": {"pydicom": ">=3.0"}}, {}, {"pydicom": "2.4.4"})


def test_guard_33_index_becomes_a_column_when_submitting(tmp_path):
    "The form is saved without an index; a file with one is refused."
    root = write_competition(tmp_path/"data")
    form = Answers(read_sample(root), SPEC)
    assert save(form, tmp_path/"submission.csv").read_text().startswith("id,PredictionString\n")
    form.frame().to_csv(tmp_path/"index.csv")
    with pytest.raises(SubmissionError, match="written with the index"): check_submission(tmp_path/"index.csv", form.sample, SPEC)


def test_guard_36_last_images_never_predicted(networks):
    "Seven images in batches of four: all are predicted. A network that forgets the last of each batch is found out."
    form, count, _ = stream(networks, 7)
    assert count.facts()["predicted"] == 7 and all(form.filled)
    from cxrkit.inference import predict_isolated
    entries, tasks = networks
    images = pd.DataFrame({"image_id": list("abc"), "study_id": list("abc"), "height": 300, "width": 400})
    pixels = {tuple(m["size"]): {i: np.zeros(tuple(m["size"]), np.uint8) for i in "abc"} for m in entries}
    task = tasks[0][entries[0]["run"]]
    forgetful = type("Forgetful", (), {"config": task.config, "eval": lambda self: self, "parameters": task.parameters, "predict": lambda self, batch: task.predict(batch)[:-4]})()
    with pytest.raises(ValueError, match=r"expected 3 images × 4 labels = 12 rows, got 8"): predict_isolated(entries[:1], make_levels(entries[:1])[0], {entries[0]["run"]: forgetful}, images, pixels, 3)


def test_guard_37_network_built_by_another_library(models):
    "Weights of one architecture, a header that says another: named weight by weight, before the first image."
    from cxrkit.inference import find_devices, load_models
    from cxrkit.weights import save_weights
    entry = read_manifest(models)["models"][0]
    other = make_tasks()[1][3] # one output instead of four
    config = entry["config"]
    save_weights(other.net, models/entry["file"], {"config": config, **{k: entry[k] for k in ("epoch", "fold", "metric", "score", "versions")}})
    rewrite(models, lambda m: None)
    manifest, files = open_models(models, here())
    with pytest.raises(ValueError, match="does not fit Classifier|missing|shape"): load_models(manifest["models"][:1], files, find_devices("cpu"))


def test_guard_41_extra_column_when_submitting(tmp_path):
    "A column file_path that some helper left in the table."
    root = write_competition(tmp_path/"data")
    form = Answers(read_sample(root), SPEC)
    form.frame().assign(file_path="x.dcm").to_csv(tmp_path/"extra.csv", index=False)
    with pytest.raises(SubmissionError, match="extra: 'file_path'"): check_submission(tmp_path/"extra.csv", form.sample, SPEC)
    assert list(form.frame().columns) == list(form.sample.columns)


def test_guard_43_five_folds_do_not_fit_the_limit():
    "What takes too long on the hidden set is said by the rehearsal, and given up fold by fold by the submission."
    from cxrkit.rehearse import extrapolate
    seconds, hours = extrapolate([dict(images=100, predicted=100, rate=.05, start=60., short=0, mutants=0)], 3000)
    assert seconds == 20 and hours > 9
    models = [dict(run=f"x/d-f{f}", name="d", fold=f, task="detector", level="", labels=["opacity"], views=("identity", "hflip"), metric="siim_map", oof=.5) for f in range(5)]
    pace = Pace(make_levels(models), 9*3600, clock=lambda: 0.)
    pace.note(1, {m["run"]: 2. for m in models}, .1, .1)
    assert pace.per_image(pace.levels[0])*3000 > 9*3600 and pace.choose(3000).name == "without view hflip"
    pace.note(1, {m["run"]: 4. for m in models}, .1, .1)
    assert pace.choose(3000).name == "without fold 2"
