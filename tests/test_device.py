import pytest
import torch

from hqlt.device import usable_device


@pytest.mark.parametrize("available", [True, False])
def test_cuda_is_the_default_if_available(available, monkeypatch):
    tried = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    monkeypatch.setattr("torch.empty", lambda *_, device: tried.append(device) or torch.tensor([]))
    usable_device()
    usable_device("cuda:3")
    assert tried == ["cuda" if available else "cpu", "cuda:3"]


@pytest.mark.parametrize("name", ["cuda:99", "cud"])
def test_an_unusable_device_is_rejected(name):
    with pytest.raises(ValueError, match=f"device: expected one that torch can use here, such as cpu, got '{name}': "):
        usable_device(name)
