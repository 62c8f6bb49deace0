"""A state machine over the public optimizer, against the page of plain torch in optim_model.py: users do everything in any order.

Whatever a rule does, and whatever it raises: outside of a step the weights are the model's to the bit, within a step they are the model's
perturbed ones. `make test` runs some hundred steps, `pytest -m slow` ten times as many.
"""

import copy
import gc
import io
import json
import os
import pickle
import subprocess
import sys
import warnings

import forked
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from optim_cases import assert_same_bits, random_tensors
from optim_model import Model, NofM, Top
from torch import nn

from cram_kernels import NM, CrAM, CrAMWarning, TopK

SHAPES = [(4, 8), (8,), (2, 4, 3, 1), (5, 6)]
BASES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
LISTS = [[], [Top(0.5)], [NofM(2, 4)], [Top(0.9), NofM(2, 4)], [Top(0.5), Top(0.9), NofM(1, 4)]]
OWN_LISTS = [None, None, [], [Top(0.5)], [NofM(2, 4), Top(0.9)]]  # of the second group


class Stop(Exception):
    """What a closure of a user may raise."""


def pattern_of(p: Top | NofM) -> TopK | NM:
    return TopK(sparsity=p.sparsity) if isinstance(p, Top) else NM(p.n, p.m)


gradients = st.tuples(
    st.integers(0, 2**16), st.sampled_from(["all", "all", "all", "zero", "some", "tied"]), st.lists(st.booleans(), min_size=4, max_size=4)
)


