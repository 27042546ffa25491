"""What must not change a loss or a gradient, and what must never get one. Two processes: `test_processes.py`."""

import pytest
import torch
from stage_parts import conversation_rows, losses, message, moved, pair_rows, settings, snapshot, to_dataset

from aligngpt_trainers import (
    AlignGPTInstructConfig,
    AlignGPTInstructTrainer,
    AlignGPTPretrainConfig,
    AlignGPTPretrainTrainer,
)


STAGES = {
    "pretrain": (AlignGPTPretrainTrainer, AlignGPTPretrainConfig, pair_rows),
    "instruct": (AlignGPTInstructTrainer, AlignGPTInstructConfig, conversation_rows),
}
both_stages = pytest.mark.parametrize("stage", list(STAGES))


def rows_of(stage: str, number: int) -> list[dict]:
    """Rows whose answers have very different lengths: a mean of means would show."""
    rows = STAGES[stage][2](number)
    for index, row in enumerate(rows):
        if index % 3 == 0:
            row["messages"][-1] = message("assistant", "a red square, " * (1 + index) + "that is all")
    return rows


def trainer_for(stage: str, model, folder, processor=None, rows=None, **overrides):
    trainer_class, config_class, _ = STAGES[stage]
    values = {"group_by": "none", "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 1.0}
    values |= {"max_grad_norm": 0.0, "per_device_train_batch_size": 8, "max_steps": 1}
    args = settings(config_class, folder, **{**values, **overrides})
    model = model if isinstance(model, torch.nn.Module) else str(model)
    return trainer_class(model, args, to_dataset(rows or rows_of(stage, 8)), processing_class=processor)


def step(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of one step of plain gradient descent with a learning rate of 1."""
    before = snapshot(trainer.model)
    trainer.train()
    gradient = {name: before[name] - tensor for name, tensor in trainer.model.state_dict().items()}
    return losses(trainer)[0], gradient


def backward(trainer, batch, implementation: str | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and exact gradient of one batch."""
    if implementation is not None:
        trainer.model.set_attn_implementation(implementation)
    trainer.model.train().zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    named = trainer.model.named_parameters()
    return float(loss.detach()), {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(first, second, atol: float = 2e-6):
    assert first[0] == pytest.approx(second[0], abs=5e-6)
    assert first[1].keys() == second[1].keys() and any(gradient.any() for gradient in first[1].values())
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], rtol=1e-4, atol=atol, msg=name)


@both_stages
def test_a_batch_of_8_is_two_of_4_and_four_of_2(stage1_folder, tmp_path, stage):
    splits = [
        step(
            trainer_for(
                stage,
                stage1_folder,
                tmp_path,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=8 // batch_size,
            )
        )
        for batch_size in (8, 4, 2)
    ]
    assert_same(splits[0], splits[1])
    assert_same(splits[0], splits[2])


@both_stages
def test_padding_changes_nothing(stage1_folder, tmp_path, stage):
    trainer = trainer_for(stage, stage1_folder, tmp_path)
    rows = rows_of(stage, 4)
    plain = trainer.data_collator(rows)
    trainer.data_collator.pad_to_multiple_of = 250
    padded = trainer.data_collator(rows)
    assert padded["input_ids"].shape[1] >= plain["input_ids"].shape[1] + 20
    assert_same(backward(trainer, plain), backward(trainer, padded))


@both_stages
def test_rows_alone_add_up_to_their_batch(stage1_folder, tmp_path, stage):
    """Each row unpadded, weighted by its supervised tokens."""
    trainer = trainer_for(stage, stage1_folder, tmp_path)
    rows = rows_of(stage, 5)
    together = backward(trainer, trainer.data_collator(rows))
    total, loss, gradient = 0, 0.0, {}
    for row in rows:
        batch = trainer.data_collator([row])
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        own_loss, own_gradient = backward(trainer, batch)
        total, loss = total + tokens, loss + own_loss * tokens
        for name, value in own_gradient.items():
            gradient[name] = gradient.get(name, 0) + value * tokens
    alone = loss / total, {name: value / total for name, value in gradient.items()}
    assert_same(together, alone)


@both_stages
def test_sdpa_equals_eager(stage1_folder, tmp_path, stage):
    trainer = trainer_for(stage, stage1_folder, tmp_path)
    batch = trainer.data_collator(rows_of(stage, 5))
    runs = [backward(trainer, batch, implementation) for implementation in ("sdpa", "eager")]
    assert trainer.model.config.text_config._attn_implementation == "eager"
    assert_same(*runs)


@both_stages
def test_gradient_checkpointing_changes_nothing(stage1_folder, tmp_path, stage):
    runs = [
        step(trainer_for(stage, stage1_folder, tmp_path, gradient_checkpointing=checkpointing))
        for checkpointing in (False, True)
    ]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(gradient, runs[1][1][name]) for name, gradient in runs[0][1].items())


