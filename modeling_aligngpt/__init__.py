"""AlignGPT (arXiv 2405.14129) for transformers. Importing the package registers it with the Auto classes."""

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .auto import AutoModelForVision2Seq
from .chat_templates import CHAT_TEMPLATES, select_chat_template
from .compat_v4 import IS_TRANSFORMERS_4
from .configuration_aligngpt import ALIGN_MODES, GATE_CONTEXTS, AlignGPTConfig
from .configuration_aligngpt import VERSION as __version__
from .modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTModel, AlignGPTPreTrainedModel
from .processing_aligngpt import AlignGPTProcessor


AutoConfig.register(AlignGPTConfig.model_type, AlignGPTConfig)
AutoModel.register(AlignGPTConfig, AlignGPTModel)
AutoModelForImageTextToText.register(AlignGPTConfig, AlignGPTForConditionalGeneration)
AutoProcessor.register(AlignGPTConfig, AlignGPTProcessor)
if IS_TRANSFORMERS_4:
    AutoModelForVision2Seq.register(AlignGPTConfig, AlignGPTForConditionalGeneration)
else:
    transformers.AutoModelForMultimodalLM.register(AlignGPTConfig, AlignGPTForConditionalGeneration)

__all__ = [
    "ALIGN_MODES",
    "CHAT_TEMPLATES",
    "GATE_CONTEXTS",
    "AlignGPTConfig",
    "AlignGPTForConditionalGeneration",
    "AlignGPTModel",
    "AlignGPTPreTrainedModel",
    "AlignGPTProcessor",
    "AutoModelForVision2Seq",
    "__version__",
    "select_chat_template",
]
