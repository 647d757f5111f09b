"""PixelCNN++: what each output may see, the network written a second time, likelihood, initialisation, sizes."""

import copy
import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paperlib.nn import pixelcnn
from paperlib.nn.likelihoods import bits_per_dim, discretized_mix_logistic_log_prob
from paperlib.nn.pixelcnn import PixelCNN, PixelCNNSettings, initialise, log_prob

TINY = {"blocks": 1, "filters": 6, "mixtures": 3, "dropout": 0.0}


def images(count, channels, height, width, levels=256, seed=1):
    grey = torch.randint(levels, (count, channels, height, width), generator=torch.Generator().manual_seed(seed))
    return grey.double() * 2 / (levels - 1) - 1


def network(x, h=None, **settings):
    """In float64, initialised on x, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = PixelCNN(PixelCNNSettings(**{**TINY, "channels": x.shape[1], **settings})).double()
        initialise(net.eval(), x, h)  # on a few images dropout would leave no statistics
    return net


def seen(params, x, i, j):
    """Which pixels of the first image the output at (i, j) sees, (H, W)."""
    (gradient,) = torch.autograd.grad(params[0, :, i, j].square().sum(), x, retain_graph=True)
    return (gradient[0] != 0).any(0)


def test_in_a_small_image_an_output_sees_all_that_comes_before_it_and_nothing_else():
    """Sides of 8, within the 4n + 2 pixels that odd rows reach with 2 blocks."""
    x = images(1, 3, 8, 8).requires_grad_()
    net = network(x.detach().expand(4, -1, -1, -1) * torch.rand(4, 3, 8, 8), blocks=2)
    params, order = net(x), torch.arange(64).view(8, 8)
    for i, j in itertools.product(range(8), repeat=2):
        assert torch.equal(seen(params, x, i, j), order < order[i, j]), (i, j)


@pytest.mark.parametrize("blocks", [1, 2])
def test_odd_rows_reach_only_as_far_as_the_full_resolution_blocks(blocks):
    reach, width = 4 * blocks + 2, 16
    x = images(4, 1, 8, width).requires_grad_()
    params = network(x.detach(), blocks=blocks)(x)
    columns = torch.arange(width)
    for i in (1, 3, 5, 7):
        left = seen(params, x, i, width - 1)[i]
        assert torch.equal(left, (columns >= width - 1 - reach) & (columns < width - 1)), i
        assert torch.equal(seen(params, x, i, 0)[i - 1], columns <= reach), i


@pytest.mark.parametrize("channels", [1, 3])
def test_a_uniform_model_of_three_levels_costs_their_logarithm(channels):
    """One logistic around 0 whose F(-1/2) is a third, in batches of any size."""
    x = images(7, channels, 8, 8, levels=3)
    net = network(x, mixtures=1, levels=3)
    with torch.no_grad():
        net.last.scale.zero_()
        net.last.bias.zero_()
        net.last.bias[2 :: 2 if channels == 1 else 3] = math.log(0.5 / math.log(2))  # the log-scales
    bits = bits_per_dim(-log_prob(net, x).detach(), x[0].numel())
    torch.testing.assert_close(bits, torch.full((7,), math.log2(3), dtype=x.dtype), rtol=1e-12, atol=0)


def test_a_last_row_sums_to_one_over_all_its_values():
    """A joint over pixels, not only within them: the last row of 4 pixels is free, the rows above it are fixed."""
    net = network(images(8, 1, 4, 4, 3), levels=3)
    x = images(1, 1, 4, 4, 3).repeat(3**4, 1, 1, 1)
    x[:, 0, 3] = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0]).double()] * 4)
    log_p = discretized_mix_logistic_log_prob(x[:, :, 3], net(x)[:, :, 3], levels=3)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)


def reference(net, x, h):
    """The paper's network in plain convolutions, with kernels padded to ones centred at the output; h is a map."""
    state, n = {name: p.detach() for name, p in net.named_parameters()}, net.settings.blocks

    def kernel(name, out_dim=0):
        direction, others = state[name + ".direction"], [k for k in range(4) if k != out_dim]
        size = [-1 if k == out_dim else 1 for k in range(4)]
        return direction / direction.pow(2).sum(others, keepdim=True).sqrt() * state[name + ".scale"].view(size)

    def conv(name, y, stride=1):
        w = kernel(name)
        if w.shape[2:] != (1, 1):
            w = F.pad(w, (0, 3 - w.shape[3], 0, 1))
        return F.conv2d(y, w, state[name + ".bias"], stride, padding=w.shape[2] // 2)

    def double(name, y):
        spread = torch.zeros(*y.shape[:2], 2 * y.shape[2], 2 * y.shape[3]).double()
        spread[:, :, ::2, ::2] = y
        w = kernel(name, 1).transpose(0, 1).flip(2, 3)
        return F.conv2d(spread, F.pad(w, (0, 3 - w.shape[3], 0, 1)), state[name + ".bias"], padding=1)

    def both(*parts):
        y = torch.cat(parts, 1)
        return torch.cat([F.elu(y), F.elu(-y)], 1)

    def block(name, y, *short_cut):
        c = conv(name + ".inner", both(y))
        if short_cut:
            c = c + conv(name + ".short_cut", both(*short_cut))
        resized = F.interpolate(h, size=y.shape[2:], mode="area")
        condition = torch.einsum("bkij,ok->boij", resized, state[name + ".condition.weight"][:, :, 0, 0])
        values, gates = (conv(name + ".gated", both(c)) + condition).chunk(2, 1)
        return y + values / (1 + torch.exp(-gates))

    # The image: kernels centred at the output in 5 x 3, with a bias wherever the kernel's last pixel is inside.
    pixels, (height, width) = torch.cat([x, torch.ones(len(x), 1, *x.shape[2:]).double()], 1), x.shape[2:]
    inside_row, inside_column = (torch.arange(height) > 0)[:, None].double(), (torch.arange(width) > 0).double()

    def first(name, pad, inside):
        y = F.conv2d(pixels, F.pad(kernel(name), pad), padding=(2, 1))
        return (y + state[name + ".bias"][:, None, None]) * inside

    u = first("first_u", (0, 0, 0, 3), inside_row)
    ul = first("first_above", (0, 0, 1, 3), inside_row) + first("first_left", (0, 2, 1, 2), inside_column)
    ups = []
    for level in range(3):
        if level:
            u, ul = conv(f"halve_u.{level - 1}", u, 2), conv(f"halve_ul.{level - 1}", ul, 2)
        ups.append((u, ul))
        for k in range(n):
            u = block(f"up_u.{level}.{k}", u)
            ul = block(f"up_ul.{level}.{k}", ul, u)
            ups.append((u, ul))
    ups.pop()
    for level in (2, 1, 0):
        for k in range(n if level == 2 else n + 1):
            from_u, from_ul = ups.pop()
            u = block(f"down_u.{level}.{k}", u, from_u)
            ul = block(f"down_ul.{level}.{k}", ul, u, from_ul)
        if level:
            u, ul = double(f"double_u.{level - 1}", u), double(f"double_ul.{level - 1}", ul)
    assert not ups
    return conv("last", F.elu(ul))


@pytest.mark.parametrize(
    ("channels", "blocks", "h_shape"),
    [(1, 2, (2,)), (3, 1, (2, 1, 1)), (1, 1, (2, 2, 3)), (3, 1, (2, 8, 6)), (1, 2, (2, 16, 24))],
)
def test_the_network_is_the_papers_written_a_second_time(channels, blocks, h_shape):
    """With h a vector, and a map that is repeated or averaged at each resolution."""
    generator = torch.Generator().manual_seed(4)
    x, h = images(3, channels, 8, 12), torch.randn(3, *h_shape, generator=generator).double()
    net = network(x, h, blocks=blocks, conditioning=2)
    with torch.no_grad():  # away from what initialisation gives
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).double())
        expected = reference(net, x, h if h.ndim == 4 else h[:, :, None, None])
        torch.testing.assert_close(net(x, h), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("conditioning", [0, 3])
def test_initialise_gives_each_layer_mean_0_and_std_1(conditioning):
    """0.1 before the gates."""
    x, outputs = images(8, 3, 16, 16), {}
    h = torch.randn(8, conditioning).double() if conditioning else None
    net = network(x, h, conditioning=conditioning, blocks=2)
    layers = [m for m in net.modules() if isinstance(m, pixelcnn._WeightNorm)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, _, output: outputs.update({layer: output.detach()}))
    net(x, h)
    for layer in layers:
        flat = outputs[layer].transpose(0, 1).flatten(1)
        torch.testing.assert_close(flat.mean(1), torch.zeros_like(layer.bias), atol=1e-9, rtol=0)
        torch.testing.assert_close(flat.std(1, correction=0), torch.full_like(layer.bias, layer.gain))
    gates = [block.gated for block in net.modules() if isinstance(block, pixelcnn.GatedBlock)]
    assert all(layer.gain == (0.1 if layer in gates else 1.0) for layer in layers)


def test_initialise_on_constant_images_stays_finite_and_leaves_no_hooks():
    net = network(x := torch.ones(4, 1, 4, 4).double())
    assert all(p.isfinite().all() and p.abs().max() < 1e4 for p in net.parameters())
    assert log_prob(net, x).isfinite().all()
    assert not any(m._forward_hooks for m in net.modules())


def test_initialise_refuses_what_gives_no_statistics_and_changes_nothing():
    x, h = images(4, 1, 8, 8), torch.randn(4, 3).double()
    net = PixelCNN(PixelCNNSettings(**TINY, channels=1, conditioning=3)).double()
    before = copy.deepcopy(net.state_dict())
    bad_x, bad_h = x.clone(), h.clone()
    bad_x[1, 0, 2, 3], bad_h[2, 1] = math.inf, math.nan  # the second is met after some layers are set
    for images_, h_, told in [(x[:0], h[:0], "no images"), (bad_x, h, "not finite"), (x, bad_h, "not finite")]:
        with pytest.raises(ValueError, match=told):
            initialise(net, images_, h_)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert not any(m._forward_hooks for m in net.modules())


def test_dropout_is_in_training_only():
    x = images(2, 1, 8, 8)
    net = network(x, dropout=0.5)
    assert torch.equal(net(x), net(x))
    net.train()
    assert not torch.equal(net(x), net(x))


@pytest.mark.parametrize(("blocks", "filters", "millions", "gflop"), [(2, 40, 1.5, 4.2), (5, 80, 13.4, 36.6)])
def test_size_and_arithmetic(blocks, filters, millions, gflop):
    """The figures known for CIFAR-10: parameters, and operations of one image in one training step."""
    with torch.device("meta"):
        net = PixelCNN(PixelCNNSettings(blocks=blocks, filters=filters))
        x = torch.rand(1, 3, 32, 32)
        with FlopCounterMode(display=False) as counter:
            net(x).sum().backward()
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, rel=0.01)


@pytest.mark.slow
def test_compiled_gives_the_same():
    x = images(2, 3, 8, 8)
    net = network(x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(log_prob(compiled, x), log_prob(net, x))


def test_settings_that_make_no_sense_are_refused():
    for name, value in {"channels": 2, "levels": 1, "blocks": 0, "dropout": 1.0, "conditioning": -1}.items():
        with pytest.raises(ValueError, match=f"{name} is {value}|{value} {name}"):
            PixelCNNSettings(**{name: value})


def test_inputs_that_do_not_fit_are_refused():
    x, h = images(2, 1, 8, 8), torch.zeros(2, 3)
    net, without = network(x, h.double(), conditioning=3), network(x)
    for model, image, code, told in [
        (net, x[..., :6], h, "multiples of 4"),
        (net, x.expand(-1, 3, -1, -1), h, "this network takes"),
        (net, x, None, "missing"),
        (net, x, torch.zeros(2, 4), "it takes"),
        (net, x, h[:1], "it takes"),
        (net, x, torch.zeros(2, 3, 8), "it takes"),
        (net, x, torch.zeros(2, 3, 3, 3), "side of 3"),
        (without, x, h, "given"),
    ]:
        with pytest.raises(ValueError, match=told):
            model(image, code)