@both_stages
def test_the_head_on_supervised_positions_alone_changes_nothing(stage1_folder, tmp_path, stage, monkeypatch):
    """What is left out gets neither loss nor gradient, and TRL's metrics stay as they are."""
    trainer = trainer_for(stage, stage1_folder, tmp_path)
    batch = trainer.data_collator(rows_of(stage, 5))
    seen = []
    trainer.model.model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state.shape))
    ours = backward(trainer, batch)
    metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    assert seen == [(1, supervised, trainer.model.config.text_config.hidden_size)]
    trainer._metrics["train"].clear()
    monkeypatch.setattr(trainer.args, "torch_compile", True)  # compiled models take TRL's own way
    theirs = backward(trainer, batch)
    assert seen[1][:2] == batch["input_ids"].shape
    assert_same(ours, theirs)
    for name in ("entropy", "mean_token_accuracy"):
        assert metrics[name] == pytest.approx(trainer._metrics["train"][name], rel=1e-5)
    # the trainer's loss is the model's own, which computes all logits
    assert float(trainer.model(**batch).loss) == pytest.approx(ours[0], abs=5e-6)


@both_stages
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_frozen_gets_no_gradient_and_never_changes(stage1_folder, tmp_path, stage, checkpointing):
    run = {"optim": "adamw_torch", "weight_decay": 0.1, "max_steps": 3, "gradient_checkpointing": checkpointing}
    trainer = trainer_for(stage, stage1_folder, tmp_path, learning_rate=1e-2, **run)
    frozen = {"vision_tower", "language_model", "lm_head", "align_gate"}
    if stage == "instruct":
        frozen = {"vision_tower", "align_embeddings"}
    of_tower = []
    trainer.model.model.vision_tower.register_forward_hook(
        lambda module, args, output: of_tower.append((torch.is_grad_enabled(), output.last_hidden_state.requires_grad))
    )
    with_gradient = set()

    def note(*args, **kwargs):
        with_gradient.update(name for name, p in trainer.model.named_parameters() if p.grad is not None)
        return unwatched(*args, **kwargs)

    unwatched, trainer._get_grad_norm = trainer._get_grad_norm, note
    before = snapshot(trainer.model)
    trainer.train()
    assert not moved(before, trainer.model) & frozen
    core = {name.removeprefix("model.").split(".")[0] for name in with_gradient}
    assert core and not core & frozen
    assert with_gradient == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    # no autograd in the tower, even where checkpointing makes its input require a gradient
    assert of_tower and set(of_tower) == {(False, False)}
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trainer.model.parameters() if p.requires_grad}


@both_stages
def test_the_projector_can_have_its_own_learning_rate(stage1_folder, tmp_path, stage):
    trainer = trainer_for(stage, stage1_folder, tmp_path, projector_learning_rate=0.0, learning_rate=0.1)
    before = snapshot(trainer.model)
    trainer.train()
    expected = {"pretrain": {"align_embeddings"}, "instruct": {"language_model", "lm_head", "align_gate"}}
    assert moved(before, trainer.model) == expected[stage]


def test_the_level_table_can_have_its_own_learning_rate(stage1_folder, tmp_path):
    """Beside the projector's too; in every group decay stays as it was."""

    def run(**rates):
        trainer = trainer_for("pretrain", stage1_folder, tmp_path, learning_rate=0.1, weight_decay=0.1, **rates)
        before = snapshot(trainer.model)
        trainer.train()
        grouped = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
        assert len(grouped) == len(set(grouped)) == sum(p.requires_grad for p in trainer.model.parameters())
        # FSDP2 cannot resume with groups that are left empty
        assert all(group["params"] for group in trainer.optimizer.param_groups)
        return trainer, moved(before, trainer.model)

    trainer, changed = run(align_learning_rate=0.0)
    assert changed == {"multi_modal_projector"}
    table = trainer.model.model.align_embeddings.weight
    (group,) = (group for group in trainer.optimizer.param_groups if any(p is table for p in group["params"]))
    assert (group["initial_lr"], group["weight_decay"]) == (0.0, 0.1)
    trainer, changed = run(align_learning_rate=0.5, projector_learning_rate=0.0)
    assert changed == {"align_embeddings"}
    assert trainer.summary()["hyperparameters"]["align_learning_rate"] == 0.5


def test_batches_with_and_without_images_weigh_alike(stage1_folder, tmp_path):
    """A step over one batch with images and one without equals the step over both at once."""
    rows = [row for row in conversation_rows(32) if row["images"]][:4]
    rows += [row for row in conversation_rows(32) if not row["images"]][:4]
    runs = [
        step(
            trainer_for(
                "instruct",
                stage1_folder,
                tmp_path,
                rows=rows,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=8 // batch_size,
            )
        )
        for batch_size in (8, 4)
    ]
    assert_same(*runs)
