"""PixelCNN++: what each output may see, the likelihood it gives, initialisation, sizes, checkpoints."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
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


def bits(net, x):
    """Bits per dimension of each image, (B,)."""
    return bits_per_dim(-log_prob(net, x).detach(), x[0].numel())


def test_in_a_small_image_an_output_sees_all_that_comes_before_it_and_nothing_else():
    """Sides of 8, within the 4n + 2 pixels that odd rows reach with 2 blocks."""
    x = images(1, 3, 8, 8).requires_grad_()
    net = network(x.detach().expand(4, -1, -1, -1) * torch.rand(4, 3, 8, 8), blocks=2)
    params = net(x)
    order = torch.arange(64).view(8, 8)
    for i in range(8):
        for j in range(8):
            (gradient,) = torch.autograd.grad(params[0, :, i, j].square().sum(), x, retain_graph=True)
            assert torch.equal((gradient[0] != 0).any(0), order < order[i, j]), (i, j)


@pytest.mark.parametrize("blocks", [1, 2])
def test_odd_rows_reach_only_as_far_as_the_full_resolution_blocks(blocks):
    reach, width = 4 * blocks + 2, 16
    x = images(4, 1, 8, width).requires_grad_()
    params = network(x.detach(), blocks=blocks)(x)
    columns = torch.arange(width)

    def seen(i, j):
        (gradient,) = torch.autograd.grad(params[0, :, i, j].square().sum(), x, retain_graph=True)
        return gradient[0, 0] != 0

    for i in (1, 3, 5, 7):
        assert torch.equal(seen(i, width - 1)[i], (columns >= width - 1 - reach) & (columns < width - 1)), i
        assert torch.equal(seen(i, 0)[i - 1], columns <= reach), i


def test_nothing_changes_before_a_changed_pixel():
    """The same without gradients, on a rectangle, conditioned."""
    x, h = images(4, 1, 12, 8), torch.randn(4, 5).double()
    net = network(x, h, conditioning=5)
    before = net(x, h)
    for i, j in [(0, 0), (3, 7), (6, 2), (11, 7)]:
        other = x.clone()
        other[:, :, i, j] = -other[:, :, i, j] + 0.1
        changed = (net(other, h) != before).any(1).any(0).flatten()
        assert not changed[: i * 8 + j + 1].any()
        assert changed[i * 8 + j + 1 :].any() or (i, j) == (11, 7)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("conditioning", [0, 4])
def test_every_parameter_gets_a_gradient(channels, conditioning):
    x = images(6, channels, 16, 16)
    h = torch.randn(6, conditioning).double() if conditioning else None
    net = network(x, h, conditioning=conditioning, blocks=2)
    log_prob(net, x, h).mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).all(), name


def test_the_uniform_model_costs_exactly_eight_bits_in_ragged_batches():
    from test_likelihoods import uniform_params

    x = images(7, 1, 8, 8)
    net = network(x, mixtures=256)
    with torch.no_grad():
        net.last.scale.zero_()
        net.last.bias.copy_(uniform_params(256, 1).flatten())
    torch.testing.assert_close(bits(net, x), torch.full((7,), 8.0).double(), rtol=1e-12, atol=0)


def test_a_last_row_sums_to_one_over_all_its_values():
    """A joint over pixels, not only within them: the last row of 4 pixels is free, the rows above it are fixed."""
    levels = 3
    x = images(8, 1, 4, 4, levels)
    net = network(x, levels=levels)
    free = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0]).double()] * 4)
    all_x = x[:1].repeat(len(free), 1, 1, 1)
    all_x[:, 0, 3] = free

    def conditional(x):
        """Over the last row, given the rows above: (B,)."""
        return discretized_mix_logistic_log_prob(x[:, :, 3], net(x)[:, :, 3], levels=levels)

    assert conditional(all_x).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_shifted_convolutions_against_padding_by_hand():
    """The kernel's taps are those in the module's drawing, and upsampling spreads a pixel by the same kernel."""
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    for kernel in (pixelcnn.DOWN, pixelcnn.DOWN_RIGHT):
        layer = pixelcnn.ShiftedConv(5, 4, kernel).double()
        upsample = pixelcnn.ShiftedUpsample(5, kernel).double()
        shifts = [-1, 0, 1] if kernel == (2, 3) else [-1, 0]
        for i, j in [(0, 0), (3, 4), (5, 6), (5, 0)]:
            expected = layer.bias.expand(2, -1).clone()
            for row in (0, 1):
                for k, shift in enumerate(shifts):
                    if i - 1 + row >= 0 and 0 <= j + shift < 7:
                        tap = layer.weight()[:, :, row, k]
                        expected = expected + x[:, :, i - 1 + row, j + shift] @ tap.T
            torch.testing.assert_close(layer(x)[:, :, i, j], expected)
        with torch.no_grad():
            upsample.bias.normal_()
        big = upsample(x)
        assert big.shape == (2, 5, 12, 14)
        # Pixel (i, j) reaches rows 2i and 2i + 1, and columns 2j - 1 (of the wider kernel only), 2j and 2j + 1.
        expected = upsample.bias[:, None, None].expand(2, -1, 12, 14).clone()
        for i in range(6):
            for j in range(7):
                for row in (0, 1):
                    for k, column in enumerate([-1, 0, 1] if kernel == (2, 3) else [0, 1]):
                        if 2 * j + column >= 0:
                            tap = upsample.weight()[:, :, row, k]
                            expected[:, :, 2 * i + row, 2 * j + column] += x[:, :, i, j] @ tap
        torch.testing.assert_close(big, expected)


def reference(net, x, h):
    """The paper's network with plain convolutions: every kernel padded with zeros to one centred at its output."""
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

    def elu(y):
        return torch.where(y > 0, y, y.clamp(max=0).exp() - 1)

    def both(*parts):
        y = torch.cat(parts, 1)
        return torch.cat([elu(y), elu(-y)], 1)

    def block(name, y, *short_cut):
        c = conv(name + ".inner", both(y))
        if short_cut:
            c = c + conv(name + ".short_cut", both(*short_cut))
        gates = conv(name + ".gated", both(c))
        gates = gates + torch.einsum("bk,ok->bo", h, state[name + ".condition.weight"][:, :, 0, 0])[:, :, None, None]
        f = y.shape[1]
        return y + gates[:, :f] / (1 + torch.exp(-gates[:, f:]))

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
    return conv("last", elu(ul))


