import pytest
import torch

from dit.weights.ema import EMA


def test_the_average_is_the_recurrence():
    layer = torch.nn.Linear(3, 2)
    ema = EMA(layer, decay=0.9)
    expected = layer.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3))
        ema.update(step)
        expected = 0.9 * expected + 0.1 * layer.weight.detach()
    torch.testing.assert_close(ema.state_dict()["weight"], expected)


def test_warm_up_shortens_the_memory():
    layer = torch.nn.Linear(1, 1)
    ema = EMA(layer, decay=0.9999, warmup=True)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    ema.update(1)
    torch.testing.assert_close(ema.state_dict()["weight"], before + 1 - 2 / 11)


def test_applied_lends_the_average_and_gives_the_weights_back():
    layer = torch.nn.Linear(3, 2)
    ema = EMA(layer, decay=0.5)
    with torch.no_grad():
        layer.weight.add_(1)
    ema.update(1)
    weight = layer.weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(layer.weight, weight - 0.5)
    assert torch.equal(layer.weight, weight)
    with pytest.raises(RuntimeError), ema.applied():
        raise RuntimeError
    assert torch.equal(layer.weight, weight)


def test_the_average_is_kept_in_float32():
    layer = torch.nn.Linear(3, 2).bfloat16()
    ema = EMA(layer, decay=0.9999)
    ema.update(1)
    assert all(value.dtype == torch.float32 for value in ema.state_dict().values())


def test_bad_decay_is_refused():
    with pytest.raises(ValueError, match=r"ema\.decay=1\.0"):
        EMA(torch.nn.Linear(1, 1), decay=1.0)
