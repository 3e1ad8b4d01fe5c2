"""The Inception network: read without unpickling, by a file only, and hashed."""

import hashlib

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import Inception3

from smalti.errors import UserError
from smalti.evaluation.inception import FILE, Inception, load_inception, why_absent

pytest.importorskip("torch_fidelity", reason="torch-fidelity (extra `metrics`) is not installed")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights under the published names, which are torchvision's too."""
    torch.manual_seed(0)
    return Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()


@pytest.fixture(scope="module")
def network(state, tmp_path_factory) -> tuple[Inception, str]:
    file = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    save_file(state, file)
    return load_inception(str(file)), hashlib.sha256(file.read_bytes()).hexdigest()


def test_uint8_images_give_features_and_logits_without_bias(network, state):
    inception, _ = network
    features, logits = inception(torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8))
    assert features.shape == (2, inception.width)
    assert torch.allclose(logits, features @ state["fc.weight"].T, rtol=1e-4, atol=1e-4)


def test_a_figure_can_name_the_hash_of_the_file(network):
    inception, digest = network
    assert inception.hash == digest


def test_a_pickled_state_dict_is_read_and_a_pickled_program_is_not(state, tmp_path):
    class Program:
        def __reduce__(self):
            return (exec, ("raise SystemExit('it ran')",))

    torch.save(Program(), tmp_path / "program.pth")
    with pytest.raises(UserError, match="is not the Inception state dict"):
        load_inception(str(tmp_path / "program.pth"))


def test_weights_of_something_else_are_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="is not the Inception state dict") as refusal:
        load_inception(str(tmp_path / "other.pth"))
    assert "\n" not in str(refusal.value)


def test_an_earlier_download_is_used_and_its_absence_is_no_error(state, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert load_inception(None) is None
    assert FILE in why_absent()
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / FILE)
    assert isinstance(load_inception(None), Inception)
