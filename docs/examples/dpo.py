"""
DPO (arXiv 2305.18290) of a model after stage 2, by TRL's own trainer. Not in the paper; see `docs/preferences.md`.

    python docs/examples/dpo.py --model_name_or_path MODEL --dataset_name PAIRS --output_dir runs/dpo \
        --learning_rate 5e-7 --max_length 2048 --loss_type sigmoid sft --loss_weights 1 1

PAIRS is what `load_dataset` reads, with rows `images` (a list), `prompt`, `chosen` and `rejected` (chat messages
without placeholders). Every setting of TRL's DPOConfig and ModelConfig is an option; `--use_peft true` trains adapters.
"""

from datasets import Image, List, load_dataset
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config


def train_as_stage_2(model) -> None:
    """Language model, head, projector and gate train; vision tower and level table stay as they are."""
    model.requires_grad_(False)
    parts = [model.model.language_model, model.lm_head, model.model.multi_modal_projector]
    for part in [*parts, *([model.model.align_gate] if model.config.uses_gate else [])]:
        part.requires_grad_(True)


def adapters(model, settings: ModelConfig):
    """Adapters for the language model's linear layers alone; projector and gate train whole. None without use_peft."""
    layers = model.model.language_model.named_modules()
    names = {name.rpartition(".")[2] for name, layer in layers if isinstance(layer, nn.Linear)}
    settings.lora_target_modules = rf".*\.language_model\..*\.({'|'.join(sorted(names))})"
    settings.lora_modules_to_save = ["multi_modal_projector", "align_gate"]
    return get_peft_config(settings)


def main(words: list[str] | None = None) -> None:
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
    script, config, settings = parser.parse_args_and_config(words, fail_with_unknown_args=True)
    # the model's code stands beside its weights; read it before you trust it
    config.trust_remote_code = True
    model = AutoModelForImageTextToText.from_pretrained(
        settings.model_name_or_path, dtype="float32", trust_remote_code=True
    )
    rows = load_dataset(script.dataset_name, script.dataset_config, split=script.dataset_train_split)
    if not settings.use_peft:
        train_as_stage_2(model)
    trainer = DPOTrainer(
        model,
        args=config,
        train_dataset=rows.cast_column("images", List(Image())),
        processing_class=AutoProcessor.from_pretrained(settings.model_name_or_path, trust_remote_code=True),
        peft_config=adapters(model, settings),
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model(config.output_dir)


if __name__ == "__main__":
    main()