@pytest.mark.parametrize(("channels", "blocks"), [(1, 2), (3, 1)])
def test_the_network_is_the_papers_written_a_second_time(channels, blocks):
    x, h = images(3, channels, 8, 12), torch.randn(3, 2, generator=torch.Generator().manual_seed(4)).double()
    net = network(x, h, blocks=blocks, conditioning=2)
    with torch.no_grad():  # away from what initialisation gives
        generator = torch.Generator().manual_seed(5)
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).double())
        torch.testing.assert_close(net(x, h), reference(net, x, h), rtol=0, atol=1e-10)


def test_weight_norm_scales_each_output():
    for layer, outputs in [
        (pixelcnn.ShiftedConv(5, 4, (2, 3)), (1, 2, 3)),
        (pixelcnn.ShiftedUpsample(5, (2, 2)), (0, 2, 3)),
    ]:
        with torch.no_grad():
            layer.scale.copy_(torch.arange(len(layer.scale)) + 1.0)
        torch.testing.assert_close(layer.weight().square().sum(outputs).sqrt(), layer.scale.detach())


@pytest.mark.parametrize("conditioning", [0, 3])
def test_initialise_gives_each_layer_mean_0_and_deviation_1(conditioning):
    x = images(8, 3, 16, 16)
    h = torch.randn(8, conditioning).double() if conditioning else None
    net = network(x, h, conditioning=conditioning, blocks=2)
    seen = {}

    def watch(name):
        return lambda layer, _, output: seen.update({name: (layer, output)})

    layers = {name: m for name, m in net.named_modules() if isinstance(m, pixelcnn._WeightNorm)}
    for name, layer in layers.items():
        layer.register_forward_hook(watch(name))
    net(x, h)
    assert set(seen) == set(layers)
    for name, (layer, output) in seen.items():
        flat = output.detach().transpose(0, 1).flatten(1)
        torch.testing.assert_close(flat.mean(1), torch.zeros_like(layer.bias), atol=1e-9, rtol=0, msg=name)
        torch.testing.assert_close(flat.std(1, correction=0), torch.full_like(layer.bias, layer.gain), msg=name)
    assert {layer.gain for layer in layers.values()} == {0.1, 1.0}


