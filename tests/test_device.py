import pytest
import torch

from hqlt.device import usable_device


@pytest.mark.parametrize("there", [True, False])
def test_cuda_where_there_is_one(there, monkeypatch):
    tried = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    monkeypatch.setattr("torch.empty", lambda *_, device: tried.append(device) or torch.tensor([]))
    usable_device()
    usable_device("cuda:3")
    assert tried == ["cuda" if there else "cpu", "cuda:3"]


@pytest.mark.parametrize("name", ["cuda:99", "cud"])
def test_what_torch_cannot_use_is_refused(name):
    with pytest.raises(ValueError, match=f"device: expected one that torch can use here, such as cpu, got '{name}': "):
        usable_device(name)
