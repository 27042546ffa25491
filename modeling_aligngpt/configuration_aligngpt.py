"""Configuration of AlignGPT (arXiv 2405.14129): a vision tower, a projector, a language model and alignment levels."""

import math
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PretrainedConfig
from transformers.utils.chat_template_utils import render_jinja_template

from .compat_v4 import portable_rope, without_old_rope


# of the code that a saved folder brings along
VERSION = "0.2.0.dev0"

ALIGN_MODES = ("level", "gate", "local", "global", "mean", "fixed", "random", "mean_of_all")
GATE_CONTEXTS = ("first_turn", "prompt", "sequence")

# What a saved repository declares, so that every Auto class of both transformers generations finds its class.
AUTO_MAP = {
    "AutoConfig": "configuration_aligngpt.AlignGPTConfig",
    "AutoModel": "modeling_aligngpt.AlignGPTModel",
    "AutoModelForImageTextToText": "modeling_aligngpt.AlignGPTForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_aligngpt.AlignGPTForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_aligngpt.AlignGPTForConditionalGeneration",
    "AutoProcessor": "processing_aligngpt.AlignGPTProcessor",
}


class AlignGPTConfig(PretrainedConfig):
    """
    Configuration of [`AlignGPTModel`] and [`AlignGPTForConditionalGeneration`].

    Args:
        vision_config (`dict` or `PretrainedConfig`, *optional*): the vision tower's; default CLIP ViT-L/14-336.
        text_config (`dict` or `PretrainedConfig`, *optional*): the language model's; default Llama.
        image_token_id (`int`): id of `<image>`, repeated `image_seq_length` times for each image.
        align_token_id (`int`): id of `<align>`, the place of the alignment vector, right behind BOS.
        image_seq_length (`int`, *optional*): positions that an image takes; follows from the tower when `None`.
        vision_feature_layer (`int`): which hidden state of the tower is projected (-2: the last layer but one).
        vision_feature_select_strategy (`str`, *optional*): `"default"` drops class token and registers, `"full"` keeps
            every token; `None` takes the first where the tower has such tokens (SigLIP has none).
        vision_scales (`list[int]`, *optional*): the tower looks at the image at these multiples of its own size, in
            tiles, and the features of all scales are joined on channels (S2, arXiv 2403.13043); `[1, 2, 3]` is the
            paper's 336/672/1008 variant. An image keeps its `image_seq_length`. `None`: the tower's size alone.
        projector_hidden_act (`str`): activation between the two layers of projector and gate.
        num_align_levels (`int`): N, the size of the level table (paper: 8). The last level is the global alignment.
        gate_hidden_size (`int`): width of the gate's hidden layer (authors' release: 256).
        align_mode (`str`): what the alignment vector is when the caller names no level:
            `"level"` (stage 1; in stage 2 ours) the row `default_align_level` of the table;
            `"gate"` (stage 2) the gate's mix of levels 0..N-2 plus level N-1.
            The paper's ablations: `"local"` the mix alone, `"global"` level N-1 alone, `"mean"` the mean of levels
            0..N-2 plus level N-1. Ours: `"fixed"` as `"level"`, whatever the rows bring (the authors' code has it when
            the model is asked, not in training), `"random"` as `"gate"`, with a table that stage 2 draws afresh,
            `"mean_of_all"` the mean of the whole table: what 0.1.0 called `"mean"`, and models that it saved are.
        default_align_level (`int`, *optional*): 0-based level of modes `"level"` and `"fixed"`; `None` is the top one.
        gate_context (`str`): what the gate's mean text embedding is made of. `"first_turn"`: what stands in front of
            the first answer, in training and whenever the model is asked. `"sequence"`: everything, as in the authors'
            code: answers too in training, earlier ones when asked. `"prompt"`: what 0.1.0 had besides; models that it
            saved read as with `"sequence"`.
        answer_openings (`list[list[int]]`, *optional*): token ids that the chat template writes in front of an answer,
            which begins where one of these lists first stands; see [`answer_openings`]. `None`: none is known,
            and the gate reads everything.
        training_stage (`str`, *optional*): the last stage this model went through: `None`, `"pretrain"`, `"instruct"`.
        lm_head_bias (`bool`): whether the language modelling head has a bias (Phi-1.5 and Phi-2 have one).

    Raises:
        ValueError: for a value outside these, or a tower whose grid does not give `image_seq_length` positions.
    """

    model_type = "aligngpt"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        image_token_id=32000,
        align_token_id=32001,
        image_seq_length=None,
        vision_feature_layer=-2,
        vision_feature_select_strategy=None,
        vision_scales=None,
        projector_hidden_act="gelu",
        num_align_levels=8,
        gate_hidden_size=256,
        align_mode="gate",
        default_align_level=None,
        gate_context="first_turn",
        answer_openings=None,
        training_stage=None,
        lm_head_bias=False,
        **kwargs,
    ):
        self.vision_config = _sub_config(vision_config, "clip_vision_model", _CLIP_VIT_L_336)
        self.text_config = _sub_config(text_config, "llama", {})
        self.image_token_id = image_token_id
        self.align_token_id = align_token_id
        self.vision_feature_layer = vision_feature_layer
        strategy = vision_feature_select_strategy or ("default" if self.num_prefix_tokens else "full")
        self.vision_feature_select_strategy = strategy
        self.vision_scales = None if vision_scales is None else list(vision_scales)
        self.projector_hidden_act = projector_hidden_act
        self.num_align_levels = num_align_levels
        self.gate_hidden_size = gate_hidden_size
        # of what was loaded: what is saved is written by this code
        saved_by = kwargs.pop("aligngpt_version", None)
        self.aligngpt_version = VERSION
        # a saved model keeps the mixture that it was trained with
        self.align_mode = "mean_of_all" if (saved_by, align_mode) == ("0.1.0", "mean") else align_mode
        self.default_align_level = default_align_level
        self.gate_context = gate_context
        self.answer_openings = answer_openings
        self.training_stage = training_stage
        self.lm_head_bias = lm_head_bias
        self.image_seq_length = image_seq_length if image_seq_length is not None else self._tower_seq_length()
        self._check_values()
        kwargs.setdefault("tie_word_embeddings", bool(getattr(self.text_config, "tie_word_embeddings", False)))
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As the parent's, but refuses another model's config, whose missing fields would take AlignGPT's defaults."""
        _check_kind({"model_type": cls.model_type, **config_dict}, kwargs.get("name_or_path"))
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As the parent's, but refuses what [`from_dict`] refuses, by the name of its folder."""
        values, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        _check_kind(values, pretrained_model_name_or_path)
        return values, unused

    def _tower_seq_length(self) -> int | None:
        """Tokens that the tower yields for one image after `vision_feature_select_strategy`; None if unknown."""
        image_size = getattr(self.vision_config, "image_size", None)
        patch_size = getattr(self.vision_config, "patch_size", None)
        if not isinstance(image_size, int) or not isinstance(patch_size, int):
            return None
        num_patches = (image_size // patch_size) ** 2
        return num_patches + (self.num_prefix_tokens if self.vision_feature_select_strategy == "full" else 0)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens that the tower puts in front of its patches: class token and registers."""
        special = _PREFIX_TOKENS.get(self.vision_config.model_type, 1)
        return special + (getattr(self.vision_config, "num_register_tokens", None) or 0)

    @property
    def uses_gate(self) -> bool:
        """Whether the gate decides, unless the caller names a level."""
        return self.align_mode in ("gate", "local", "random")

    @property
    def head_scale(self) -> float:
        """
        The factor on the language model's logits, before a soft cap. Each family names it differently; the order is
        TRL's, whose loss must see the same logits.
        """
        text = self.text_config
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
            if getattr(text, name, None) is not None:
                return float(getattr(text, name))
        scaling = getattr(text, "logits_scaling", None)
        if scaling is None:
            return 1.0
        return float(scaling) if text.model_type == "hyperclovax" else 1.0 / scaling

    @property
    def projector_in_features(self) -> int:
        """Channels of an image's position before the projector."""
        return self.vision_config.hidden_size * len(self.vision_scales or (1,))

    @property
    def input_image_size(self) -> int | tuple[int, int] | None:
        """
        Height and width of the images that the model takes, the tower's times the largest of `vision_scales`; `None`
        if the tower's config does not say.
        """
        size, factor = getattr(self.vision_config, "image_size", None), (self.vision_scales or (1,))[-1]
        return size * factor if isinstance(size, int) else size

    def _check_values(self):
        for name, allowed in (
            ("align_mode", ALIGN_MODES),
            ("gate_context", GATE_CONTEXTS),
            ("vision_feature_select_strategy", ("default", "full")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}.")
        if self.num_align_levels < 2:
            raise ValueError(f"num_align_levels={self.num_align_levels}: 2 are needed (a local and the global).")
        level = self.default_align_level
        if level is not None and not 0 <= level < self.num_align_levels:
            raise ValueError(f"default_align_level={level} is not in 0..{self.num_align_levels - 1}.")
        self._check_scales()
        expected = self._tower_seq_length()
        if self.image_seq_length is None:
            raise ValueError("image_seq_length must be given: it does not follow from this vision tower's config.")
        if self.num_prefix_tokens == 0 and self.vision_feature_select_strategy == "default":
            raise ValueError('This tower has no class token to drop: set vision_feature_select_strategy="full".')
        if expected is not None and self.image_seq_length != expected:
            raise ValueError(
                f"image_seq_length={self.image_seq_length}, but the vision tower yields {expected} tokens an image "
                f"(image_size {self.vision_config.image_size}, patch_size {self.vision_config.patch_size}): "
                "leave image_seq_length out, or load the tower it belongs to."
            )

    def _check_scales(self):
        scales = self.vision_scales
        if scales is None:
            return
        whole = all(type(scale) is int for scale in scales)
        if not scales or not whole or scales[0] != 1 or scales != sorted(set(scales)):
            raise ValueError(f"vision_scales={scales} must be rising whole numbers from 1 on, such as [1, 2, 3].")
        positions = self._tower_seq_length()
        if positions is None or math.isqrt(positions) ** 2 != positions:
            raise ValueError(
                "vision_scales need a vision tower with square images and a square grid of positions, without a "
                'class token among them (vision_feature_select_strategy="default" for CLIP).'
            )

    def to_diff_dict(self):
        """What `save_pretrained` writes: no local paths, and the field names that 4.57 reads as well."""
        saved = super().to_diff_dict()
        for name in self.sub_configs:
            # where a part was loaded from is nobody else's path
            saved.get(name, {}).pop("_name_or_path", None)
        portable_rope(saved, getattr(self.text_config, "rope_parameters", None))
        return saved


# Tokens in front of the patches besides registers, where it is not the one class token.
_PREFIX_TOKENS = {
    "siglip_vision_model": 0,
    "siglip2_vision_model": 0,
    "aimv2_vision_model": 0,
    "ijepa": 0,
    "deit": 2,  # class and distillation
}

_CLIP_VIT_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _check_kind(values: dict, where) -> None:
    """Refuses the config of another model, and that of the authors' code, whose `model_type` may be the same."""
    kind, whose = str(values.get("model_type", "nameless")), where or "This"
    if kind.startswith("aligngpt_") or any(name.startswith("mm_") for name in values):
        raise ValueError(
            f"{whose} is in the authors' format: convert it with `aligngpt convert --checkpoint {where or 'FOLDER'} "
            "--output DIR`, and use what that writes."
        )
    if kind != AlignGPTConfig.model_type:
        verb = "holds" if where else "is"
        raise ValueError(
            f"{whose} {verb} the config of a {kind} model, not of an AlignGPT: give the folder or id of one."
        )


def _sub_config(value, default_model_type: str, defaults: dict) -> PretrainedConfig:
    """A sub-config from a config, a dict with `model_type`, or nothing."""
    if isinstance(value, PretrainedConfig):
        return value
    values = dict(defaults if value is None else value)
    without_old_rope(values)
    model_type = values.pop("model_type", default_model_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type={model_type!r} of a sub-config is unknown to this transformers version.")
    return CONFIG_MAPPING[model_type](**values)


AlignGPTConfig.register_for_auto_class()


# ---- answer_openings: where the first answer begins, as far as the gate reads (`gate_context="first_turn"`) ----
# Ids know nothing of turns, but a chat template always writes the same between a question and its answer (`ASSISTANT:`,
# `[/INST]`). Its ids stand in the config, and the gate reads up to the end of the first ones in a row: the same in
# training, in every later turn and in front of any cache. A row without them is read whole.

# Tokens may grow together with the end of a question or the beginning of an answer: two questions for each end, the
# common ends first. An image without words ends like the ones with a space.
_QUESTIONS = (
    *("what is it?", "is it so?", "look at it", "name one", "tell.", "describe it.", "say 3", "count to 3", "stop!"),
    *("go on!", "wait ", "one more ", "(a)", "one (or two)", 'is it "a"', 'say "b"', "它", "其它"),
)
_ANSWERS = ("A cat.", "3", '"a"', "(b)")


def answer_openings(tokenizer, chat_template: str | dict[str, str] | None) -> list[list[int]] | None:
    """
    Token ids that a chat template writes between any question and its answer, as many as are always the same.

    Args:
        tokenizer: of the language model.
        chat_template: a Jinja template, or several by name, of which the one called `default` counts.

    Returns:
        One list, or several where the first token depends on what stands in front of it; `None` where the template
        writes nothing there, or takes no conversation of text alone.
    """
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    asked = [[{"role": "user", "content": question}] for question in _QUESTIONS]
    chats = [[*chat, {"role": "assistant", "content": answer}] for chat in asked for answer in _ANSWERS]
    settings = {"chat_template": chat_template, **tokenizer.special_tokens_map}
    try:
        prompts = list(render_jinja_template(asked, add_generation_prompt=True, **settings)[0])
        wholes = list(render_jinja_template(chats, **settings)[0])
    except (TemplateError, TypeError, ValueError):
        return None
    prompt_ids, ids = (tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, wholes))
    prompt_ids = [each for each in prompt_ids for _ in _ANSWERS]
    # of each prompt, what stays of it when an answer stands behind it
    fronts = [prompt[: _common(prompt, whole)] for prompt, whole in zip(prompt_ids, ids, strict=True)]
    openings: list[list[int]] = []
    size = 2 * len(_ANSWERS)
    for start in range(0, len(fronts), size):
        seen, opening = fronts[: start + size], fronts[start]
        for front in fronts[start : start + size]:
            opening = opening[len(opening) - _common(opening[::-1], front[::-1]) :]
        for number, known in enumerate(openings):
            shorter = opening[len(opening) - _common(opening[::-1], known[::-1]) :]
            others = [*openings[:number], *openings[number + 1 :]]
            # not so short that it stands elsewhere, too
            if shorter and all(first_turn_end(front, [shorter, *others]) == len(front) for front in seen):
                openings[number] = shorter
                break
        else:
            openings.append(opening)
    return openings if all(openings) else None


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids are the same from the start on."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def first_turn_end(ids: Sequence[int], openings: list[list[int]] | None) -> int:
    """How many ids stand in front of the first answer: all of them where no opening is found."""
    ids = list(ids)
    ends = (end for end in range(len(ids)) if any(ids[: end + 1][-len(each) :] == each for each in openings or ()))
    return next(ends, len(ids) - 1) + 1


__all__ = ["ALIGN_MODES", "AUTO_MAP", "GATE_CONTEXTS", "VERSION", "AlignGPTConfig", "answer_openings", "first_turn_end"]
