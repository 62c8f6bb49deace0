"""CrAM under Lightning's Trainer, in every way of optimizing: the weights of the plain loop, to the bit."""

import warnings

import pytest
import torch
from optim_cases import assert_same_bits, backward, batches, network, weights
from torch import Tensor, nn

from cram_kernels import CrAM, CrAMWarning, TopK
from cram_kernels.integrations.lightning import TwoPassModule

INSTALL = "`pip install 'cram_kernels[frameworks]'` brings it"
pl = pytest.importorskip("lightning.pytorch", reason=f"lightning is missing; {INSTALL}")
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

OPTIONS = {"compression": [TopK(0.5), TopK(0.9)], "lr": 0.1, "momentum": 0.9}
STEPS = 6


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The tensors are small: a second thread would only wait."""
    set_threads(1)


class Net(pl.LightningModule):
    """The network of the optimizer tests; notes the losses of all passes, and what a callback sees of each step."""

    def __init__(self, **options):
        super().__init__()
        self.net, self.options, self.losses = network(), {**OPTIONS, **options}, []

    def configure_optimizers(self):
        return CrAM(self.net.parameters(), **self.options).attach(self)

    def loss(self, batch) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=8)
        return loss


class TwoPassNet(TwoPassModule, Net):
    pass


class ManualNet(TwoPassModule, Net):
    """Four micro-batches a step."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        def closure():
            for x, y in zip(batch[0].chunk(4), batch[1].chunk(4), strict=True):
                loss = self.loss((x, y)) / 4
                self.log("loss", loss, on_step=False, on_epoch=True, batch_size=8)
                self.manual_backward(loss)

        self.two_passes(self.optimizers(), closure)


