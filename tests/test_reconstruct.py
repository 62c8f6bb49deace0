"""`reconstruct` against least squares in numpy, channel by channel, on nets that are walked by hand."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cram_kernels import NM, CrAM, TopK, frozen_batchnorm, prune, reconstruct, tune_batchnorm

DOUBLE = {"dtype": torch.float64}


def ridge(x, y, w, intercept):
    """x [n, in], y [n], w [in]: the new w (float64 numpy) and intercept, of the augmented system in numpy's lstsq."""
    kept = w != 0
    mean_x, mean_y = (x.mean(0), y.mean()) if intercept else (np.zeros(x.shape[1]), 0.0)
    x0, y0 = x - mean_x, y - mean_y
    e = 1e-3 * np.mean(np.sum(x0**2, 0))
    new = np.zeros_like(w)
    if kept.any():
        rows = np.concatenate([x0[:, kept], math.sqrt(e) * np.eye(int(kept.sum()))])
        new[kept] = np.linalg.lstsq(rows, np.concatenate([y0, math.sqrt(e) * w[kept]]), rcond=None)[0]
    return new, float(mean_y - mean_x @ new)


def windows(conv, x):
    """Inputs of each output position, by plain indexing: [n, groups, positions, channels / groups * kernel elements]."""
    pad = [p for pair in zip(conv.padding, conv.padding, strict=True) for p in pair] if not isinstance(conv.padding, str) else None
    if pad is None:
        total = [(conv.padding == "same") * d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        pad = [p for t in total for p in (t // 2, t - t // 2)]
    modes = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}
    x = np.pad(x, [(0, 0), (0, 0), *zip(pad[::2], pad[1::2], strict=True)], modes[conv.padding_mode])
    sizes = zip(x.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
    starts = [range(0, n - d * (k - 1), s) for n, k, s, d in sizes]
    positions = []
    for start in itertools.product(*starts):
        window = x[
            (slice(None), slice(None), *(slice(b, b + d * k, d) for b, k, d in zip(start, conv.kernel_size, conv.dilation, strict=True)))
        ]
        positions.append(window.reshape(len(x), conv.groups, -1))
    return np.stack(positions, 2)


def fitted(layer, original, x, x_dense, norm=None):
    """The weight and intercept that `layer` should get: x its input, x_dense that of `original`."""
    intercept = layer.bias is not None or norm is not None
    y = original(x_dense).detach().double().numpy()
    w = layer.weight.detach().double().numpy()
    new, offsets = np.zeros_like(w), []
    if isinstance(layer, nn.Linear):
        inputs = x.double().numpy().reshape(1, -1, layer.in_features)
        outputs = y.reshape(-1, layer.out_features).T
    else:
        inputs = windows(layer, x.double().numpy())
        inputs = np.moveaxis(inputs, 1, 0).reshape(layer.groups, -1, inputs.shape[-1])
        outputs = np.moveaxis(y, 1, 0).reshape(layer.out_channels, -1)
    for channel, target in enumerate(outputs):
        group = channel * len(inputs) // len(outputs)
        row, offset = ridge(inputs[group], target, w[channel].reshape(-1), intercept)
        new[channel] = row.reshape(w[channel].shape)
        offsets.append(offset)
    return torch.from_numpy(new), torch.tensor(offsets, **DOUBLE)


@torch.no_grad()
def walked(model, dense, x):
    """A copy of a Sequential that is repaired from the first layer to the last."""
    model, dense = copy.deepcopy(model).eval(), copy.deepcopy(dense).eval()
    layers, originals = list(model), list(dense)
    for layer, original in zip(layers, originals, strict=True):
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.load_state_dict(original.state_dict())
    x_dense = x
    for i, (layer, original) in enumerate(zip(layers, originals, strict=True)):
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            norm = next(iter(layers[i + 1 : i + 2]), None)
            norm = norm if isinstance(norm, nn.modules.batchnorm._BatchNorm) and layer.bias is None else None
            w, offset = fitted(layer, original, x, x_dense, norm)
            layer.weight.copy_(w)
            if layer.bias is not None:
                layer.bias.copy_(offset)
            elif norm is not None:
                norm.running_mean -= offset
        x, x_dense = layer(x), original(x_dense)
    return model


def pruned(model, pattern=None):
    """The model with a part of its weights at zero, in train mode, with batch norms that have seen data, and the dense one."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    dense = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        if p.dim() > 1:
            p.data *= torch.rand(p.shape, generator=generator) > 0.5
    return model, dense


def close(a, b, tolerance=1e-8):
    for (name, s), t in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(s, t, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def double_conv(kind, *args, **kwargs):
    return kind(*args, **kwargs, **DOUBLE)


NETS = {
    "linear": lambda: ((7,), [nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 6, bias=False), nn.Tanh(), nn.Linear(6, 4)]),
    "linear, norm": lambda: ((7,), [nn.Linear(7, 9, bias=False), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5), nn.BatchNorm1d(5)]),
    "tokens": lambda: ((5, 7), [nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 6)]),
    "conv1d": lambda: (
        (4, 11),
        [nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm1d(6), nn.ReLU(True), nn.Conv1d(6, 4, 2)],
    ),
    "conv2d": lambda: (
        (4, 7, 6),
        [nn.Conv2d(4, 8, (3, 2), (1, 2), (1, 0), bias=False), nn.ReLU(True), nn.Conv2d(8, 6, 3, dilation=2, padding=2, groups=2)],
    ),
    "conv2d, norms": lambda: (
        (3, 6, 6),
        [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)],
    ),
    "padding": lambda: (
        (2, 6, 6),
        [
            nn.Conv2d(2, 4, 3, padding=(2, 1), padding_mode="circular"),
            nn.Conv2d(4, 4, (2, 3), padding="same", bias=False),
            nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(3, 3, 3, padding="valid", padding_mode="replicate"),
        ],
    ),
    "conv3d": lambda: (
        (2, 4, 5, 4),
        [nn.Conv3d(2, 4, (2, 3, 1), (1, 2, 1), (0, 1, 0), groups=2, bias=False), nn.BatchNorm3d(4), nn.Conv3d(4, 2, 2)],
    ),
    "not pruned": lambda: ((7,), [nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 4)]),
}


@pytest.mark.parametrize("name", NETS)
def test_against_least_squares_in_numpy(name):
    torch.manual_seed(0)
    shape, layers = NETS[name]()
    model, dense = pruned(nn.Sequential(*layers).double())
    if name == "not pruned":
        model.load_state_dict({k: v + 0.1 for k, v in dense.state_dict().items()})
    x = torch.randn(24, *shape, **DOUBLE)
    want, zeros = walked(model, dense, x), [p == 0 for p in model.parameters() if p.dim() > 1]
    before = copy.deepcopy(dense.state_dict())
    report = reconstruct(model, dense, [x[:10], (x[10:17], "label"), {"input": x[17:]}], samples=24)
    close(model, want)
    assert all(bool((p == 0)[z].all()) for p, z in zip([p for p in model.parameters() if p.dim() > 1], zeros, strict=True))
    assert all(torch.equal(a, before[k]) for k, a in dense.state_dict().items())
    fits = [m for m in model if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    assert [layer.name for layer in report.layers] == [str(list(model).index(m)) for m in fits]
    assert all(layer.after <= layer.before for layer in report.layers) and report.samples == 24


def test_errors_of_the_report():
    """Before and after, as computed from outputs."""
    torch.manual_seed(1)
    model, dense = pruned(nn.Sequential(nn.Linear(8, 6)))
    x = torch.randn(40, 8)

    def error():
        y = dense(x)
        return float((model(x) - y).detach().square().sum() / (y - y.mean(0)).detach().square().sum())

    before = error()
    report = reconstruct(model, dense, [x])
    assert report.layers[0].before == pytest.approx(before, rel=1e-4) and report.layers[0].after == pytest.approx(error(), rel=1e-4)
    assert report.layers[0].rows == report.samples == 40 and report.memory == 8 * 8 * (8 + 6)
    assert json.loads(report.to_json())["layers"][0]["after"] == report.layers[0].after
    assert f"{report.layers[0].before:.2%}" in str(report) and str(report).splitlines()[0].split()[:2] == ["layer", "rows"]


def test_large_means_cost_no_digits():
    torch.manual_seed(0)
    model, dense = pruned(nn.Sequential(nn.Linear(6, 5)).double())
    x = torch.randn(50, 6, **DOUBLE)
    other = copy.deepcopy(model)
    reconstruct(model, dense, [x + 1e6])
    reconstruct(other, dense, [x])
    torch.testing.assert_close(model[0].weight, other[0].weight, rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    def __init__(self, cross, **options):
        super().__init__()
        self.attention, self.cross = nn.MultiheadAttention(8, 2, **options), cross

    def forward(self, x):
        if self.cross:
            return self.attention(x[..., :8], key=x[..., 8:14], value=x[..., 14:], need_weights=False)[0]
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@torch.no_grad()
def test_projections_of_attention(cross, bias, batch_first):
    """q, k, v are three Linears; out_proj is one that reads what softmax gives, written out here."""
    torch.manual_seed(0)
    sizes = {"kdim": 6, "vdim": 5} if cross else {}
    model, dense = pruned(Attention(cross, bias=bias, batch_first=batch_first, **sizes).double())
    x = torch.randn(12, 7, 19 if cross else 8, **DOUBLE)
    if bias:
        for m in (model, dense):
            m.attention.in_proj_bias.copy_(torch.linspace(-1, 1, 24))
    inputs = [x[..., :8], x[..., 8:14], x[..., 14:]] if cross else [x, x, x]

    def weights(m):
        return [m.q_proj_weight, m.k_proj_weight, m.v_proj_weight] if cross else list(m.in_proj_weight.chunk(3))

    def linears(m):
        biases = m.in_proj_bias.chunk(3) if bias else [None] * 3
        made = []
        for w, b in zip([*weights(m), m.out_proj.weight], [*biases, m.out_proj.bias], strict=True):
            layer = nn.Linear(w.shape[1], w.shape[0], bias=b is not None, **DOUBLE)
            layer.weight.copy_(w)
            if b is not None:
                layer.bias.copy_(b)
            made.append(layer)
        return made

    def context(projections):
        q, k, v = (p(i) if batch_first else p(i).transpose(0, 1) for p, i in zip(projections, inputs, strict=True))
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))  # [batch, heads, length, 4]
        heads = (q @ k.mT / 2).softmax(-1) @ v
        out = heads.transpose(1, 2).flatten(-2)
        return out if batch_first else out.transpose(0, 1)

    ours, theirs = linears(model.attention), linears(dense.attention)
    for layer, original, i in zip(ours[:3], theirs[:3], inputs, strict=True):
        w, offset = fitted(layer, original, i, i)
        layer.weight.copy_(w)
        if bias:
            layer.bias.copy_(offset)
    w, offset = fitted(ours[3], theirs[3], context(ours[:3]), context(theirs[:3]))

    report = reconstruct(model, dense, [x[:6], x[6:]] if batch_first else [x], samples=12)
    for got, want in zip([*weights(model.attention), model.attention.out_proj.weight], [*(m.weight for m in ours[:3]), w], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    if bias:
        torch.testing.assert_close(model.attention.out_proj.bias, offset, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(model.attention.in_proj_bias, torch.cat([m.bias for m in ours[:3]]), rtol=1e-8, atol=1e-8)
    assert len(report.layers) == 4 and all(layer.why_left is None and layer.after < layer.before for layer in report.layers)


def test_a_transformer_comes_closer_as_a_whole():
    """With padding, which torch's own encoder packs into nested tensors where it may."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    nn.init.normal_(encoder.layers[1].self_attn.in_proj_weight, std=0.3)
    model, dense = pruned(encoder)
    x = torch.randn(64, 9, 16)
    pad = torch.arange(9) >= torch.randint(4, 10, (64, 1))
    batch = {"src": x, "src_key_padding_mask": pad}
    with torch.no_grad():
        target = dense.eval()(**batch)
        before = float((model.eval()(**batch) - target)[~pad[:, : target.shape[1]]].norm())
    report = reconstruct(model, dense, [batch])
    with torch.no_grad():
        after = float((model(**batch) - target)[~pad[:, : target.shape[1]]].norm())
    assert [layer.name for layer in report.layers[4:8]] == [
        f"layers.{i}" for i in ("0.linear1", "0.linear2", "1.self_attn.in_proj[q]", "1.self_attn.in_proj[k]")
    ]
    assert after < 0.8 * before, (before, after)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(6, 6, **DOUBLE)
        self.other = nn.Linear(6, 6, **DOUBLE)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(self.one(self.one(x).tanh()).tanh())


def test_a_shared_weight_is_fitted_to_all_its_calls():
    """One weight, called twice by one layer and once by another with a bias of its own: one system of all rows."""
    torch.manual_seed(0)
    model, dense = pruned(Twice())
    x = torch.randn(20, 6, **DOUBLE)

    def calls(m):
        a = m.one(x)
        b = m.one(a.tanh())
        return [x, a.tanh(), b.tanh()], [a, b, m.other(b.tanh())]

    with torch.no_grad():
        (inputs, _), (_, outputs) = calls(model), calls(dense)
    first, second = torch.cat(inputs[:2]), inputs[2]
    targets = torch.cat(outputs[:2]), outputs[2]
    means = [(a.mean(0), b.mean(0)) for a, b in ((first, targets[0]), (second, targets[1]))]
    centred = torch.cat([first - means[0][0], second - means[1][0]]).numpy()
    aims = torch.cat([targets[0] - means[0][1], targets[1] - means[1][1]]).numpy()
    want = np.stack([ridge(centred, aims[:, c], model.one.weight[c].detach().numpy(), False)[0] for c in range(6)])
    report = reconstruct(model, dense, [x])
    torch.testing.assert_close(model.one.weight, nn.Parameter(torch.from_numpy(want)), rtol=1e-8, atol=1e-8)
    for layer, (a, b) in zip((model.one, model.other), means, strict=True):
        torch.testing.assert_close(layer.bias.detach(), b - torch.from_numpy(want) @ a, rtol=1e-8, atol=1e-8)
    assert {layer.name: layer.rows for layer in report.layers} == {"one": 40, "other": 20}


class Skip(nn.Module):
    """A stem that a batch norm and a shortcut read; a shortcut with a convolution of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.shortcut = nn.Conv2d(4, 6, 1, stride=2, bias=False)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm2(self.inner(self.norm1(self.conv(self.norm(x).relu())).relu()))
        return y + self.shortcut(x)


def test_a_bias_goes_only_where_nobody_else_reads():
    torch.manual_seed(0)
    model, dense = pruned(Skip().double())
    x = torch.randn(16, 2, 6, 6, **DOUBLE)
    stem, _ = fitted(model.stem, dense.stem, x, x)  # through the origin
    report = reconstruct(model, dense, [x])
    torch.testing.assert_close(model.stem.weight.detach(), stem, rtol=1e-8, atol=1e-8)
    assert torch.equal(model.norm.running_mean, dense.norm.running_mean) and not torch.equal(
        model.norm1.running_mean, dense.norm1.running_mean
    )
    assert all(torch.equal(getattr(model, n).running_var, getattr(dense, n).running_var) for n in ("norm", "norm1", "norm2"))
    assert {layer.name for layer in report.layers} == {"stem", "conv", "inner", "shortcut"}
    inner = next(layer for layer in report.layers if layer.name == "inner")
    with torch.no_grad():  # the report of a layer that reads repaired ones, from outputs
        model.eval(), dense.eval()
        y = dense.inner(dense.norm1(dense.conv(dense.norm(dense.stem(x)).relu())).relu())
        z = model.inner(model.norm1(model.conv(model.norm(model.stem(x)).relu())).relu())
        z = z + (dense.norm2.running_mean - model.norm2.running_mean)[:, None, None]  # the bias that norm2 adds
    spread = (y - y.mean((0, 2, 3), keepdim=True)).square().sum()
    assert inner.after == pytest.approx(float((z - y).square().sum() / spread), rel=1e-8)


class Odd(nn.Module):
    """What is left, and why."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.free = nn.Linear(8, 8)
        self.own = self.Scaled(8, 8)
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.table.weight

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.normed(self.own(self.free(self.table(input_ids)))))


def test_what_is_left_is_reported():
    torch.manual_seed(0)
    model = Odd()
    dense = copy.deepcopy(model)
    model.free.weight.data[:, ::2] = 0
    before = copy.deepcopy(model.state_dict())
    report = reconstruct(model, dense, [torch.randint(0, 11, (9, 5))])
    why = {layer.name: layer.why_left for layer in report.layers}
    assert why.pop("free") is None
    assert why == {
        "own": "Scaled has a forward of its own",
        "normed": "its weight is computed from other parameters",
        "unused": "not called in a forward pass",
        "head": "shared with table",
    }
    after = model.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"free.weight", "free.bias"}


class Wide(nn.Conv1d):
    def _conv_forward(self, *args):
        return 3 * super()._conv_forward(*args)


class Elsewhere(nn.Module):
    """Matrices of modules that are not fitted, two layers whose result was changed, and one with a computed bias."""

    def __init__(self):
        super().__init__()
        self.free, self.wrapped, self.shifted = (nn.Linear(8, 8) for _ in range(3))
        self.lstm, self.up, self.wide = nn.LSTM(8, 8), nn.ConvTranspose1d(8, 8, 1), Wide(8, 8, 1)
        self.table, self.own = nn.Embedding(5, 8, padding_idx=0), nn.Parameter(torch.randn(8, 8))
        plain = self.wrapped.forward
        self.wrapped.forward = lambda x: 3 * plain(x)
        torch.nn.utils.parametrize.register_parametrization(self.shifted, "bias", nn.Tanh())

    def forward(self, x):
        x = self.lstm(self.shifted(self.wrapped(self.free(x))))[0]
        return self.wide(self.up(x[:, :, None])).flatten(1) @ self.own + self.table(torch.arange(5).expand(len(x), 5)).sum(1)


def test_every_pruned_matrix_has_a_row():
    torch.manual_seed(0)
    model, dense = Elsewhere(), Elsewhere()
    dense.load_state_dict(model.state_dict())
    for name, p in model.named_parameters():
        if p.dim() > 1 and "table" not in name and "hh" not in name:
            p.data[:, ::2] = 0
    before = copy.deepcopy(model.state_dict())
    report = reconstruct(model, dense, [torch.randn(9, 8)])
    after, other = model.state_dict(), "is no Linear, Conv or MultiheadAttention that is fitted"
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"free.weight", "free.bias"}
    assert {layer.name: layer.why_left for layer in report.layers} == {
        "free": None,
        "wrapped": "Linear has a forward of its own",
        "shifted": "its bias is computed from other parameters",
        "wide": "Wide has a forward of its own",
        "lstm.weight_ih_l0": f"LSTM {other}",
        "up.weight": f"ConvTranspose1d {other}",
        "own": f"Elsewhere {other}",
    }


