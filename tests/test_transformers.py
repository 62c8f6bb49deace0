"""CrAM under Hugging Face's Trainer and Accelerate: the weights of the plain loop, to the bit. The model is built from a configuration."""

import types

import pytest
import torch
from optim_cases import assert_same_bits, weights

from cram_kernels import NM, CrAM, TopK
from cram_kernels.integrations.transformers import TwoPassTrainer

INSTALL = "`pip install 'cram_kernels[frameworks]'` brings it"
transformers = pytest.importorskip("transformers", reason=f"transformers is missing; {INSTALL}")
accelerate = pytest.importorskip("accelerate", reason=f"accelerate is missing; {INSTALL}")

STEPS = 4
OPTIONS = {"compression": [TopK(0.5), NM(2, 4), TopK(0.9)], "lr": 0.01}


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The tensors are small: a second thread would only wait. Accelerate's settings are global: each test starts anew."""
    set_threads(1)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def bert(seed: int = 0, dropout: float = 0.0):
    """A BERT of two layers that classifies; without dropout both passes of a plain loop are easily repeated."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    rest = {"max_position_embeddings": 8, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **rest, num_labels=3))


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(32, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row.sum() % 3} for row in ids]


class CrAMTrainer(TwoPassTrainer, transformers.Trainer):
    """Notes the losses of all passes. The rows come in their order."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = []

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_of(folder, model, optimizer=None, kind=None, made_with=None, **options):
    """Four rows a micro-batch, enough for STEPS steps. `made_with`: a class and options, of which Trainer makes the optimizer."""
    optimizer = None if made_with else optimizer or CrAM(model.parameters(), torch.optim.AdamW, **OPTIONS)
    options = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "linear", **options}
    count = 4 * STEPS * options["gradient_accumulation_steps"]
    common = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    args = transformers.TrainingArguments(folder, logging_strategy="no", **{**common, **options})
    given = {"optimizers": (optimizer, None), "optimizer_cls_and_kwargs": made_with}
    trainer = (kind or CrAMTrainer)(model, args, train_dataset=rows(count), **given)
    trainer.model_accepts_loss_kwargs = False  # BERT's classifier ignores num_items_in_batch: its losses are means, to be divided
    return trainer


def plain(accumulate: int = 1, autocast: bool = False, clip: float | None = None, **options):
    """The judge: the loop written out, with Trainer's linear decay."""
    model = bert()
    optimizer = CrAM(model.parameters(), torch.optim.AdamW, **{**OPTIONS, **options})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / STEPS)
    data = rows(4 * STEPS * accumulate)
    for step in range(STEPS):
        for end in (optimizer.perturb, optimizer.step):
            for i in range(accumulate):
                micro = data[4 * (step * accumulate + i) :][:4]
                batch = {key: torch.stack([row[key] for row in micro]) for key in micro[0]}
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = model(**batch).loss
                (loss / accumulate).backward()
            if clip is not None:
                assert torch.nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
            end()
        schedule.step()
    return model


