"""The stream, the ladder and the form: order, bounds, isolation, and a valid file at any moment."""
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cxrkit.answers import Answers, fill, list_test, sample_units
from cxrkit.pace import Pace, make_levels, part_of
from cxrkit.photometry import Policy
from cxrkit.spec import load_spec
from cxrkit.stream import Background, decode_file, in_order, read_ahead
from cxrkit.workers import Limits, Lost
from tinysubmit import write_competition, write_radiograph

TASKS = '''
import ctypes, os, time
from pathlib import Path
def run(folder, task):
    number, what = task
    Path(folder, str(number)).touch()
    if what == "crash": ctypes.string_at(0)
    if what == "exit": os._exit(3)
    if what == "hang": time.sleep(1000)
    time.sleep(what)
    return number
'''


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    "Runs a list of tasks; gives answers and the folder in which each leaves a mark when it is begun."
    (tmp_path/"stream_test_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    marks = tmp_path/"marks"
    marks.mkdir()

    def run(whats, **kw):
        return in_order("stream_test_tasks:run", (str(marks),), list(enumerate(whats)), **kw), marks
    return run


def test_answers_come_in_order_whatever_takes_longer(tasks):
    rng = np.random.default_rng(0)
    answers, _ = tasks([float(s) for s in rng.uniform(0, .03, 60)], workers=3, ahead=7)
    assert list(answers) == list(range(60))


def test_dead_and_endless_tasks_are_lost_alone(tasks):
    whats = [0., "crash", 0., "exit", "hang", 0., 0., "crash", 0.]
    answers, _ = tasks(whats, workers=2, ahead=4, limits=Limits(seconds=1))
    found = list(answers)
    assert [i for i, a in enumerate(found) if isinstance(a, Lost)] == [1, 3, 4, 7]
    assert [a for a in found if not isinstance(a, Lost)] == [0, 2, 5, 6, 8]


def test_a_slow_task_holds_up_no_more_than_ahead(tasks):
    answers, marks = tasks([1.5]+[0.]*200, workers=2, ahead=10)
    begun = []
    assert next(answers) == 0
    begun.append(len(list(marks.iterdir())))
    assert list(answers) == list(range(1, 201))
    assert begun[0] <= 10


def children() -> int:
    mine = str(os.getpid())
    return sum(Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()[1] == mine for p in os.listdir("/proc") if p.isdigit() and Path(f"/proc/{p}/stat").exists())


def test_a_reader_that_is_closed_leaves_no_process(tmp_path):
    paths = [str(write_radiograph(tmp_path/f"{i}.dcm", i)) for i in range(3)]*100
    before = children()
    reader = read_ahead(paths, [(64, 64)], workers=2, ahead=4)
    assert reader.get(60).reason == ""
    reader.close()
    assert children() == before and not reader.thread.is_alive()


def test_an_exception_of_the_generator_reaches_the_reader():
    def answers():
        yield 1
        raise RuntimeError("decoder library is missing")
    reader = Background(answers(), 4)
    assert reader.get(5) == 1
    with pytest.raises(RuntimeError, match="decoder library is missing"): reader.get(5)
    reader.close()


def test_nothing_that_is_no_image_raises(tmp_path):
    (tmp_path/"empty.dcm").touch()
    (tmp_path/"folder.dcm").mkdir()
    (tmp_path/"link.dcm").symlink_to(tmp_path/"nowhere.dcm")
    for path in ("empty.dcm", "folder.dcm", "link.dcm", "absent.dcm"):
        assert decode_file([(32, 32)], Policy(), str(tmp_path/path)).reason


# ---- the ladder

MODEL = st.fixed_dictionaries({"name": st.sampled_from(["a", "b", "c", "d"]), "fold": st.integers(0, 3), "views": st.sampled_from([("identity",), ("identity", "hflip"), ("identity", "hflip", "scale0.8")]),
                               "oof": st.floats(0, 1)})
PARTS = {"a": ("detector", ""), "b": ("detector", ""), "c": ("classifier", "study"), "d": ("classifier", "image")}


def as_models(raw):
    views = {}
    return [dict(m, run=f"x/{m['name']}-f{m['fold']}", task=PARTS[m["name"]][0], level=PARTS[m["name"]][1], labels=["x"], metric="siim_map", views=views.setdefault(m["name"], m["views"]))
            for m in {(m["name"], m["fold"]): m for m in raw}.values()]


@settings(max_examples=150, deadline=None)
@given(st.lists(MODEL, min_size=1, max_size=12))
def test_every_step_answers_every_question_and_gives_something_up(raw):
    models = as_models(raw)
    by_run, parts = {m["run"]: m for m in models}, {part_of(m) for m in models}
    levels = make_levels(models)
    looks = [sum(map(len, level.views.values())) for level in levels]
    assert all(a > b for a, b in zip(looks, looks[1:]))
    for level in levels:
        assert {part_of(by_run[run]) for run in level.views} == parts
        assert all(views == tuple(by_run[run]["views"])[:len(views)] and views[0] == "identity" for run, views in level.views.items())
    assert looks[-1] == len(parts)


@settings(max_examples=150, deadline=None)
@given(st.lists(MODEL, min_size=1, max_size=8), st.floats(0, 10), st.floats(0, 10), st.integers(1, 10**5), st.floats(-10, 1e6))
def test_the_chosen_step_fits_or_is_among_the_fastest(raw, look, decode, n, left):
    models = as_models(raw)
    pace = Pace(make_levels(models), left, clock=lambda: 0.)
    pace.note(1, {m["run"]: look for m in models}, decode, 0.)
    level = pace.choose(n)
    if left <= 0: assert level is None
    else:
        fitting = [x for x in pace.levels if pace.per_image(x)*n <= left]
        assert level is fitting[0] if fitting else pace.per_image(level) <= 1.02*min(map(pace.per_image, pace.levels))+1e-12
    assert pace.chunk(64) >= 1


# ---- chunks

@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(1, 12), st.integers(1, 3))
def test_chunks_and_parts_are_whole_studies(sizes, n, parts):
    from cxrkit.inference import end_of_chunk, split_studies
    studies = np.repeat([f"s{i:02}" for i in range(len(sizes))], sizes).astype(object)
    start, seen = 0, []
    while start < len(studies):
        stop = end_of_chunk(studies, start, n)
        assert stop-start >= min(n, len(studies)-start)
        seen.append(set(studies[start:stop]))
        start = stop
    assert sum(map(len, seen)) == len(sizes)
    images = pd.DataFrame({"image_id": np.arange(len(studies)).astype(str), "study_id": studies})
    split = split_studies(images, parts)
    assert 1 <= len(split) <= parts and sum(p.study_id.nunique() for p in split) == len(sizes) and sum(map(len, split)) == len(images)


