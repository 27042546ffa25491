"""What `test_processes.py` has done in two processes: `torchrun --nproc_per_node 2 run_processes.py PLAN.json`."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import load_from_disk
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback
from trl.trainer.utils import add_fused_lm_head

from aligngpt_trainers import (
    AlignGPTInstructConfig,
    AlignGPTInstructTrainer,
    AlignGPTPretrainConfig,
    AlignGPTPretrainTrainer,
)
from aligngpt_trainers.dummy_image import add_dummy_images
from aligngpt_trainers.guards import NonFiniteError, TrainingStopped
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.assembly import assemble


STAGES = {
    "pretrain": (AlignGPTPretrainTrainer, AlignGPTPretrainConfig),
    "instruct": (AlignGPTInstructTrainer, AlignGPTInstructConfig),
}


class SendSignal(TrainerCallback):
    """A signal to one rank alone in the middle of a step."""

    def __init__(self, rank: int, step: int):
        self.rank, self.step = rank, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and args.process_index == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def trainer_for(plan: dict, stage: str, rows: str, folder: str, callbacks=None, **overrides):
    trainer_class, config_class = STAGES[stage]
    args = config_class(**{**plan["settings"], "output_dir": str(Path(plan["folder"]) / folder), **overrides})
    held_out = load_from_disk(plan["rows"]["held_out"]) if "eval_strategy" in overrides else None
    dataset = load_from_disk(plan["rows"][rows])
    return trainer_class(plan["model"], args, dataset, eval_dataset=held_out, callbacks=callbacks)


def gathered(value) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def checksum(*modules: torch.nn.Module) -> float:
    return float(sum(p.detach().double().abs().sum() for module in modules for p in module.parameters()))


def starts_equal(plan: dict) -> dict:
    """Each rank assembles a model out of another random state."""
    torch.manual_seed(dist.get_rank())
    model, processor = assemble(*plan["parts"], num_align_levels=4, gate_hidden_size=16, seed=3)
    args = AlignGPTPretrainConfig(**{**plan["settings"], "output_dir": plan["folder"] + "/fresh"})
    trainer = AlignGPTPretrainTrainer(model, args, load_from_disk(plan["rows"]["pairs"]), processing_class=processor)
    core = trainer.model.model
    return {"checksums": gathered(checksum(core.multi_modal_projector, core.align_embeddings, core.align_gate))}


def trains(plan: dict) -> dict:
    """Both stages; in stage 2, images in one process and none in the other at the same step."""
    report = {}
    for stage, rows in (("pretrain", "pairs"), ("instruct", "apart")):
        trainer = trainer_for(plan, stage, rows, f"two-{stage}")
        modalities = []
        collate = trainer.data_collator.torch_call

        def watched(rows, collate=collate, modalities=modalities):
            batch = collate(rows)
            modalities.append("pixel_values" in batch)
            return batch

        trainer.data_collator.torch_call = watched
        trainer.train()
        trainer.save_final()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        report[stage] = {"losses": losses, "pictures": gathered(modalities), "summary": trainer.summary()}
    return report


def stops_at_nan(plan: dict) -> dict:
    """The bad row is rank 1's."""
    trainer = trainer_for(plan, "instruct", "apart", "nan")
    (token,) = trainer.processing_class.tokenizer(plan["bad_word"], add_special_tokens=False)["input_ids"]
    trainer.model.get_input_embeddings().weight.data[token] = float("nan")
    message = ""
    try:
        trainer.train()
    except NonFiniteError as error:
        message = str(error)
    return {"messages": gathered(message)}


def stops_and_resumes(plan: dict) -> dict:
    """A signal to rank 1 alone, in the second epoch of grouped batches; then on to the end."""
    run = {"max_steps": 5, "group_by": "modality_length", "train_sampling_strategy": "random"}
    run |= {"lr_scheduler_type": "cosine", "projector_learning_rate": 1e-3, "optim": "adamw_torch"}
    straight = trainer_for(plan, "instruct", "mixed", "straight", **run)
    straight.train()
    stopped = trainer_for(plan, "instruct", "mixed", "resumed", [SendSignal(1, 4)], **run)
    steps = None
    try:
        stopped.train()
    except TrainingStopped as error:
        steps = (error.step, error.code)
    resumed = trainer_for(plan, "instruct", "mixed", "resumed", resume="auto", **run)
    resumed.train()
    ours, theirs = resumed.model.state_dict(), straight.model.state_dict()
    equal = all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (straight, resumed)]
    batches = len(resumed.get_train_dataloader())
    return {"stopped": gathered(steps), "equal": gathered(equal), "losses": losses, "batches_of_epoch": batches}


def evaluates(plan: dict) -> dict:
    trainer = trainer_for(
        plan, "instruct", "mixed", "eval", eval_strategy="steps", eval_steps=2, eval_generations=3, max_steps=2
    )
    trainer.train()
    metrics = [log for log in trainer.state.log_history if "eval_loss" in log]
    return {"metrics": gathered(metrics[0])}


def shards(plan: dict) -> dict:
    """FSDP2 by hand: images in rank 0, none in rank 1; the gradient of the fused head's loss."""
    rank = dist.get_rank()
    processor = AlignGPTProcessor.from_pretrained(plan["model"])
    model = AlignGPTForConditionalGeneration.from_pretrained(plan["model"], dtype=torch.float32).train()
    model.config.align_mode = "gate"
    args = AlignGPTInstructConfig(**{**plan["settings"], "output_dir": plan["folder"] + "/fsdp"})
    rows = load_from_disk(plan["rows"]["apart"])
    collator = AlignGPTInstructTrainer(model, args, rows, processing_class=processor).data_collator
    model = AlignGPTForConditionalGeneration.from_pretrained(plan["model"], dtype=torch.float32).train()
    model.config.align_mode = "gate"
    frozen = (model.model.vision_tower, model.model.align_embeddings)
    for module in frozen:
        module.requires_grad_(False)
    add_fused_lm_head(model)
    add_dummy_images(model)
    core = model.model
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    # layer by layer, as accelerate does it
    layers = [*core.language_model.layers, *core.vision_tower.encoder.layers]
    for module in (*layers, core.multi_modal_projector, core.align_gate, model):
        fully_shard(module, mesh=mesh)
    local = [dict(rows[4 * rank + index]) for index in range(4)]
    batch = collator(local)
    batch.pop("row_index", None)
    count = torch.tensor(int((batch["labels"][:, 1:] != -100).sum()))
    dist.all_reduce(count)
    images = gathered("pixel_values" in batch)
    outputs = model(**batch, fused_lm_head=True)
    # FSDP averages over the ranks
    loss = -outputs.log_probs.sum() / count * dist.get_world_size()
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.full_tensor().contiguous()
    if rank == 0:
        save_file(gradients, str(Path(plan["folder"]) / "fsdp.safetensors"))
    return {"pictures": images, "losses": gathered(float(loss.detach()) / dist.get_world_size())}


def main(path: str):
    plan = json.loads(Path(path).read_text(encoding="utf-8"))
    checks = (starts_equal, trains, stops_at_nan, stops_and_resumes, evaluates, shards)
    for check in checks:
        if check.__name__ not in plan["checks"]:
            continue
        result = check(plan)
        if dist.get_rank() == 0:
            (Path(plan["folder"]) / f"{check.__name__}.json").write_text(json.dumps(result), encoding="utf-8")
        dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(Path(plan["folder"]) / "straight", ignore_errors=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    from accelerate import PartialState

    PartialState(cpu=True)
    main(sys.argv[1])