class Machine(RuleBasedStateMachine):
    def tensors(self, drawn) -> list[torch.Tensor | None]:
        """The gradients of a pass, as the model takes them: none for what is frozen, or in no group."""
        seed, kind, which = drawn
        found = random_tensors(SHAPES, seed)
        if kind == "zero":
            found = [torch.zeros_like(g) for g in found]
        if kind == "tied":
            found = [g.round() for g in found]
        there = [kind != "some" or there for there in which]
        there = [there[i] and i in self.members and i not in self.frozen for i in range(len(found))]
        return [g.to(self.model.dtype).float() if t else None for g, t in zip(found, there, strict=True)]

    @initialize(
        base=st.sampled_from(sorted(BASES)),
        patterns=st.sampled_from(LISTS),
        own=st.sampled_from(OWN_LISTS),
        dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
        masters=st.booleans(),
        options=st.fixed_dictionaries(
            {
                "plus": st.booleans(),
                "sparse_grad": st.booleans(),
                "normalize_grad": st.booleans(),
                "max_grad_norm": st.sampled_from([None, 1.0, 1e6]),
                "mask_period": st.sampled_from([1, 1, 3]),
                "seed": st.integers(0, 3),
            }
        ),
        weight_decay=st.sampled_from([0.0, 0.01]),
        groups=st.booleans(),
        hooks=st.sampled_from([(), ("base",), ("wrapper",)]),
    )
    def start(self, base, patterns, own, dtype, masters, options, weight_decay, groups, hooks):
        if base == "rmsprop":
            dtype = torch.float32  # the rounding of its update to 16 bits is torch's own affair
        if dtype is not torch.float32:
            hooks = ()  # a hook of the base is shown the combined gradient in 16 bits
        self.params = [nn.Parameter(t.to(dtype)) for t in random_tensors(SHAPES, 99)]
        self.members, self.frozen = set(range(len(SHAPES))), set()
        options = options | {"master_weights": masters and base != "rmsprop"}
        self.net = nn.Sequential(nn.BatchNorm1d(3))
        self.net.weights = nn.ParameterList(self.params)
        self.base, self.hooks, self.options, self.groups = base, hooks, options, groups
        self.patterns, self.own = patterns, own if groups else None
        self.base_options = {"lr": 0.1, "weight_decay": weight_decay} | ({"momentum": 0.9} if base == "sgd" else {})
        weights = [p.detach().float().clone() for p in self.params]
        self.model = Model(weights, base, self.lists(), weight_decay=weight_decay, dtype=dtype, **options)
        self.optimizer = self.made(self.params)
        self.open = self.warned = False
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**6)

    def lists(self) -> list[list[Top | NofM]]:
        return [self.patterns if i < 2 or self.own is None else self.own for i in range(len(SHAPES))]

    def second_group(self, params) -> dict:
        own = {} if self.own is None else {"compression": [pattern_of(p) for p in self.own]}
        return {"params": params[2:], **own}

    def made(self, params) -> CrAM:
        listed = params
        if self.groups:
            listed = [{"params": params[:2]}] + ([self.second_group(params)] if 2 in self.members else [])
        patterns = [pattern_of(p) for p in self.patterns]
        optimizer = CrAM(listed, BASES[self.base], compression=patterns, **self.options, **self.base_options)
        for target in self.hooks:
            (optimizer if target == "wrapper" else optimizer.base_optimizer).register_step_pre_hook(_nothing)
        if params is self.params:
            optimizer.attach(self.net)
        return optimizer

    def give(self, grads) -> None:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = None if g is None else g.to(p.dtype)

    # --- steps ---

    @rule(
        first=gradients,
        second=gradients,
        form=st.sampled_from(["closure", "block", "calls", "scaler"]),
        fails=st.sampled_from([0, 0, 0, 1, 2]),
    )
    def step(self, first, second, form, fails):
        """A whole step in one of its forms, in which the user's code may raise in either pass."""
        passes = iter([(1, self.tensors(first)), (2, self.tensors(second))])

        def closure():
            number, grads = next(passes)
            self.give(grads)
            if number == fails:
                raise Stop
            return torch.tensor(float(number))

        before = self.model
        self.model = copy.deepcopy(before)
        if self.open and form != "closure":
            self.optimizer.restore()
        scaler = self.scaler if form == "scaler" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CrAMWarning)
            try:
                if form == "closure":
                    assert float(self.optimizer.step(closure)) == 1.0
                else:
                    closure()
                    if form == "block":
                        with self.optimizer.perturbed():
                            closure()
                        self.optimizer.step()
                    else:
                        if scaler is not None:
                            scaler.scale(torch.ones(()))
                        self.optimizer.perturb(scaler)
                        closure()
                        self.optimizer.step() if scaler is None else scaler.step(self.optimizer)
            except Stop:
                self.optimizer.restore()
                self.optimizer.zero_grad()
                if scaler is not None:
                    scaler._per_optimizer_states.clear()
                if fails == 2:  # the masks of the first half may be there, to be used again
                    self.model.perturb(self.tensors(first))
                self.open = False
                return
        if scaler is not None:
            scaler.update()
        self.model.perturb(self.tensors(first))
        self.model.finish(self.tensors(second))
        self.open = False
        assert all(p.grad is None for p in self.params)

    @precondition(lambda self: not self.open)
    @rule(first=gradients)
    def perturb(self, first):
        self.give(self.tensors(first))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CrAMWarning)
            self.optimizer.perturb()
        self.model.perturb(self.tensors(first))
        self.open = True

    @precondition(lambda self: self.open)
    @rule(first=gradients)
    def perturb_again(self, first):
        """The first half of the open step is given up, with a warning."""
        self.give(self.tensors(first))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.optimizer.perturb()
        assert any("called twice" in str(w.message) for w in caught)
        self.model.perturb(self.tensors(first))

    @precondition(lambda self: self.open)
    @rule(second=gradients)
    def finish(self, second):
        self.give(self.tensors(second))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CrAMWarning)
            self.optimizer.step()
        self.model.finish(self.tensors(second))
        self.open = False

    @rule(grads=gradients)
    def plain_step(self, grads):
        self.give(self.tensors(grads))
        self.optimizer.plain_step()
        self.model.plain(self.tensors(grads))
        self.open = False

    @rule()
    def restore(self):
        self.optimizer.restore()
        self.optimizer.zero_grad()
        self.open = False

    @precondition(lambda self: not self.open)
    @rule(first=gradients, where=st.sampled_from([1, 2]))
    def overflow(self, first, where):
        """In either pass: nothing is updated, and the scale goes down."""
        self.give(self.tensors(first))
        if not any(p.grad is not None for p in self.params):
            return
        infinite = [None if p.grad is None else torch.full_like(p, float("inf")) for p in self.params]
        self.scaler.scale(torch.ones(()))
        scale = self.scaler.get_scale()
        for half in (1, 2):
            self.give(infinite if half == where else self.tensors(first))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CrAMWarning)  # a pattern may prune none of the few that have a gradient
                self.optimizer.perturb(self.scaler) if half == 1 else self.scaler.step(self.optimizer)
        self.scaler.update()
        assert self.scaler.get_scale() == scale / 2
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**6)
        self.model.step_count += 1
        self.model.touch(self.tensors(first))
        if self.model.mask_period > 1:  # which masks are left of it, no contract says: begin anew
            self.optimizer.load_state_dict({k: v for k, v in self.optimizer.state_dict().items() if k != "cram_masks"})
            self.model.masks.clear()
            self.model.uses = self.counted()

    def counted(self) -> dict[Top | NofM, int]:
        uses = json.loads(self.optimizer.param_groups[0]["cram_mask_uses"])
        known = [p for choice in self.model.patterns for p in choice]
        keys = {p: f"topk {p.sparsity!r} model" if isinstance(p, Top) else f"{p.n}:{p.m}" for p in known}
        return {p: uses[key] for p, key in keys.items() if key in uses}

    # --- what scripts change ---

    @precondition(lambda self: not self.open)
    @rule(lr=st.sampled_from([0.0, 0.1, 0.01]))
    def set_lr(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.lr = lr

    @precondition(lambda self: not self.open)
    @rule(rho=st.sampled_from([0.0, 0.05, 1.0]))
    def set_rho(self, rho):
        for group in self.optimizer.param_groups:
            group["rho"] = rho
        self.model.rho = rho

    @precondition(lambda self: not self.open)
    @rule(weight_decay=st.sampled_from([0.0, 0.01, 0.1]))
    def set_weight_decay(self, weight_decay):
        for group in self.optimizer.param_groups:
            group["weight_decay"] = weight_decay
        self.model.weight_decay = self.base_options["weight_decay"] = weight_decay

    @precondition(lambda self: not self.open)
    @rule(plus=st.booleans())
    def set_plus(self, plus):
        for group in self.optimizer.param_groups:
            group["plus"] = plus
        self.model.plus = plus
        self.options = self.options | {"plus": plus}

    @precondition(lambda self: not self.open)
    @rule(i=st.integers(0, 3), frozen=st.booleans())
    def freeze(self, i, frozen):
        self.params[i].requires_grad_(not frozen)
        self.frozen = self.frozen | {i} if frozen else self.frozen - {i}

    @precondition(lambda self: not self.open)
    @rule(i=st.integers(0, 3), seed=st.integers(0, 99))
    def replace(self, i, seed):
        """Another parameter in the same place, as code that adds Gaussians or tokens does it."""
        new = nn.Parameter(torch.randn(SHAPES[i], generator=torch.Generator().manual_seed(seed)).to(self.model.dtype))
        new.requires_grad_(i not in self.frozen)
        for group in self.optimizer.param_groups:
            group["params"][:] = [new if p is self.params[i] else p for p in group["params"]]
        self.optimizer.state.pop(self.params[i], None)
        self.params[i] = self.net.weights[i] = new
        self.model.weights[i] = new.detach().float().clone()
        self.model.reset(i)

    @precondition(lambda self: not self.open and self.groups)
    @rule(setter=st.booleans())
    def remove_group(self, setter):
        """The parameters of the second group are trained no more."""
        groups = [group for group in self.optimizer.param_groups if group["params"]][:1]
        if setter:
            self.optimizer.param_groups = groups
        else:
            self.optimizer.param_groups[:] = groups
        for i in (2, 3):
            self.optimizer.state.pop(self.params[i], None)
            self.model.reset(i)
            self.model.weights[i] = self.model.rounded(self.model.weights[i])
        self.members = {0, 1}

    @precondition(lambda self: 2 not in self.members)
    @rule()
    def add_group(self):
        if self.open:
            self.optimizer.restore()
            self.optimizer.zero_grad()
            self.open = False
        options = {name: getattr(self.model, name) for name in ("lr", "rho", "weight_decay", "plus")}
        self.optimizer.add_param_group(self.second_group(self.params) | options)
        self.members = {0, 1, 2, 3}

    @precondition(lambda self: not self.open and self.base != "rmsprop" and not self.options["master_weights"] and not self.hooks)
    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    def convert(self, dtype):
        """The state follows when it is next used; the masks that were kept are computed anew."""
        if dtype is not self.model.dtype:
            self.net.to(dtype)
            self.model.dtype = dtype
            self.model.weights = [self.model.rounded(w) for w in self.model.weights]
            self.model.masks.clear()

    @rule(mode=st.booleans())
    def train_or_eval(self, mode):
        self.net.train(mode)

    # --- copies, checkpoints, other owners ---

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copied(self, how):
        """A copy goes on as the original would have; within a step it is refused."""
        both = (self.net, self.optimizer)
        if self.open:
            with pytest.raises(RuntimeError, match="between perturb"):
                copy.deepcopy(both) if how == "deepcopy" else pickle.dumps(both)
            return
        self.net, self.optimizer = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
        self.params, self.hooks = list(self.net.weights), ()

    @rule(backwards=st.booleans())
    def resume(self, backwards):
        """A new process: new parameters, a new optimizer, its patterns perhaps in another order, and the checkpoint from a file."""
        if self.open:
            with pytest.raises(RuntimeError, match="between perturb"):
                self.optimizer.state_dict()
            return
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        lr, rho = self.model.lr, self.model.rho
        if backwards:
            self.patterns, self.own = self.patterns[::-1], self.own and self.own[::-1]
            self.model.patterns = self.lists()
        self.params = [nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in self.params]
        self.model.touch([p.detach() for p in self.params])  # torch casts all state to the dtype of its parameter
        self.net.weights = nn.ParameterList(self.params)
        self.optimizer = self.made(self.params)
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))
        assert {(g["lr"], g["rho"]) for g in self.optimizer.param_groups} == {(lr, rho)}

    @rule(first_gone=st.booleans())
    def another_optimizer(self, first_gone):
        """A cell is run again, perhaps within a step: the weights are the clean ones. State and counters are new."""
        old = None if first_gone else self.optimizer
        if first_gone:
            self.optimizer = None
            gc.collect()
        self.model.lr, self.model.rho, self.model.step_count = 0.1, 0.05, 0
        self.model.state, self.model.masks, self.model.uses = {}, {}, {}
        self.model.weights = [self.model.rounded(w) for w in self.model.weights]  # the masters are gone, too
        self.optimizer = self.made(self.params)
        self.optimizer.zero_grad()
        self.open = False
        del old

    @rule(how=st.sampled_from(["add", "load", "attach"]), second=gradients)
    def disturb(self, how, second):
        """Between the halves, the next step() says that the step was given up; elsewhere nothing happens."""
        if how == "add":
            self.optimizer.add_param_group({"params": []})
            del self.optimizer.param_groups[-1]
        elif how == "attach":
            self.optimizer.attach(self.net)
        elif self.open:
            self.optimizer.load_state_dict(self.saved())
        if self.open:
            self.give(self.tensors(second))
            with pytest.raises(RuntimeError, match="given up"):
                self.optimizer.step()
            assert all(p.grad is None for p in self.params)
            self.open = False

    def saved(self):
        """A checkpoint of now, made by a twin, since that of an open step is refused."""
        state = torch.optim.Optimizer.state_dict(self.optimizer.base_optimizer)
        for group in state["param_groups"]:
            del group["compression"]
        masks = self.optimizer._workspace.pack_masks()
        return copy.deepcopy(state) | ({"cram_masks": masks} if masks else {})

    # --- what always holds ---

    @invariant()
    def the_weights_are_the_models(self):
        if not hasattr(self, "params"):
            return
        expected = self.model.perturbed if self.open else self.model.weights
        assert_same_bits(self.params, [w.to(self.model.dtype) for w in expected])
        assert (self.optimizer.open_step is not None) is self.open
        assert self.net[0].track_running_stats is not self.open
        assert {g["cram_step"] for g in self.optimizer.param_groups} == {self.model.step_count}


def _nothing(*_) -> None:
    """A hook of a user, which a copy can take along."""


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def search(examples: int) -> None:
    """The same examples in every run of a commit, unless CRAM_KERNELS_FUZZ says how many new ones to search."""
    torch.set_num_threads(1)  # the tensors are small: a second thread would only wait
    gc.freeze()  # what torch has loaded is not searched for garbage
    wanted = int(os.environ.get("CRAM_KERNELS_FUZZ", 0))
    rules = settings(
        max_examples=wanted or examples,
        derandomize=not wanted,
        stateful_step_count=20,
        deadline=None,
        database=None,
        suppress_health_check=QUIET,
    )
    run_state_machine_as_test(Machine, settings=rules)
    gc.unfreeze()


@pytest.mark.parametrize("examples", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_machine(examples):
    """In a process of its own: hypothesis draws numbers from the modules that are loaded, which the tests before this one decide."""
    found = subprocess.run([*forked.python(), __file__, str(examples)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


if __name__ == "__main__":
    search(int(sys.argv[1]))
