"""What the flags of LLaVA's launch scripts, of TRL's and of older transformers are called here."""

from collections.abc import Container


# a setting of ours, or a sentence on why none is needed
ELSEWHERE = {
    "data_path": "dataset",
    "train_file": "dataset",
    "dataset_test_split": "eval_split",
    "dataset_streaming": "streaming",
    "dataset_image_folder": "image_folder",
    "mm_projector_lr": "projector_learning_rate",
    "model_max_length": "max_length",
    "max_seq_length": "max_length",
    "version": "chat_template",
    "lora_enable": "use_peft",
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "group_by_modality_length": "group_by",
    "group_by_length": "group_by",
    "overwrite_output_dir": "overwrite",
    "mm_vision_tower": "vision_tower",
    "warmup_ratio": "a share of the steps is `warmup_steps` below 1: --warmup_steps 0.03",
    "bits": "four bits are `load_in_4bit`, with `use_peft`: --use_peft true --load_in_4bit true",
    "double_quant": "use_bnb_nested_quant",
    "quant_type": "bnb_4bit_quant_type",
    "pretrain_mm_mlp_adapter": "stage 2 reads stage 1's projector from its output folder: --model STAGE1",
    "tune_mm_mlp_adapter": "the stage decides what trains: `aligngpt pretrain` the projector and the levels",
    "freeze_backbone": "the stage decides what trains: `aligngpt pretrain` leaves the language model as it is",
    "freeze_mm_mlp_adapter": "the stage decides what trains: `aligngpt instruct` trains the projector, too",
    "mm_projector_type": "the projector is LLaVA's mlp2x_gelu: leave it out",
    "mm_vision_select_layer": "--config_overrides '{\"vision_feature_layer\": -2}', which is the default",
    "mm_vision_select_feature": '--config_overrides \'{"vision_feature_select_strategy": "default"}\' is the default',
    "mm_patch_merge_type": "an image has one grid of patches: leave it out",
    "mm_use_im_start_end": "`<image>` stands alone, as with False: leave it out",
    "mm_use_im_patch_token": "`<image>` stands alone, as with False: leave it out",
    "lazy_preprocess": "rows are always read as they are needed: leave it out",
    "is_multimodal": "rows may have images or none: leave it out",
    "lora_bias": "adapters have no biases: leave it out",
}


def other_name(flag: str, valid: Container[str]) -> str | None:
    """
    `; here it is ...` for a flag of another tool.

    Args:
        flag: as it was given, with or without hyphens.
        valid: the settings of the command; another command's are not proposed.
    """
    known = ELSEWHERE.get(flag.lstrip("-").replace("-", "_"))
    if known is None:
        return None
    if " " in known:
        return f"; {known}"
    prefix = "--" if flag.startswith("-") else ""
    return f"; here it is {prefix}{known}" if f"{prefix}{known}" in valid else None
