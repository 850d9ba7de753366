"""The submit notebook, run by papermill in a sandbox like Kaggle's: what it must do, and what it must refuse by name."""
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tinysubmit import make_stage, make_tasks, rewrite, with_models, write_competition

pytestmark = pytest.mark.xdist_group("submit")


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return make_stage(tmp_path_factory.mktemp("stage"), folds=2)


def scene(name, **kw):
    from cxrkit.rehearse import Scene
    return Scene(name, **{"layout": "new", **kw})


def run(stage, scene_):
    from cxrkit.rehearse import run_scene
    return run_scene(stage, scene_, 3600)


# ---- in the sandbox

def test_scored_run_on_unseen_broken_and_missing_files(stage):
    from cxrkit.rehearse import judge_scene
    row = judge_scene(stage, scene("odd", n=14, seed=1, damage=("j2k", "monochrome1", "cut", "text", "huge", "mutated"), grow=2), 3600)
    assert row["passed"], row["checks"]
    assert row["predicted"] >= 10 and 0 < row["memory_gb"] < 29 and row["network"] in ("kernel", "sockets")
    facts = json.loads((stage.out/"odd"/"working"/"submit.json").read_text())
    assert len(facts["push_id"]) == 16 and facts["mode"] == "full" and set(facts["fingerprints"]) == {"code", "wheels", "models"}
    executed = (stage.out/"odd"/"executed.ipynb").read_text()
    assert "expected siim_map 0.4000" in executed and "opacity-f1" not in executed.split("expected siim_map")[0].split("sha256")[0]


@pytest.mark.slow
def test_saved_version_predicts_a_few_in_the_old_layout(stage):
    from cxrkit.rehearse import judge_scene
    row = judge_scene(stage, scene("saved", layout="old", n=40, seed=2, rerun=False), 3600)
    assert row["passed"], row["checks"]
    assert row["predicted"] == 32 and json.loads((stage.out/"saved"/"working"/"submit.json").read_text())["mode"] == "quick"


@pytest.mark.slow
def test_too_little_time_gives_up_views_and_still_answers_everything(stage):
    from cxrkit.rehearse import judge_scene, with_clock
    first = judge_scene(stage, scene("measure", n=30, seed=3), 3600) | dict(short=0, mutants=0)
    row = judge_scene(stage, with_clock(scene("late", n=60, seed=4, short=.3, params={"batch_size": 4, "chunk_size": 4}), [first]), 3600)
    assert row["passed"], row["checks"]


@pytest.mark.slow
def test_five_hundred_mutated_files(stage):
    from cxrkit.rehearse import judge_scene
    row = judge_scene(stage, scene("mutants", n=500, seed=5, damage=("mutated",)*500), 7200)
    assert row["passed"] and row["memory_gb"] < 4, row["checks"]


def test_missing_dataset_is_named(stage):
    for kind in ("code", "wheels"):
        _, _, outcome, working = run(stage, scene(f"no {kind}", without=kind, layout="old"))
        assert outcome.code != 0 and f"no {kind} dataset" in outcome.text and not (working/"submission.csv").exists()


def earlier_epoch(folder):
    "The weights of an earlier epoch under the right name, with hashes that agree."
    from cxrkit.weights import save_weights
    name, fold, _, task = make_tasks()[0]
    save_weights(task, folder/"study-f0-0123abcd.safetensors", {"epoch": 2, "fold": 0, "metric": "siim_map", "score": .2, "versions": {}})
    rewrite(folder, lambda m: None)


def wrong_size(folder):
    "The manifest asks for another size than the network was trained at."
    rewrite(folder, lambda m: m["models"][0].update(size=[128, 128]))


def wrong_folds(folder):
    "One fold was left out, the expected score is of both."
    rewrite(folder, lambda m: m.update(models=[e for e in m["models"] if e["fold"] == 0]))


def tampered(folder):
    "One byte of a weights file is another."
    path = folder/"opacity-f1-0123abcd.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("spoil, says", [(earlier_epoch, "study-f0-0123abcd.safetensors: epoch: the manifest says 7, the weights 2"), (wrong_size, "study-f0-0123abcd.safetensors: size: the manifest says [128, 128], the weights [96, 96]"),
                                         (wrong_folds, "study: packed are folds 0, the expected score is of folds 0, 1"), (tampered, "opacity-f1-0123abcd.safetensors (expected sha256")], ids=lambda x: getattr(x, "__name__", ""))