@pytest.mark.parametrize("accumulate", [1, 3])
def test_trainer_is_the_plain_loop(accumulate, tmp_path):
    model = bert()
    trainer = trainer_of(tmp_path, model, gradient_accumulation_steps=accumulate)
    result = trainer.train()
    assert trainer.state.global_step == STEPS
    assert len(trainer.losses) == 2 * STEPS * accumulate
    clean = [loss for i, loss in enumerate(trainer.losses) if i // accumulate % 2 == 0]
    assert result.training_loss == pytest.approx(sum(clean) / len(clean))
    assert_same_bits(weights(model), weights(plain(accumulate)))


def test_a_loss_that_is_a_mean_stays_one(tmp_path):
    """Trainer believes that any forward with keyword arguments divides by the number of items. BERT's classifier does not."""
    model = bert(dropout=0.1)
    trainer = trainer_of(tmp_path, model, gradient_accumulation_steps=3)
    trainer.model_accepts_loss_kwargs = True
    trainer.train()
    assert not trainer.model_accepts_loss_kwargs and len(trainer.losses) == 2 + 2 * STEPS * 3
    judge = bert(dropout=0.1)
    trainer_of(tmp_path, judge, gradient_accumulation_steps=3).train()
    assert_same_bits(weights(model), weights(judge))


def test_a_loss_without_labels_is_looked_at_again(tmp_path):
    """The first micro-batch says nothing: no label counts."""
    model = bert()
    trainer = trainer_of(tmp_path, model, gradient_accumulation_steps=2)
    trainer.model_accepts_loss_kwargs = True
    of, trainer.compute_loss = trainer.compute_loss, lambda *args, **kw: (0.0 if len(trainer.losses) < 2 else 1.0) * of(*args, **kw)
    trainer.train()
    assert not trainer.model_accepts_loss_kwargs and len(trainer.losses) == 4 + 2 * STEPS * 2


def test_a_loss_function_that_ignores_the_number_of_items_is_refused(tmp_path):
    model, before = bert(), weights(bert())
    trainer = trainer_of(tmp_path, model, gradient_accumulation_steps=3)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: torch.nn.functional.cross_entropy(outputs.logits, labels)
    with pytest.raises(ValueError, match="TwoPassTrainer: compute_loss_func must divide by num_items_in_batch"):
        trainer.train()
    assert_same_bits(weights(model), before)


def test_an_optimizer_that_knows_no_model_is_attached(tmp_path):
    """Within a step a checkpoint of the model has its unperturbed weights."""
    model, seen = bert(), []

    class Looks(CrAMTrainer):
        def compute_loss(self, *args, **kwargs):
            seen.append([t.clone() for t in model.state_dict().values()])
            return super().compute_loss(*args, **kwargs)

    trainer = trainer_of(tmp_path, model)
    trainer.__class__ = Looks
    trainer.train()
    assert_same_bits(seen[1], seen[0])


def test_an_uneven_last_step(tmp_path):
    """5 micro-batches, 3 a step: the second step has two, and repeats those two."""
    model = bert()
    trainer = trainer_of(tmp_path, model, gradient_accumulation_steps=3)
    trainer.train_dataset = rows(20)
    trainer.train()
    assert trainer.state.global_step == 2 and len(trainer.losses) == 2 * 5


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("second_pass", ["half", "split"])
def test_a_second_pass_on_fewer_rows(second_pass, accumulate, tmp_path):
    """Micro-batches of 4 rows: the second pass sees the last two, the first one all or the first two."""
    model, judge = bert(), bert()
    trainer = trainer_of(tmp_path, model, gradient_accumulation_steps=accumulate)
    trainer.second_pass = second_pass
    trainer.train()
    optimizer = CrAM(judge.parameters(), torch.optim.AdamW, **OPTIONS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / STEPS)
    data = rows(4 * STEPS * accumulate)
    for step in range(STEPS):
        for end, part in ((optimizer.perturb, slice(4 if second_pass == "half" else 2)), (optimizer.step, slice(2, 4))):
            for i in range(accumulate):
                micro = data[4 * (step * accumulate + i) :][:4][part]
                (judge(**{key: torch.stack([row[key] for row in micro]) for key in micro[0]}).loss / accumulate).backward()
            end()
        schedule.step()
    assert_same_bits(weights(model), weights(judge))


@pytest.mark.parametrize("second_pass", ["half", "split"])
def test_a_mean_over_items_is_over_those_of_its_own_pass(second_pass, tmp_path):
    """A model that takes `num_items_in_batch` divides by it: by the labels of the pass, not by those of the whole batch."""
    counts = []

    class Counts(CrAMTrainer):
        def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
            counts.append((len(inputs["labels"]), int(num_items_in_batch)))
            return super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)

    trainer = trainer_of(tmp_path, bert())
    trainer.__class__, trainer.second_pass, trainer.model_accepts_loss_kwargs = Counts, second_pass, True
    trainer.train()
    assert counts == [(4, 4) if second_pass == "half" else (2, 2), (2, 2)] * STEPS


def test_another_second_pass_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, bert())
    trainer.second_pass = "third"
    with pytest.raises(ValueError, match="TwoPassTrainer: second_pass must be 'all', 'half', 'split' or a function, got 'third'"):
        trainer.train()


def test_bf16(tmp_path):
    model = bert()
    trainer_of(tmp_path, model, bf16=True).train()
    assert_same_bits(weights(model), weights(plain(autocast=True)))


def test_max_grad_norm_clips_each_pass(tmp_path):
    model = bert()
    trainer_of(tmp_path, model, max_grad_norm=0.1).train()
    assert_same_bits(weights(model), weights(plain(clip=0.1)))