# ---- the form

def test_filling_in_portions_gives_the_file_that_writing_at_once_gives():
    spec, rng = load_spec("siim_covid19"), np.random.default_rng(0)
    images = pd.DataFrame({"image_id": [f"i{k}" for k in range(12)], "study_id": [f"s{k//2}" for k in range(12)]})
    sample = pd.DataFrame({"id": [*(f"{s}_study" for s in images.study_id.unique()), *(f"{i}_image" for i in images.image_id)], "PredictionString": ""}).sample(frac=1, random_state=0, ignore_index=True)
    from cxrkit.tables import check_table
    cls = [("study", s, x, rng.random()) for s in images.study_id.unique() for x in spec.labels["study"]]+[("image", i, "none", rng.random()) for i in images.image_id]
    cls = check_table(pd.DataFrame(cls, columns=["level", "unit_id", "label", "prob"]).assign(run_id="x", fold=0), "cls_preds")
    boxes = pd.DataFrame({"image_id": images.image_id.repeat(3), "label": "opacity", "score": rng.random(36), "x1": rng.uniform(0, 50, 36), "y1": 5., "x2": 90., "y2": rng.uniform(10, 99, 36)})
    boxes = check_table(boxes.assign(run_id="x", fold=0), "box_preds")
    whole = spec.write(cls, boxes, sample)
    form = Answers(sample, spec)
    for start in range(0, 12, 4):
        part = images[start:start+4]
        mine = cls[cls.unit_id.isin([*part.image_id, *part.study_id])]
        assert fill(form, mine, boxes[boxes.image_id.isin(part.image_id)], part.image_id) == 6
    pd.testing.assert_frame_equal(form.frame().astype(str), whole.astype(str))