def test_planted_wrong_model_is_refused_by_name(stage, spoil, says):
    other, folder = with_models(stage, spoil.__name__)
    spoil(folder)
    _, _, outcome, working = run(other, scene("spoilt"))
    assert outcome.code != 0 and says in outcome.text and not (working/"submission.csv").exists()


# ---- the stream against the straightforward way

def test_stream_equals_cache_then_predict(tmp_path):
    "The submission made chunk by chunk equals the one made from a cache of all images."
    from cxrkit.answers import Answers, fill, list_test, read_sample
    from cxrkit.dicom import build_cache, open_cache
    from cxrkit.inference import predict_model, predict_stream
    from cxrkit.pace import Pace, make_levels
    from cxrkit.recipe import Recipe, apply_recipe
    from cxrkit.spec import load_spec
    from cxrkit.stream import read_ahead
    from cxrkit.submit import parse_submission
    spec, root = load_spec("siim_covid19"), write_competition(tmp_path/"data", 6)
    tasks = {f"x/{name}-f{fold}": (task, level) for name, fold, level, task in make_tasks(2)}
    models = [dict(run=run, name=run.split("/")[1].split("-")[0], fold=int(run[-1]), task=t.config.task, level=level, labels=t.config.labels, size=t.config.size, views=("identity", "hflip"), metric="siim_map", oof=.5) for run, (t, level) in tasks.items()]
    test, sample, sizes = list_test(root, spec), read_sample(root), sorted({tuple(m["size"]) for m in models})
    combine = partial(apply_recipe, Recipe(power=.3), spec)
    form, reader = Answers(sample, spec), read_ahead(list(test.path), sizes, workers=2)
    for chunk in predict_stream(models, [{run: t for run, (t, _) in tasks.items()}], test, reader, sizes, combine, Pace(make_levels(models), time.monotonic()+600), 2, 3):
        fill(form, chunk.cls_preds, chunk.box_preds, chunk.images.image_id)
    reader.close()

    cached = build_cache(test.assign(patient_id=None, height=0, width=0, split="test"), tmp_path/"cache", sizes, workers=1, progress=False)
    pixels = {s: (lambda cache: {i: cache[i] for i in cached.image_id})(open_cache(tmp_path/"cache", s)) for s in sizes}
    parts = [predict_model(m, m["views"], tasks[m["run"]][0], cached, pixels, 4) for m in models]
    cls, boxes = combine(cached, pd.concat([p for p, _ in parts if "prob" in p]), pd.concat([p for p, _ in parts if "score" in p]), pd.concat([c for _, c in parts]))
    whole = spec.write(cls, boxes, sample)
    (cls_a, box_a), (cls_b, box_b) = parse_submission(form.frame(), spec), parse_submission(whole, spec)
    both = cls_a.merge(cls_b, on=["level", "unit_id", "label"])
    assert len(both) == len(cls_a) == len(cls_b) and np.abs(both.prob_x-both.prob_y).max() < 1e-4
    assert abs(len(box_a)-len(box_b)) <= .02*len(box_b)
    best = lambda t: t.sort_values("score").groupby("image_id").tail(1).set_index("image_id")[["score", "x1", "y1", "x2", "y2"]].sort_index()
    assert np.abs(best(box_a).to_numpy()-best(box_b).to_numpy()).max() < .05


def test_home_and_kaggle_run_the_same_cells():
    "One notebook, no definitions, one parameters cell; nothing in it asks where it is but the existence of /kaggle/input."
    notebook = json.loads((Path(__file__).parents[1]/"nbs"/"flow"/"50_submit.ipynb").read_text())
    code = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    assert code.count("at_kaggle, ") == 0 and code.count("(Path(kaggle)/\"input\").is_dir()") == 1 and "KAGGLE_" not in code
    before = code.index("get_ready(")
    assert "import torch" not in code[:before] and "import numpy" not in code[:before] and "import pandas" not in code[:before]
