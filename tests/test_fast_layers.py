import pytest
import torch
from torch import nn

from kdlib.models.fast_layers import FastDropout, PointwiseConv, use_fast_layers


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1000, 301), (7,)])
def test_a_random_share_is_dropped_and_the_mean_stays(share, shape):
    torch.manual_seed(0)
    values = torch.ones(shape, requires_grad=True)
    dropped = FastDropout(share)(values)
    kept = dropped[dropped != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - share)), rtol=1e-4)
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped.detach())  # the same mask, forwards and backwards
    if values.numel() > 1000:
        count = values.numel()
        assert abs(float((dropped == 0).float().mean()) - share) < 4 * (share * (1 - share) / count) ** 0.5
        halves = (dropped == 0).float().view(-1)
        pairs = halves[:-1] * halves[1:]  # neighbours are independent
        assert abs(float(pairs.mean()) - share**2) < 6 * (share**2 / count) ** 0.5


def test_nothing_is_dropped_in_evaluation_and_draws_follow_the_seed():
    layer, values = FastDropout(0.3), torch.rand(50, 50)
    assert torch.equal(layer.eval()(values), values)
    layer.train()
    torch.manual_seed(3)
    first = layer(values)
    second = layer(values)
    torch.manual_seed(3)
    assert torch.equal(layer(values), first)
    assert not torch.equal(first, second)


def test_all_layers_of_a_model_are_replaced_with_its_mode_and_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2), nn.ModuleList([nn.Dropout(0.4)])).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    use_fast_layers(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert [(type(layer), layer.p, layer.training) for layer in layers] == [
        (FastDropout, 0.2, False),
        (FastDropout, 0.4, False),
    ]
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())


def test_convolutions_compute_the_same():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"pointwise": nn.Conv1d(6, 8, 1), "wide": nn.Conv1d(6, 8, 3), "image": nn.Conv2d(1, 4, 3, stride=2, padding=1)}
    )
    inputs = {"pointwise": torch.randn(3, 6, 11), "wide": torch.randn(3, 6, 11), "image": torch.randn(3, 1, 11, 9)}

    def gradients():
        model.zero_grad()
        outputs = {name: layer(inputs[name]) for name, layer in model.items()}
        sum(output.square().sum() for output in outputs.values()).backward()
        return outputs | {name: weight.grad.clone() for name, weight in model.named_parameters()}

    expected = gradients()
    use_fast_layers(model)
    assert [type(layer) for layer in model.values()] == [PointwiseConv, nn.Conv1d, nn.Conv2d]
    for name, found in gradients().items():
        assert torch.allclose(found, expected[name], atol=1e-5, rtol=1e-5), name