def test_optimizer_class_and_options(tmp_path):
    """Trainer makes the groups: weight decay for matrices alone. They share one threshold."""
    options = {"base_optimizer": torch.optim.AdamW, **OPTIONS, "compression": TopK(0.5)}
    trainer = trainer_of(tmp_path, bert(), made_with=(CrAM, options))
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert len(optimizer.param_groups) == 2 and optimizer.param_groups[0]["cram_step"] == STEPS
    assert len(trainer.losses) == 2 * STEPS


def test_another_optimizer_is_refused(tmp_path):
    model = bert()
    with pytest.raises(TypeError, match="optimizer must be CrAM, got AdamW"):
        trainer_of(tmp_path, model, torch.optim.AdamW(model.parameters())).train()


def test_fsdp1_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, bert())
    trainer.accelerator.state.fsdp_plugin = types.SimpleNamespace(fsdp_version=1)
    with pytest.raises(ValueError, match="TwoPassTrainer: fsdp_version must be 2, got 1"):
        trainer.train()


def test_an_error_in_the_second_pass_leaves_the_clean_weights(tmp_path):
    class Fails(CrAMTrainer):
        def compute_loss(self, *args, **kwargs):
            if len(self.losses) == 1:
                raise KeyError("on purpose")
            return super().compute_loss(*args, **kwargs)

    model, before = bert(), weights(bert())
    trainer = trainer_of(tmp_path, model)
    trainer.__class__ = Fails
    with pytest.raises(KeyError, match="on purpose"):
        trainer.train()
    assert_same_bits(weights(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_resume_is_bit_exact(tmp_path):
    model, resumed = bert(dropout=0.1), bert(1, dropout=0.1)
    trainer_of(tmp_path, model, save_strategy="steps", save_steps=2).train()
    trainer = trainer_of(tmp_path, resumed)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(trainer.losses) == 2 * (STEPS - 2)
    assert_same_bits(weights(resumed), weights(model))


# Accelerate. On a CPU it makes no scaler for fp16, so that one is put in by hand.


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_is_the_plain_loop(precision, accumulate):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model = bert()
    optimizer = CrAM(model.parameters(), torch.optim.AdamW, **OPTIONS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / STEPS)
    loader = torch.utils.data.DataLoader(rows(4 * STEPS * accumulate), 4 * accumulate)
    model, prepared, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    assert prepared.optimizer is optimizer
    for batch in loader:
        for end in (optimizer.perturb, prepared.step):
            for ids, labels in zip(batch["input_ids"].chunk(accumulate), batch["labels"].chunk(accumulate), strict=True):
                accelerator.backward(model(input_ids=ids, labels=labels).loss / accumulate)
            end()
        schedule.step()
    assert_same_bits(weights(model), weights(plain(accumulate, precision == "bf16")))


@pytest.mark.parametrize(("times", "overflows"), [(1.0, False), (8.0, True)])
def test_accelerate_with_a_scaler(times, overflows):
    """`perturb(accelerator.scaler)`; an overflow skips the update and lowers the scale, but Accelerate does not hear of it."""
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    model, judge = bert(), bert()
    optimizer, unscaled = (CrAM(m.parameters(), torch.optim.AdamW, **OPTIONS) for m in (model, judge))
    prepared = accelerator.prepare_optimizer(optimizer)
    batch = {key: torch.stack([row[key] for row in rows(4)]) for key in ("input_ids", "labels")}
    for end, unscaled_end in ((lambda: optimizer.perturb(accelerator.scaler), unscaled.perturb), (prepared.step, unscaled.step)):
        accelerator.backward(times * model(**batch).loss)
        end()
        judge(**batch).loss.backward()
        unscaled_end()
    assert_same_bits(weights(model), weights(bert() if overflows else judge))
    assert accelerator.scaler.get_scale() == 2.0 ** (126 if overflows else 127)
    assert not prepared.step_was_skipped


def test_fp16_with_max_grad_norm_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, bert(), max_grad_norm=1.0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match=r"args\.max_grad_norm must be 0 with fp16, got 1.0"):
        trainer.train()


def test_trainer_with_a_scaler(tmp_path):
    model, judge = bert(), plain(max_grad_norm=0.1)
    trainer = trainer_of(tmp_path, model, CrAM(model.parameters(), torch.optim.AdamW, max_grad_norm=0.1, **OPTIONS))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.train()
    assert_same_bits(weights(model), weights(judge))