@pytest.mark.parametrize("name, ids", [("siim_covid19", ["s_study", "a_image"]), ("rsna_pneumonia", ["a", "b"]), ("toy", ["s_study", "a_image"])])
def test_defaults_are_valid_for_every_competition(name, ids, tmp_path):
    from cxrkit.answers import save
    spec = load_spec(name)
    sample = pd.DataFrame({spec.id_column: ids, "PredictionString": ""})
    assert len(pd.read_csv(save(Answers(sample, spec), tmp_path/"submission.csv"))) == len(ids)


def test_detector_alone_fills_a_competition_of_boxes():
    spec = load_spec("rsna_pneumonia")
    sample = pd.DataFrame({"patientId": ["a", "b", "c"], "PredictionString": ""})
    from cxrkit.tables import check_table, empty_table
    boxes = check_table(pd.DataFrame({"image_id": ["a"], "label": ["opacity"], "score": [.5], "x1": [1.], "y1": [2.], "x2": [11.], "y2": [12.], "run_id": "x", "fold": 0}), "box_preds")
    form = Answers(sample, spec)
    assert fill(form, empty_table("cls_preds"), boxes, ["a", "b"]) == 2
    assert form.text == ["0.5 1.00 2.00 10.00 10.00", "", ""] and form.tally() == {"image": {"filled": 2, "default": 1}}


def test_layouts_of_test_folders(tmp_path):
    spec = load_spec("siim_covid19")
    write_competition(tmp_path/"siim")
    assert list_test(tmp_path/"siim", spec).study_id.tolist() == ["study0", "study0", "study1", "study2", "study3"]
    flat = tmp_path/"rsna"/"stage_2_test_images"
    flat.mkdir(parents=True)
    for name in ("b.dcm", "a.dcm", "notes.txt", ".hidden.dcm"): (flat/name).touch()
    assert list_test(tmp_path/"rsna", load_spec("rsna_pneumonia"))[["image_id", "study_id"]].to_numpy().tolist() == [["a", "a"], ["b", "b"]]
    (flat/"a.png").touch()
    with pytest.raises(ValueError, match="two files are called 'a'"): list_test(tmp_path/"rsna", spec)


def test_units_of_ids_that_contain_underscores():
    spec = load_spec("siim_covid19")
    units = sample_units(pd.DataFrame({"id": ["a_b_study", "x_image_image"], "PredictionString": ""}), spec)
    assert units.to_numpy().tolist() == [["study", "a_b"], ["image", "x_image"]]


WARM = """
import sys
from cxrkit.photometry import Policy
from cxrkit.stream import decode_file, warm_up
def compiled():
    found = {(m, n): f for m, module in list(sys.modules.items()) if m.startswith("cxrkit") for n, f in vars(module).items() if hasattr(f, "nopython_signatures")}
    return {f"{n} {s}" for (_, n), f in found.items() for s in f.nopython_signatures}
def run(path):
    before = compiled()
    answer = decode_file([(64, 64), (100, 90)], Policy(), path)
    return answer.reason, len(before), sorted(compiled()-before)
"""


def test_compiling_is_not_the_first_files_time(tmp_path, monkeypatch):
    "What every file passes through is compiled before a worker is given one: its limit is for the file alone."
    (tmp_path/"stream_test_warm.py").write_text(WARM)
    monkeypatch.syspath_prepend(str(tmp_path))
    paths = [str(write_radiograph(tmp_path/f"{k}.dcm", k, syntax)) for k, syntax in enumerate(("explicit", "jpeg-lossless", "j2k"))]
    for reason, before, new in in_order("stream_test_warm:run", (), paths, limits=Limits(seconds=600)): assert (reason, before > 2, new) == ("", True, [])