def trainer_of(folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(**{"accelerator": "cpu", "max_steps": STEPS, "default_root_dir": folder, **quiet, **options})


def fit(net, folder, ckpt_path=None, **options):
    """Train on the batches of the optimizer tests, as they are."""
    trainer = trainer_of(folder, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers|.*litlogger|.*Deprecat")
        trainer.fit(net, torch.utils.data.DataLoader(list(batches(STEPS)), batch_size=None), ckpt_path=ckpt_path)
    return trainer


def plain(each_pass=backward, half=lambda: torch.autocast("cpu", enabled=False), **options) -> nn.Module:
    """The judge: the loop written out."""
    net = network()
    optimizer = CrAM(net.parameters(), **{**OPTIONS, **options}).attach(net)
    for batch in batches(STEPS):
        for end in (optimizer.perturb, optimizer.step):
            with half():
                each_pass(net, batch)
            end()
    return net


@pytest.mark.parametrize("kind", [Net, TwoPassNet])
def test_automatic_optimization_is_the_plain_loop(kind, tmp_path):
    """step(closure) serves Lightning's closure, which zeroes the gradients itself, without the mixin, too."""
    net = kind()
    trainer = fit(net, tmp_path)
    assert trainer.global_step == STEPS
    assert len(net.losses) == 2 * STEPS
    assert_same_bits(weights(net.net), weights(plain()))
    assert_same_bits(list(net.net.buffers()), list(plain().buffers()), "batch norm")


@pytest.mark.parametrize("kind", [Net, TwoPassNet])
def test_lightning_clips_each_pass(kind, tmp_path):
    def clipped(net, batch):
        backward(net, batch)
        assert nn.utils.clip_grad_norm_(net.parameters(), 0.5) > 0.5

    net = kind()
    fit(net, tmp_path, gradient_clip_val=0.5)
    assert_same_bits(weights(net.net), weights(plain(clipped)))


@pytest.mark.parametrize("kind", [Net, TwoPassNet])
def test_bf16_clipped_by_the_optimizer(kind, tmp_path):
    net = kind(max_grad_norm=0.5)
    fit(net, tmp_path, precision="bf16-mixed")
    judge = plain(half=lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False), max_grad_norm=0.5)
    assert_same_bits(weights(net.net), weights(judge))


def fp16(scale: float = 2.0**10):
    """Lightning refuses fp16 on a CPU by name, but takes the plugin."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


def test_fp16_takes_two_passes_with_the_mixin_alone(tmp_path):
    """Without it Lightning calls step() after one pass, which is the plain step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    judge = network()
    optimizer = CrAM(judge.parameters(), max_grad_norm=0.5, **OPTIONS).attach(judge)
    for batch in batches(STEPS):
        for end in (lambda: optimizer.perturb(scaler), lambda: scaler.step(optimizer)):
            with torch.autocast("cpu", torch.float16, cache_enabled=False):
                loss = nn.functional.cross_entropy(judge(batch[0]), batch[1])
            scaler.scale(loss).backward()
            end()
        scaler.update()
    net, without = TwoPassNet(max_grad_norm=0.5), Net(max_grad_norm=0.5)
    fit(net, tmp_path, plugins=[fp16()])
    assert len(net.losses) == 2 * STEPS and not net.in_second_pass
    assert_same_bits(weights(net.net), weights(judge))
    with pytest.warns(CrAMWarning, match="plain step of the base"):
        fit(without, tmp_path, plugins=[fp16()])
    assert len(without.losses) == STEPS


def test_fp16_overflow_skips_the_step_and_lowers_the_scale(tmp_path):
    net, before = TwoPassNet(), weights(network())
    plugin = fp16(2.0**127)
    fit(net, tmp_path, plugins=[plugin])
    assert_same_bits(weights(net.net), before)
    assert plugin.scaler.get_scale() == 2.0 ** (127 - STEPS)


@pytest.mark.parametrize("mixed", ["bf16", "fp16"])
def test_lightning_does_not_clip_under_mixed_precision(mixed, tmp_path):
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(TwoPassNet(), tmp_path, gradient_clip_val=0.5, **({"precision": "bf16-mixed"} if mixed == "bf16" else {"plugins": [fp16()]}))


@pytest.mark.parametrize("options", [{}, {"plugins": "fp16"}], ids=["fp32", "fp16"])
def test_manual_optimization_with_accumulation(options, tmp_path):
    def micro_batches(net, batch):
        for x, y in zip(batch[0].chunk(4), batch[1].chunk(4), strict=True):
            (nn.functional.cross_entropy(net(x), y) / 4).backward()

    net = ManualNet()
    trainer = fit(net, tmp_path, **({"plugins": [fp16()]} if options else {}))
    assert trainer.global_step == STEPS
    assert len(net.losses) == 8 * STEPS
    if not options:
        assert_same_bits(weights(net.net), weights(plain(micro_batches)))


def test_two_calls_in_manual_optimization_are_not_silent(tmp_path):
    """The step() of Lightning's wrapper always comes with a closure, an empty one: not the second half of a step."""

    class Calls(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(self.loss(batch))
            optimizer.optimizer.perturb()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    with pytest.warns(UserWarning, match="no parameter has a second gradient"):
        trainer_of(tmp_path).fit(Calls(), torch.utils.data.DataLoader(list(batches(1)), batch_size=None))


def test_two_calls_on_the_wrapper_with_a_scaler(tmp_path):
    """perturb(scaler) on what Lightning hands out, which is an object of its own: an overflow of the first pass alone is not lost."""

    class Calls(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(self.loss(batch))
            next(self.parameters()).grad[0] = torch.inf
            optimizer.perturb(self.trainer.scaler)
            self.manual_backward(self.loss(batch))
            for p in self.parameters():
                p.grad.zero_()  # as where the second pass does not use what was overflowed
            optimizer.step()

    net, plugin = Calls(), fp16(1024.0)
    fit(net, tmp_path, plugins=[plugin])
    assert_same_bits(weights(net.net), weights(network()))
    assert plugin.scaler.get_scale() == 1024.0 / 2**STEPS


def test_accumulation_by_lightning_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"accumulate_grad_batches must be 1 .*got 2"):
        fit(TwoPassNet(), tmp_path, accumulate_grad_batches=2)


def test_an_iterator_of_batches_is_refused(tmp_path):
    """The second pass would take the next batch of it."""

    class Iterating(TwoPassNet):
        def training_step(self, dataloader_iter):
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(RuntimeError, match="TwoPassModule: training_step must take a batch, got dataloader_iter"):
        fit(Iterating(), tmp_path)


def test_only_the_first_pass_is_logged(tmp_path):
    net, without = TwoPassNet(), Net()
    logged = [fit(n, tmp_path, max_epochs=1).callback_metrics["loss"].item() for n in (net, without)]
    assert net.losses == without.losses
    assert logged[0] == pytest.approx(sum(net.losses[::2]) / STEPS)
    assert logged[1] == pytest.approx(sum(net.losses) / (2 * STEPS))  # without the mixin: of both passes


@pytest.mark.parametrize(("options", "calls"), [({}, 2), ({"plugins": "fp16"}, 1)], ids=["fp32", "fp16"])
def test_how_often_hooks_run(options, calls, tmp_path):
    counts = {"backward": 0, "step": 0, "batch": 0}

    class Count(pl.Callback):
        def on_after_backward(self, *_):
            counts["backward"] += 1

        def on_before_optimizer_step(self, *_):
            counts["step"] += 1

        def on_train_batch_end(self, trainer, module, outputs, *_):
            counts["batch"] += 1
            assert outputs["loss"].item() == pytest.approx(module.losses[-1])  # of the last pass

    fit(TwoPassNet(), tmp_path, callbacks=[Count()], **({"plugins": [fp16()]} if options else {}))
    assert counts == {"backward": 2 * STEPS, "step": calls * STEPS, "batch": STEPS}


def test_another_optimizer_takes_one_pass(tmp_path):
    class Sgd(TwoPassNet):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    net = Sgd()
    fit(net, tmp_path)
    assert len(net.losses) == STEPS


def test_an_error_in_the_second_pass_leaves_the_clean_weights(tmp_path):
    class Fails(TwoPassNet):
        def loss(self, batch):
            if self.in_second_pass:
                raise KeyError("on purpose")
            return super().loss(batch)

    for options in ({}, {"plugins": [fp16()]}):
        net = Fails()
        with pytest.raises(KeyError, match="on purpose"):
            fit(net, tmp_path, **options)
        assert_same_bits(weights(net.net), weights(network()))
        assert all(p.grad is None for p in net.parameters()) and not net.in_second_pass


def test_resume_is_bit_exact(tmp_path):
    net, resumed = TwoPassNet(), TwoPassNet(seed=55)  # the checkpoint brings the seed
    callback = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    options = {"max_steps": -1, "max_epochs": 3, "enable_checkpointing": True, "callbacks": [callback]}
    fit(net, tmp_path, **options)
    fit(resumed, tmp_path, ckpt_path=tmp_path / "epoch=0.ckpt", **options)
    assert len(resumed.losses) == 2 * 2 * STEPS
    assert_same_bits(weights(resumed.net), weights(net.net))
    assert_same_bits(list(resumed.net.buffers()), list(net.net.buffers()), "batch norm")


def test_weight_averaging_sees_the_weights_after_each_step(tmp_path):
    """Its hook is on_train_batch_end: never between the halves."""
    averaging = pl.callbacks.WeightAveraging()
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append([p.detach().clone() for p in module.net.parameters()])

    net = TwoPassNet()
    fit(net, tmp_path, callbacks=[Watch(), averaging])
    mean = [torch.stack(ps).mean(0) for ps in zip(*seen, strict=True)]
    for average, expected in zip(net.net.parameters(), mean, strict=True):  # on_train_end copied the average into the model
        torch.testing.assert_close(average.detach(), expected)


@pytest.mark.parametrize("second_pass", ["half", "split"])
def test_a_second_pass_on_fewer_samples(second_pass, tmp_path):
    """Batches of 8; what is logged is the loss of the first pass alone."""
    net, judge = TwoPassNet(), network()
    net.second_pass = second_pass
    trainer = fit(net, tmp_path)
    optimizer, clean = CrAM(judge.parameters(), **OPTIONS).attach(judge), []
    for x, y in batches(STEPS):
        first = slice(8) if second_pass == "half" else slice(4)
        clean.append(backward(judge, (x[first], y[first])))
        optimizer.perturb()
        backward(judge, (x[4:], y[4:]))
        optimizer.step()
    assert_same_bits(weights(net.net), weights(judge))
    assert_same_bits(list(net.net.buffers()), list(judge.buffers()), "batch norm")
    assert float(trainer.callback_metrics["loss"]) == pytest.approx(float(torch.stack(clean).mean()), rel=1e-6)
    assert "training_step" not in vars(net)


def test_another_second_pass_is_refused(tmp_path):
    net = TwoPassNet()
    net.second_pass = "third"
    with pytest.raises(ValueError, match="TwoPassModule: second_pass must be 'all', 'half', 'split' or a function, got 'third'"):
        fit(net, tmp_path)
