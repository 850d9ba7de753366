"Weights: strict loading, broken files, all-or-nothing writing."
import errno

import pytest
import torch

from cxrkit import weights
from cxrkit.weights import PREFIXES, load_meta, load_state, load_weights, read_state, save_weights


def net(width=4): return torch.nn.Sequential(torch.nn.Conv2d(1, width, 3), torch.nn.BatchNorm2d(width), torch.nn.Linear(width, 2))


@pytest.mark.parametrize("wrapper", [*PREFIXES, "module.model.model.", "_orig_mod.net.", "ema.module."])
def test_wrappers_are_taken_off(wrapper):
    old, new = net(), net()
    assert load_state(new, {wrapper+k: v for k, v in old.state_dict().items()}) == []
    for a, b in zip(old.state_dict().values(), new.state_dict().values()): assert torch.equal(a, b)


def test_wrapped_target():
    old, new = net(), torch.nn.ModuleDict({"model": net()})
    load_state(new, old.state_dict())
    assert torch.equal(new["model"][0].weight, old[0].weight)


def test_effdet_anchors_in_a_file_are_not_weights():
    old = {**net().state_dict(), "anchors.boxes": torch.zeros(9, 4), "module.anchors.boxes": torch.zeros(9, 4)}
    load_state(net(), old)


def test_two_models_in_one_file_are_refused():
    state = net().state_dict()
    with pytest.raises(ValueError, match="the file holds two models"): load_state(net(), {**state, **{f"ema.{k}": v for k, v in state.items()}})


def test_names_of_what_does_not_fit():
    state = net().state_dict()
    state["0.wieght"] = state.pop("0.weight")
    with pytest.raises(ValueError, match=r"epoch9.pth does not fit Sequential .* 1 missing: 0.weight \(near: 0.wieght\); 1 unexpected: 0.wieght"): load_state(net(), state, source="epoch9.pth")
    many = {f"extra{i}.weight": torch.zeros(1) for i in range(20)}
    with pytest.raises(ValueError, match="20 unexpected: .* and 16 more"): load_state(net(), {**net().state_dict(), **many})


def test_refused_load_changes_nothing():
    new = net(); before = {k: v.clone() for k, v in new.state_dict().items()}
    with pytest.raises(ValueError): load_state(new, net(5).state_dict())
    for k, v in new.state_dict().items(): assert torch.equal(v, before[k])


def test_optional_is_by_name():
    old = {k: v for k, v in net().state_dict().items() if not k.startswith("2.")}
    assert load_state(net(), old, optional=("2.",)) == ["2.weight", "2.bias"]
    with pytest.raises(ValueError, match="2 missing: 2.weight, 2.bias"): load_state(net(), old, optional=("1.",))


def test_same_bytes_for_same_weights(tmp_path):
    one = net()
    first, second = (save_weights(one, tmp_path/f"{i}.safetensors", {"b": 1, "a": [1, 2], "c": {"z": 1, "y": 2}}) for i in range(2))
    assert first == second == weights.file_sha256(tmp_path/"0.safetensors")
    assert load_meta(tmp_path/"0.safetensors") == {"b": 1, "a": [1, 2], "c": {"z": 1, "y": 2}}


def test_odd_memory_layouts_are_saved(tmp_path):
    one = net().to(memory_format=torch.channels_last)
    one.tied = one[2]                                        # shared weights, saved under both names
    save_weights(one, tmp_path/"a.safetensors")
    assert torch.equal(read_state(tmp_path/"a.safetensors")["0.weight"], one[0].weight)


@pytest.mark.parametrize("cut", [0, 5, 100, -10])
def test_truncated_files(tmp_path, cut):
    save_weights(net(), tmp_path/"a.safetensors")
    data = (tmp_path/"a.safetensors").read_bytes()
    (tmp_path/"cut.safetensors").write_bytes(data[:cut] if cut >= 0 else data[:cut])
    with pytest.raises(ValueError, match="cut.safetensors is not a complete safetensors file"): read_state(tmp_path/"cut.safetensors")


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path/"a.safetensors"
    save_weights(net(), path, {"epoch": 1})
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"): save_weights(net(), path, {"epoch": 2})
    assert load_meta(path) == {"epoch": 1} and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s, "optimizer": {}}, lambda s: {"state_dict": {}, "model_ema": s}])
def test_files_of_others(tmp_path, wrap):
    one = net()
    torch.save(wrap(dict(one.state_dict())), tmp_path/"other.pth")
    load_state(net(), read_state(tmp_path/"other.pth"))


def test_pickles_with_code_are_refused(tmp_path):
    torch.save(net(), tmp_path/"whole_model.pth")
    with pytest.raises(ValueError, match="cannot be read without running code"): read_state(tmp_path/"whole_model.pth")
    torch.save({"epoch": 3}, tmp_path/"nothing.pth")
    with pytest.raises(ValueError, match="holds no tensors"): read_state(tmp_path/"nothing.pth")
    with pytest.raises(FileNotFoundError, match="no file .*missing.pth"): read_state(tmp_path/"missing.pth")
    with pytest.raises(FileNotFoundError, match="no file"): load_weights(net(), tmp_path/"missing.safetensors")