def test_initialise_on_constant_images_stays_finite():
    x = torch.ones(4, 1, 4, 4).double()
    net = network(x)
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


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_a_map_reaches_every_block_at_its_place(side):
    x, h = images(2, 1, 8, 8), torch.randn(2, 3, side, side).double()
    net = network(x, h, conditioning=3)
    maps = pixelcnn.conditioning_maps(net.settings, x.shape, h)
    for level, size in enumerate((8, 4, 2)):
        expected = F.interpolate(h, size=(size, size), mode="area")
        torch.testing.assert_close(maps[level].expand_as(expected), expected)
    before, other = net(x, h), h.clone()
    other[0, :, -1, -1] += 1
    changed = (net(x, other) != before).any(1)
    assert changed[0, -1, -1] and not changed[1].any()
    if side == 16:
        assert not changed[0, :-4].any()  # the last corner is not seen above its own quarter-size pixel
    if side == 1:
        vector = net(x, h[:, :, 0, 0])
        assert torch.equal(vector, before)


def test_conditioning_enters_every_gated_block():
    x, h = images(2, 3, 8, 8), torch.randn(2, 4).double()
    net = network(x, h, conditioning=4, blocks=2)
    before = net(x, h)
    blocks = [m for m in net.modules() if isinstance(m, pixelcnn.GatedBlock)]
    assert len(blocks) == 2 * (3 * 2 + 2 * 3 + 2)
    for block in blocks:
        kept = block.condition.weight.detach().clone()
        with torch.no_grad():
            block.condition.weight.zero_()
            assert (net(x, h) != before).any()
            block.condition.weight.copy_(kept)


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


def test_state_average_and_settings_rebuild_the_network(tmp_path):
    x = images(2, 3, 8, 8)
    net = network(x)
    torch.save({"weights": net.state_dict(), "settings": vars(net.settings)}, tmp_path / "net.pt")
    saved = torch.load(tmp_path / "net.pt", weights_only=True)
    again = PixelCNN(PixelCNNSettings(**saved["settings"])).double().eval()
    again.load_state_dict(saved["weights"])
    assert torch.equal(again(x), net(x))
    average = AveragedModel(net, use_buffers=True)
    average.update_parameters(net)
    assert torch.equal(average.module(x), net(x))
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.last.scale.zero_()
    assert not torch.equal(twin(x), net(x))


def test_training_lowers_the_cost():
    x = images(16, 1, 8, 8, 17)
    x[:, :, 4:] = x[:, :, :4]  # half of every image can be told from the other half
    net = network(x, levels=17, filters=12)
    before = bits(net, x).mean()
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(80):
        optimiser.zero_grad()
        (-log_prob(net, x).mean()).backward()
        optimiser.step()
    assert bits(net, x).mean() < before - 0.5


@pytest.mark.slow
def test_compiled_gives_the_same():
    x = images(2, 3, 8, 8)
    net = network(x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(log_prob(compiled, x), log_prob(net, x))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"channels": 2}, "2 channels"),
        ({"levels": 1}, "levels is 1"),
        ({"blocks": 0}, "blocks is 0"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"conditioning": -1}, "conditioning is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        PixelCNNSettings(**wrong)


def test_inputs_that_do_not_fit_are_refused():
    x = images(2, 1, 8, 8)
    net = network(x, torch.zeros(2, 3).double(), conditioning=3)
    for image, h, told in [
        (x[..., :6], torch.zeros(2, 3), "multiples of 4"),
        (x.expand(-1, 3, -1, -1), torch.zeros(2, 3), "this network takes"),
        (x, None, "missing"),
        (x, torch.zeros(2, 4), "it takes"),
        (x, torch.zeros(1, 3), "it takes"),
        (x, torch.zeros(2, 3, 8), "it takes"),
        (x, torch.zeros(2, 3, 3, 3), "side of 3"),
    ]:
        with pytest.raises(ValueError, match=told):
            net(image, h)
    with pytest.raises(ValueError, match="given"):
        network(x)(x, torch.zeros(2, 3))
