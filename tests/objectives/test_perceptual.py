"""Perceptual networks: the published distances from files of weights, memory, and what happens without weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from smalti.errors import UserError
from smalti.objectives import perceptual
from smalti.objectives.perceptual import LPIPS, ConvNeXtLogits, LPIPSAndConvNeXt, TappedVGG
from smalti.objectives.pixels import PixelObjective

WIDTHS = [4, 4, "M", 4, 4, "M", 6, 6, 6, "M", 6, 6, 6, "M", 8, 8, 8, "M"]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.mean(dim=(2, 3)))


def small_lpips() -> LPIPS:
    torch.manual_seed(0)
    return LPIPS(network=TappedVGG(make_layers(WIDTHS), [torch.rand(c) for c in (4, 4, 6, 6, 8)]))


def small_convnext() -> ConvNeXtLogits:
    torch.manual_seed(1)
    return ConvNeXtLogits(network=Classifier())


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32, requires_grad=True)


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory) -> tuple[str, nn.Module]:
    """Random VGG16 features in a file, and torchmetrics' LPIPS, with the published linear weights, on the same."""
    from torchmetrics.functional.image.lpips import _LPIPS

    torch.manual_seed(0)
    reference = _LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    names = {name: "features." + name.split(".", 1)[1] for name in reference.net.state_dict()}
    file = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save({names[name]: tensor for name, tensor in reference.net.state_dict().items()}, file)
    return str(file), reference