@pytest.mark.parametrize("in_place", [False, True])
def test_hooks_that_change_inputs_and_outputs(in_place):
    """The layer computes what it should from the input that it gets; what hooks make of that is theirs."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(50, 8)
    model[0].register_forward_hook(lambda module, args, y: y.mul_(3) if in_place else 3 * y)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    dense = copy.deepcopy(model)
    prune(model, TopK(sparsity=0.5))
    weights = [fitted(model[0], dense[0].forward, x - 1, x - 1)[0]]
    report = reconstruct(model, dense, [x])
    torch.testing.assert_close(model[0].weight.double(), weights[0], rtol=1e-4, atol=1e-5)
    assert all(layer.after < layer.before for layer in report.layers)


def test_padding_does_not_count():
    torch.manual_seed(0)
    model = Odd().double()
    dense = copy.deepcopy(model)
    model.free.weight.data[:, ::2] = 0
    other = copy.deepcopy(model)
    ids = torch.randint(0, 11, (30, 6))
    mask = (torch.arange(6) < torch.randint(1, 7, (30, 1))).long()
    report = reconstruct(
        model, dense, [{"input_ids": ids[:20], "attention_mask": mask[:20]}, {"input_ids": ids[20:], "attention_mask": mask[20:]}]
    )
    reconstruct(other, dense, [ids[mask.bool()][:, None]], samples=180)
    torch.testing.assert_close(model.free.weight, other.free.weight, rtol=1e-9, atol=1e-9)
    assert report.layers[0].rows == int(mask.sum()) and report.samples == 30


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        choice, y = self.gate(x).argmax(1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y[choice == i] = expert(x[choice == i])
        return y


def test_experts_that_get_other_rows_are_left():
    torch.manual_seed(0)
    model = Routed()
    dense = copy.deepcopy(model)
    model.gate.weight.data[0] = 0
    model.gate.weight.data[1, 1:] = 0
    report = reconstruct(model, dense, [torch.randn(50, 4)])
    assert [layer.why_left for layer in report.layers] == [None] + ["the dense and the pruned network call it with other shapes"] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_zeros(dtype):
    """A network of another dtype than the dense one; zeros keep their sign bit."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    model = copy.deepcopy(dense).to(dtype)
    prune(model, NM(2, 4))
    zero = model[0].weight == 0
    model[0].weight.data[zero] *= -1.0
    bits = model[0].weight[zero].clone().view(torch.int32 if dtype is torch.float32 else torch.int16)
    x = torch.randn(200, 16)

    class Cast(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.to(self.net[0].weight.dtype))

    report = reconstruct(Cast(model), Cast(dense), [x])
    assert torch.equal(model[0].weight[zero].view(bits.dtype), bits) and bits.count_nonzero()
    assert model[0].weight.dtype == dtype and all(layer.after < layer.before for layer in report.layers)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("at", [0, 1, 3, 6])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_lost_on_failure(at, error):
    """Raised in the forward pass number `at` of the dense network, in the middle of the layers."""
    torch.manual_seed(0)

    class Failing(nn.Module):
        left = None

        def forward(self, x):
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise error("injected")
            return x

    model, dense = pruned(
        nn.Sequential(
            Failing(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3)
        )
    )
    dense[0].left = at
    model.train()
    model[3].eval()
    before, modes = state(model), [m.training for m in model.modules()]
    with pytest.raises(error, match="injected"):
        reconstruct(model, dense, [torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 6)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()] and torch.backends.mha.get_fastpath_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (model, dense) for m in net.modules())


