"Non-maximum suppression: the stand-in against a brute force and, where they load, torchvision's compiled operators."
import subprocess, sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cxrkit.vision_ops import ensure_torchvision, nms


def brute_force(boxes, scores, threshold):
    "The rule in plain Python, rounded to float32 where torchvision's kernel is."
    f, kept = np.float32, []
    for i in sorted(range(len(boxes)), key=lambda k: -scores[k]):
        a = boxes[i]
        for k in kept:
            b = boxes[k]
            w, h = max(f(0), min(a[2], b[2])-max(a[0], b[0])), max(f(0), min(a[3], b[3])-max(a[1], b[1]))
            inter = f(w*h)
            union = f(f((b[2]-b[0])*(b[3]-b[1])+f((a[2]-a[0])*(a[3]-a[1])))-inter)
            with np.errstate(all="ignore"):
                if float(inter/union) > threshold: break
        else: kept.append(i)
    return kept


def random_case(rng, n, grid):
    "Boxes with ties, duplicates and no area on a coarse grid; anything on a fine one."
    corners = rng.integers(0, grid, (n, 2, 2)) if grid else rng.random((n, 2, 2))*100
    boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1).astype(np.float32)
    boxes[::7] = boxes[:1]                                 # duplicates
    boxes[3::11, 2] = boxes[3::11, 0]                      # no area
    return boxes, (rng.integers(0, 10, n)/10).astype(np.float32)


@pytest.mark.parametrize("grid", [6, 20, 0])
@pytest.mark.parametrize("threshold", [0., .1, .3, .5, .7, 1.])
def test_equals_brute_force(grid, threshold):
    rng = np.random.default_rng(hash((grid, threshold)) % 2**32)
    for _ in range(8):
        boxes, scores = random_case(rng, int(rng.integers(0, 90)), grid)
        assert nms(torch.tensor(boxes), torch.tensor(scores), threshold).tolist() == brute_force(boxes, scores, threshold)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32-1), st.integers(0, 40), st.sampled_from([0., .25, .5, 1/3, .9]))
def test_properties(seed, n, threshold):
    boxes, scores = random_case(np.random.default_rng(seed), n, 8)
    kept = nms(torch.tensor(boxes), torch.tensor(scores), threshold)
    assert len(set(kept.tolist())) == len(kept) and (n == 0 or len(kept) > 0)
    assert (np.diff(scores[kept.numpy()]) <= 0).all()                                 # highest first
    again = nms(torch.tensor(boxes)[kept], torch.tensor(scores)[kept], threshold)
    assert again.tolist() == list(range(len(kept)))                                   # nothing more to remove


@pytest.mark.parametrize("n", [3000])
def test_thousands_against_torchvision_or_brute_force(n):
    rng = np.random.default_rng(1)
    for grid in (0, 60):
        boxes, scores = random_case(rng, n, grid)
        if grid == 0: scores = rng.random(n).astype(np.float32)
        ours = nms(torch.tensor(boxes), torch.tensor(scores), .5).tolist()
        if ensure_torchvision() == "compiled":
            assert ours == torch.ops.torchvision.nms(torch.tensor(boxes), torch.tensor(scores), .5).tolist()
        else:                                              # the quadratic rule, as one matrix
            order = np.argsort(-scores, kind="stable")
            b = boxes[order]; area = (b[:, 2]-b[:, 0])*(b[:, 3]-b[:, 1]); alive = np.ones(n, bool); kept = []
            for i in range(n):
                if not alive[i]: continue
                kept.append(int(order[i]))
                inter = np.maximum(np.minimum(b[i, 2:], b[:, 2:])-np.maximum(b[i, :2], b[:, :2]), 0).prod(1)
                with np.errstate(all="ignore"): alive[i+1:] &= ~((inter/(area[i]+area-inter)).astype(np.float64)[i+1:] > .5)
            assert ours == kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions(dtype):
    boxes, scores = random_case(np.random.default_rng(2), 60, 10)                     # small whole numbers are exact in all of them
    assert nms(torch.tensor(boxes).to(dtype), torch.tensor(scores).to(dtype), .5).tolist() == nms(torch.tensor(boxes), torch.tensor(scores), .5).tolist()


def test_empty_and_wrong_shapes():
    assert nms(torch.zeros(0, 4), torch.zeros(0), .5).shape == (0,)
    with pytest.raises(ValueError, match=r"expected boxes \(n,4\) and scores \(n,\), got \(3, 4\) and \(2,\)"): nms(torch.zeros(3, 4), torch.zeros(2), .5)


def test_torchvision_works_whichever_way():
    where = ensure_torchvision()
    assert where in ("compiled", "fallback") and ensure_torchvision() == where
    from torchvision.ops import batched_nms, nms as registered
    boxes, scores = random_case(np.random.default_rng(3), 80, 12)
    assert registered(torch.tensor(boxes), torch.tensor(scores), .5).tolist() == brute_force(boxes, scores, .5)
    labels = torch.arange(80) % 2
    kept = set(batched_nms(torch.tensor(boxes), torch.tensor(scores), labels, .5).tolist())
    assert kept == {i for c in (0, 1) for i in np.flatnonzero(labels == c)[brute_force(boxes[labels == c], scores[labels == c], .5)]}
    scripted = torch.jit.script(registered)                                          # effdet scripts its post-processing
    assert scripted(torch.tensor(boxes), torch.tensor(scores), .5).tolist() == brute_force(boxes, scores, .5)


def test_compiled_operators_win_where_they_load():
    "A process in which torchvision imports by itself must not get the stand-in."
    code = ("import torch\ntry: import torchvision; loads = True\nexcept RuntimeError: loads = False\n"
            "from cxrkit.vision_ops import ensure_torchvision, register_nms\n"
            "where = ensure_torchvision()\nassert (where == 'compiled') == loads, where\n"
            "assert bool(register_nms.cache_info().currsize) == (not loads)\nimport timm")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_import_errors_pass_through(monkeypatch):
    "Only the one failure that can be mended is mended."
    monkeypatch.setitem(sys.modules, "torchvision", None)                            # import torchvision → ImportError
    with pytest.raises(ImportError): ensure_torchvision()
