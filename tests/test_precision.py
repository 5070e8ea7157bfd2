"""--precision bfloat16: which products round their factors, and that nothing else does."""

import pytest
import torch
from conftest import run_forked, succeeded

import vqvae
from vqvae import Linear, mlp, prepare


@pytest.fixture
def bfloat16(monkeypatch):
    monkeypatch.setattr(Linear, "bfloat16", True)


def rounded(x):
    """x with the 8 bits that bfloat16 has, as float32, by hand: half of the dropped bits' range is added first."""
    bits = x.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF).view(torch.float32)


def by_hand(net, x, between):
    """The network with layers `between` on rounded factors and results."""
    for number, layer in enumerate(net[::2]):
        factors = (rounded(x), rounded(layer.weight)) if number in between else (x, layer.weight)
        product = (factors[0].double() @ factors[1].double().T).float()
        x = (rounded(product) if number in between else product) + layer.bias
        x = x.relu() if number < len(net[::2]) - 1 else x
    return x


@pytest.mark.parametrize("hidden", [(64,), (64, 64), (64, 64, 64)])
def test_layers_between_hidden_ones_multiply_rounded_factors(bfloat16, hidden):
    net, x = mlp(5, 3, hidden), torch.randn(32, 5)
    torch.nn.init.normal_(net[-1].weight)
    between = range(1, len(hidden))
    error = (net(x) - by_hand(net, x, between)).norm() / net(x).norm()
    assert error < (1e-3 if between else 1e-6)  # sums in another order may round a product to the next number
    exact = (net(x) - by_hand(net, x, ())).norm() / net(x).norm()
    assert (exact > 1e-3) == bool(between)


def test_gradients_are_those_of_float32_within_the_rounding(bfloat16):
    net, x = mlp(5, 3, (64, 64)), torch.randn(256, 5)
    gradients = []
    for on in (False, True):
        Linear.bfloat16 = on
        gradients.append(torch.autograd.grad(net(x).square().mean(), list(net.parameters())))
    for ours, exact in zip(*gradients, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < (ours - exact).norm() <= 0.02 * exact.norm()


def test_without_such_products_a_run_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(Linear, "bfloat16", True)
    prepare("cpu", "bfloat16")
    assert not Linear.bfloat16
    assert capsys.readouterr().out == "this cpu has no products in bfloat16: they are in float32\n"


def test_with_such_products_a_run_uses_them(monkeypatch, capsys):
    monkeypatch.setattr(vqvae, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(Linear, "bfloat16", False)
    prepare("cpu", "bfloat16")
    assert Linear.bfloat16
    prepare("cpu")
    assert not Linear.bfloat16
    assert capsys.readouterr().out == ""


def test_a_run_does_not_change_its_precision(tmp_path):
    tiny = ["--vq-steps=10", "--steps=10", "--eval-episodes=1", "--final-episodes=1", "--no-compare"]
    succeeded(run_forked("--out", tmp_path, "--precision=bfloat16", *tiny))
    (folder,) = tmp_path.iterdir()
    process = run_forked("--resume", folder, "--precision=float32")
    assert process.returncode == 2
    assert "this run has begun with precision bfloat16: leave precision out." in process.stderr