def test_lpips_from_a_file_is_torchmetrics_lpips(vgg16_file, pair):
    file, reference = vgg16_file
    images, reconstruction = pair
    found = LPIPS(weights=file)(images, reconstruction)
    expected = reference(images, reconstruction, normalize=True).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # theirs has its epsilon inside the root
    gradients = [torch.autograd.grad(value.sum(), reconstruction)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_weights_may_be_safetensors_without_prefix(vgg16_file, pair, tmp_path):
    file, _ = vgg16_file
    bare = {name.removeprefix("features."): tensor for name, tensor in torch.load(file).items()}
    save_file(bare, tmp_path / "vgg.safetensors")
    assert torch.equal(LPIPS(weights=str(tmp_path / "vgg.safetensors"))(*pair), LPIPS(weights=file)(*pair))


@pytest.mark.slow
def test_convnext_from_a_file_is_torchvisions(pair, tmp_path):
    from torchvision.models import ConvNeXt_Small_Weights, convnext_small

    torch.manual_seed(0)
    reference = convnext_small().eval()
    torch.save(reference.state_dict(), tmp_path / "convnext.pth")
    images, _ = pair
    transform = ConvNeXt_Small_Weights.IMAGENET1K_V1.transforms(crop_size=224, resize_size=224)
    with torch.no_grad():
        found = ConvNeXtLogits(weights=str(tmp_path / "convnext.pth")).logits(images)
        torch.testing.assert_close(found, reference(transform(images)), rtol=1e-4, atol=1e-4)


def test_distances_are_zero_for_equal_images_and_one_a_sample(pair):
    images, reconstruction = pair
    lpips = small_lpips()
    assert torch.equal(lpips(images, images), torch.zeros(2))
    each = torch.cat([lpips(a[None], b[None]) for a, b in zip(images, reconstruction, strict=True)])
    torch.testing.assert_close(lpips(images, reconstruction), each)


def test_the_combination_is_the_weighted_mean(pair):
    lpips, convnext = small_lpips(), small_convnext()
    both = LPIPSAndConvNeXt(lpips=lpips, convnext=convnext, lpips_weight=2.0, convnext_weight=0.5)
    torch.testing.assert_close(both(*pair), (2 * lpips(*pair) + 0.5 * convnext(*pair)) / 2.5)


@pytest.mark.parametrize("off", ["lpips", "convnext"])
def test_the_network_of_a_weight_zero_is_not_run(pair, off):
    both = LPIPSAndConvNeXt(lpips=small_lpips(), convnext=small_convnext(), **{f"{off}_weight": 0.0})
    getattr(both, off).forward = lambda *images: pytest.fail("it was run")
    other = both.convnext if off == "lpips" else both.lpips
    torch.testing.assert_close(both(*pair), other(*pair).expand(2))


@pytest.mark.parametrize("build", [small_lpips, small_convnext])
def test_only_the_reconstruction_has_a_graph(pair, build):
    images, reconstruction = pair[0].requires_grad_(), pair[1]
    build()(images, reconstruction).sum().backward()
    assert images.grad is None and reconstruction.grad is not None


def test_lpips_keeps_less_for_backward_than_torchmetrics(vgg16_file):
    # 122 against 152 MiB at 256 px, at equal time: one difference a tap instead of its square, root and sum as well.
    file, reference = vgg16_file
    lpips, images = LPIPS(weights=file), torch.rand(1, 3, 64, 64)
    reconstruction = torch.rand(1, 3, 64, 64, requires_grad=True)
    frozen = [*lpips._network.network.parameters(), *reference.parameters()]
    ours = bytes_kept(lambda: lpips(images, reconstruction), frozen)
    assert ours < 0.85 * bytes_kept(lambda: reference(images, reconstruction, normalize=True), frozen)


def bytes_kept(run: Callable[[], Tensor], weights: list[nn.Parameter]) -> int:
    """Bytes of the storages that the graph of a forward keeps, beside the weights."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    assert result.requires_grad  # and the graph lives until here
    weight_storages = {weight.untyped_storage().data_ptr() for weight in weights}
    return sum(size for storage, size in kept.items() if storage not in weight_storages)


def test_dead_features_have_a_finite_gradient():
    network = TappedVGG(make_layers(WIDTHS), [torch.rand(c) for c in (4, 4, 6, 6, 8)])
    for parameter in network.slices.parameters():
        parameter.data.fill_(-1.0)  # every ReLU is 0
    reconstruction = torch.rand(1, 3, 32, 32, requires_grad=True)
    LPIPS(network=network)(torch.rand(1, 3, 32, 32), reconstruction).sum().backward()
    assert reconstruction.grad.isfinite().all()


def test_networks_are_frozen_and_in_no_state_dict(pair):
    objective = PixelObjective(perceptual=LPIPSAndConvNeXt(lpips=small_lpips(), convnext=small_convnext())).train()
    assert not objective.state_dict() and not list(objective.parameters())
    network = objective.perceptual.lpips._network.network
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    objective.bfloat16()
    assert next(network.parameters()).dtype == torch.float32


def test_a_download_that_fails_says_where_to_put_the_file(monkeypatch):
    def refuse(url: str, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match=r"weights=download: .*no route to host.*vgg16-397923af\.pth"):
        LPIPS(weights="download")


def test_download_is_asked_for_by_name_with_its_checksum(monkeypatch):
    asked: list[tuple[str, object]] = []
    with torch.device("meta"):
        features = make_layers(perceptual_cfg())
    state = {f"features.{name}": torch.zeros(t.shape) for name, t in features.state_dict().items()}
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda url, **o: asked.append((url, o["check_hash"])) or state
    )
    LPIPS(weights="download")
    assert asked == [("https://download.pytorch.org/models/vgg16-397923af.pth", True)]


def perceptual_cfg() -> list[str | int]:
    from torchvision.models.vgg import cfgs

    return cfgs["D"]


def write(path, tensors) -> str:
    torch.save(tensors, path)
    return str(path)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda d: LPIPS(), ["weights=null", "objective.perceptual.lpips.weights", "'download'", "vgg16-397923af.pth"]),
        (lambda d: ConvNeXtLogits(), ["weights=null", "objective.perceptual.convnext.weights", "convnext_small"]),
        (lambda d: LPIPS(weights="/no/such.pth"), ["weights=/no/such.pth is not a file"]),
        (lambda d: LPIPS(weights=write(d / "a.pth", {"x": torch.zeros(1)})), ["has no 0.weight (64, 3, 3, 3)"]),
        (lambda d: LPIPS(weights=write(d / "a.pth", {"0.weight": torch.zeros(1)})), ["has (1,) for 0.weight"]),
        (lambda d: LPIPS(weights=write(d / "a.pth", [1])), ["holds a list, not a state dict"]),
        (lambda d: LPIPS(weights=str((d / "a.pth").write_text("not torch") and d / "a.pth")), ["cannot be read"]),
        (
            lambda d: LPIPSAndConvNeXt(
                lpips=small_lpips(), convnext=small_convnext(), lpips_weight=0, convnext_weight=0
            ),
            ["lpips_weight=0", "not both 0"],
        ),
    ],
)
def test_missing_or_wrong_weights_are_one_line_with_the_way_out(tmp_path, build, words):
    with pytest.raises(UserError) as error:
        build(tmp_path)
    assert len(str(error.value).splitlines()) == 1 and all(word in str(error.value) for word in words), error.value


def test_linear_weights_of_another_file_are_checked(vgg16_file, tmp_path):
    file = write(tmp_path / "lin.pth", {"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)})
    with pytest.raises(UserError, match=r"has no lin1\.model\.1\.weight"):
        LPIPS(weights=vgg16_file[0], linear_weights=file)


def test_a_file_of_weights_cannot_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("code of a weights file was run",))

    file = write(tmp_path / "trap.pth", {"0.weight": Trap()})
    with pytest.raises(UserError, match="cannot be read"):
        perceptual.LPIPS(weights=file)