def test_modes_are_kept():
    model, dense = pruned(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9)))
    model.train(), dense.train()
    reconstruct(model, dense, [torch.randn(32, 4)])
    assert model[1].training and dense[1].training


@torch.no_grad()
def test_dead_and_constant():
    """A row without weights becomes the mean; where inputs never vary, only the bias can be right."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 3))
    model = copy.deepcopy(dense)
    model[0].weight[0] = 0
    x = torch.randn(50, 4)
    reconstruct(model, dense, [x])
    assert not model[0].weight[0].any()
    torch.testing.assert_close(model[0].bias[0], dense(x)[:, 0].mean())
    model[0].weight[1] = 0
    weight = model[0].weight.clone()
    reconstruct(model, dense, [x[:1].expand(20, 4)])
    assert torch.equal(model[0].weight, weight)
    torch.testing.assert_close(model(x[:1]), dense(x[:1]))


def test_samples():
    """As many as asked, the last batch cut; a shorter loader gives what it has."""
    torch.manual_seed(0)
    model, dense = pruned(nn.Sequential(nn.Linear(4, 4)).double())
    x = torch.randn(30, 4, **DOUBLE)
    other, endless = copy.deepcopy(model), itertools.cycle([x[:8], x[8:16]])
    assert reconstruct(model, dense, endless, samples=12).samples == 12
    assert reconstruct(other, dense, [x[:12]]).samples == 12
    close(model, other, 1e-12)


def test_within_autocast():
    """Autocast keeps casts of weights that require gradients."""
    torch.manual_seed(0)
    model, dense = pruned(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    x = torch.randn(64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        reconstruct(model, dense, [x])
        inside = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inside, model(x))


def bad():
    model, dense = pruned(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    other = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    shared = copy.deepcopy(dense)
    shared[0].weight = model[0].weight
    x = [torch.randn(8, 4)]
    untracked = copy.deepcopy(dense)
    untracked[1] = nn.BatchNorm1d(4, track_running_stats=False)
    yield (model, dense, x, 0), ValueError, "samples must be an int of at least 1, got 0"
    yield (model, dense, x, 2.0), ValueError, "samples must be an int of at least 1, got 2.0"
    yield (3, dense, x), ValueError, "model must be a torch.nn.Module, got int"
    yield (model, None, x), ValueError, "dense must be a torch.nn.Module, got NoneType"
    yield (model, model, x), ValueError, "must have memory of their own"
    yield (model, shared, x), ValueError, "must have memory of their own"
    yield (model, other, x), ValueError, "must have the parameters of model before pruning, got another '0.weight'"
    yield (model, untracked, x), ValueError, "must have the batch norms of model"
    yield (model, dense, []), ValueError, "at least one batch"
    yield (model, dense, ["text"]), ValueError, "batches of tensors"
    yield (model, dense, [torch.full((8, 4), math.inf)]), ValueError, "must be finite, got NaN or Inf at '0'"
    yield (nn.BatchNorm1d(4), nn.BatchNorm1d(4), x), ValueError, "must have a Linear, Conv or MultiheadAttention"


@pytest.mark.parametrize("case", range(12))
def test_bad_input(case):
    torch.manual_seed(0)
    arguments, error, message = list(bad())[case]
    before = state(arguments[0]) if isinstance(arguments[0], nn.Module) else {}
    with pytest.raises(error, match=f"reconstruct: .*{message}"):
        reconstruct(*arguments)
    assert all(torch.equal(v, before[k]) for k, v in before.items() for v in [arguments[0].state_dict()[k]])


def test_an_open_step_is_refused():
    model, dense = pruned(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    x = torch.randn(8, 4)
    with frozen_batchnorm(model), pytest.raises(RuntimeError, match="batch norms must not be frozen"):
        reconstruct(model, dense, [x])
    optimizer = CrAM(model.parameters(), lr=0.1)
    model(x).sum().backward()
    optimizer.perturb()
    with pytest.raises(RuntimeError, match="must not be perturbed"):
        reconstruct(model, dense, [x])
    optimizer.restore()
    reconstruct(model, dense, [x])


def test_progress(capsys):
    model, dense = pruned(nn.Sequential(nn.Linear(4, 4)))
    reconstruct(model, dense, [torch.randn(8, 4)], progress=True)
    assert "reconstruct" in "".join(capsys.readouterr())


def test_it_saves_what_tuning_cannot():
    """A trained network at 90 %: with batch-norm statistics alone it guesses, reconstructed it does not; tuning before changes nothing."""
    torch.manual_seed(0)
    centres = torch.randn(10, 24) * 1.5
    y = torch.randint(0, 10, (3000,))
    x = centres[y] + torch.randn(3000, 24)
    net = nn.Sequential(
        nn.Linear(24, 64, bias=False),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 64, bias=False),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for i in range(0, 2000, 50):
            optimizer.zero_grad()
            F.cross_entropy(net(x[i : i + 50]), y[i : i + 50]).backward()
            optimizer.step()

    def accuracy(m):
        return float((m.eval()(x[2000:]).argmax(1) == y[2000:]).float().mean())

    dense, tuned = copy.deepcopy(net), copy.deepcopy(net)
    loader = x[:2000].split(100)
    prune(tuned, TopK(0.9))
    direct = copy.deepcopy(tuned)
    tune_batchnorm(tuned, loader)
    before = accuracy(tuned)
    reconstruct(tuned, dense, loader)
    reconstruct(direct, dense, loader)
    for net in (tuned, direct):
        net[1].num_batches_tracked.zero_(), net[4].num_batches_tracked.zero_()
    close(tuned, direct, 1e-6)
    assert accuracy(dense) > 0.9 and before < accuracy(direct) - 0.1 and accuracy(direct) > accuracy(dense) - 0.1, (
        accuracy(dense),
        before,
        accuracy(direct),
    )


def test_models_that_were_swapped_are_told():
    """The dense model would be rewritten to copy the pruned one."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    pruned = copy.deepcopy(dense)
    prune(pruned, TopK(sparsity=0.75))
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(ValueError, match=r"dense must be the network before pruning, got .* were the two swapped\?"):
        reconstruct(dense, pruned, [torch.randn(16, 8)])
    assert all(torch.equal(t, before[name]) for name, t in dense.state_dict().items())
    reconstruct(pruned, dense, [torch.randn(64, 8)])
