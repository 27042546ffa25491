"""
Chat templates of the language-model families that AlignGPT is built on, and how to tell which one a tokenizer needs.

What all of them do:

- `bos_token` (where the family writes one) comes first, `<align>` right behind it if the conversation has an image.
- The image of a user message comes first in it, followed by a newline, and its text is stripped, as in the authors'
  preprocessing. Several images keep their places; those before any text are followed by a newline each. A message
  without an image keeps its text. Content is a string, which may hold `<image>`, or parts.
- A system message may come first. `vicuna_v1` and `llama_2` have the authors' default for it; `mistral` and `gemma`,
  which know no system turn, write it in front of the first user message; `plain` leaves it out with the user's text.
- An answer that comes before the first user message is left out, as in the authors' preprocessing.
- Every answer stands in `{% generation %}` together with the token that ends it (see [`stop_token`]).
- Unknown roles, roles that do not alternate, empty answers, images outside user messages and unknown parts raise
  an error that names the message.

`plain` is the stage-1 format: one image and its caption, no user text, a newline at the end and no EOS.
`mistral` is laid out as by Mistral's tokenizers V2 and V3. `image_token` and `align_token` may be given as variables.

Llama's sentencepiece tokenizers mark the start of a text, which the text behind a placeholder is to the authors' code.
[`with_suffix`] writes that mark into a template, for engines that tokenise what the template gives.
"""

import logging


logger = logging.getLogger(__name__)

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)

# transformers sets this character before control tokens that a user wrote when it sanitises them: no placeholders
_USER_WRITTEN = "\U000f0000"

# how `with_suffix` finds a suffix in a template
_SET = "{{%- set {} = '{}' -%}}"

# Reads `messages` into `chat`: system (a string or none), images (a count), turns (dicts of role and content).
_READ_MESSAGES = """
{%- set image_token = image_token | default('<image>') -%}
{%- set align_token = align_token | default('<align>') -%}
{%- set image_suffix = '' -%}
{%- set head_suffix = '' -%}
{%- set chat = namespace(system=none, images=0, turns=[], next='user') -%}
{%- for message in messages -%}
  {%- set role = message['role'] -%}
  {%- set where = 'message ' ~ loop.index0 ~ ' (' ~ role ~ ')' -%}
  {%- if 'content' not in message -%}
    {{- raise_exception(where ~ ": it has no 'content' but " ~ message | join(', ') ~ '.') -}}
  {%- endif -%}
  {%- set raw = namespace(text='') -%}
  {%- if message['content'] is string -%}
    {%- set raw.text = message['content'] -%}
  {%- elif message['content'] is iterable -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] in ['image', 'image_url'] -%}
        {%- set raw.text = raw.text ~ image_token -%}
      {%- elif part['type'] == 'text' and part['text'] is string -%}
        {%- set raw.text = raw.text ~ part['text'] -%}
      {%- elif part['type'] == 'text' -%}
        {{- raise_exception(where ~ ": a text part has no 'text' but " ~ part | join(', ') ~ '.') -}}
      {%- else -%}
        {{- raise_exception(where ~ ": a part is of type '" ~ part['type'] ~ "'; use 'text' or 'image'.") -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {#- read.front: images before any text, a line each; read.rest: what follows; read.text: all without images -#}
  {%- set read = namespace(text='', images=0, front='', rest='') -%}
  {%- for piece in raw.text.split(image_token) -%}
    {%- set token = '' if loop.first else image_token -%}
    {%- if token and loop.previtem.endswith('USER_WRITTEN') -%}
      {%- set read.text = read.text ~ token -%}
      {%- set read.rest = read.rest ~ token -%}
    {%- elif token and read.text.strip() -%}
      {%- set read.images = read.images + 1 -%}
      {%- set read.rest = read.rest ~ token ~ (image_suffix if piece else '') -%}
    {%- elif token -%}
      {%- set read.images = read.images + 1 -%}
      {%- set read.front = read.front ~ token ~ image_suffix ~ '\\n' -%}
    {%- endif -%}
    {%- set read.text = read.text ~ piece -%}
    {%- set read.rest = read.rest ~ piece -%}
  {%- endfor -%}
  {%- if read.images and role != 'user' -%}
    {{- raise_exception(where ~ ': it holds an image; move it into a user message.') -}}
  {%- endif -%}
  {%- if role == 'system' -%}
    {%- if not loop.first -%}
      {{- raise_exception(where ~ ': a system message must be the first one.') -}}
    {%- endif -%}
    {%- set chat.system = read.text -%}
  {%- elif role not in ['user', 'assistant'] -%}
    {{- raise_exception(where ~ ": unknown role; use 'system', 'user' or 'assistant'.") -}}
  {%- elif role == 'assistant' and not chat.turns -%}
    {#- an answer to nothing: left out -#}
  {%- elif role != chat.next -%}
    {{- raise_exception(where ~ ': roles must alternate between user and assistant, join or split the messages.') -}}
  {%- elif role == 'assistant' -%}
    {%- if not read.text.strip() -%}
      {{- raise_exception(where ~ ': the answer is empty; write one or leave the message out.') -}}
    {%- endif -%}
    {%- set chat.turns = chat.turns + [{'role': role, 'content': read.text}] -%}
    {%- set chat.next = 'user' -%}
  {%- else -%}
    {%- if read.images == 1 -%}
      {%- set read.front = image_token ~ image_suffix ~ '\\n' -%}
      {%- set read.rest = read.text -%}
    {%- endif -%}
    {%- if read.images -%}
      {%- set read.text = (read.front ~ read.rest.strip()).strip() -%}
    {%- endif -%}
    {%- set chat.images = chat.images + read.images -%}
    {%- set chat.turns = chat.turns + [{'role': role, 'content': read.text}] -%}
    {%- set chat.next = 'assistant' -%}
  {%- endif -%}
{%- endfor -%}
{%- if not chat.turns -%}
  {{- raise_exception('The conversation has no user message: add one.') -}}
{%- endif -%}
{%- set align = align_token if chat.images else '' -%}
""".replace("USER_WRITTEN", _USER_WRITTEN)

_VICUNA_V1 = """
{%- set system = chat.system if chat.system is not none else "VICUNA_SYSTEM" -%}
{%- set head = (bos_token or '') ~ align -%}
{{- head ~ (head_suffix if head else '') ~ system ~ (' ' if system else '') -}}
{%- for turn in chat.turns -%}
  {%- if turn['role'] == 'user' -%}
    {{- 'USER: ' ~ turn['content'] ~ (image_suffix if turn['content'].endswith(image_token) else '') ~ ' ' -}}
  {%- else -%}
    {{- 'ASSISTANT:' -}}
    {%- generation -%}{{- ' ' ~ turn['content'] ~ eos_token -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
""".replace("VICUNA_SYSTEM", VICUNA_SYSTEM)

_LLAMA_2 = """
{%- set system = chat.system if chat.system is not none else "LLAMA_2_SYSTEM" -%}
{%- for turn in chat.turns -%}
  {%- if turn['role'] == 'user' -%}
    {{- (bos_token or '') ~ (align ~ head_suffix if loop.first else '') ~ '[INST] ' -}}
    {%- if loop.first and system -%}{{- '<<SYS>>\\n' ~ system | trim ~ '\\n<</SYS>>\\n\\n' -}}{%- endif -%}
    {{- turn['content'] | trim ~ (image_suffix if turn['content'].endswith(image_token) else '') ~ ' [/INST]' -}}
  {%- else -%}
    {%- generation -%}{{- ' ' ~ turn['content'] | trim ~ ' ' ~ eos_token -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
""".replace("LLAMA_2_SYSTEM", LLAMA_2_SYSTEM)

_PLAIN = """
{%- if not chat.images or chat.turns | length > 2 -%}
  {{- raise_exception('The plain template takes one user message with an image and one caption: '
      ~ 'use another template for text and for conversations.') -}}
{%- endif -%}
{{- (bos_token or '') ~ align ~ image_token * chat.images -}}
{%- if chat.turns | length == 2 -%}
  {%- generation -%}{{- chat.turns[1]['content'] ~ '\\n' -}}{%- endgeneration -%}
{%- endif -%}
"""

_CHATML = """
{%- if bos_token and bos_token != '<|im_start|>' -%}{{- bos_token -}}{%- endif -%}
{{- align -}}
{%- if chat.system is not none -%}{{- '<|im_start|>system\\n' ~ chat.system ~ '<|im_end|>\\n' -}}{%- endif -%}
{%- for turn in chat.turns -%}
  {{- '<|im_start|>' ~ turn['role'] ~ '\\n' -}}
  {%- if turn['role'] == 'user' -%}
    {{- turn['content'] ~ '<|im_end|>' -}}
  {%- else -%}
    {%- generation -%}{{- turn['content'] ~ '<|im_end|>' -}}{%- endgeneration -%}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_LLAMA_3 = """
{{- (bos_token or '') ~ align -}}
{%- macro header(role) -%}{{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' -}}{%- endmacro -%}
{%- if chat.system is not none -%}{{- header('system') ~ chat.system | trim ~ '<|eot_id|>' -}}{%- endif -%}
{%- for turn in chat.turns -%}
  {{- header(turn['role']) -}}
  {%- if turn['role'] == 'user' -%}
    {{- turn['content'] | trim ~ '<|eot_id|>' -}}
  {%- else -%}
    {%- generation -%}{{- turn['content'] | trim ~ '<|eot_id|>' -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- header('assistant') -}}{%- endif -%}
"""

_MISTRAL = """
{%- set head = (bos_token or '') ~ align -%}
{{- head ~ (head_suffix if head else '') -}}
{%- for turn in chat.turns -%}
  {%- if turn['role'] == 'user' -%}
    {{- '[INST] ' ~ (chat.system ~ '\\n\\n' if loop.first and chat.system else '') ~ turn['content'] -}}
    {{- (image_suffix if turn['content'].endswith(image_token) else '') ~ '[/INST]' -}}
  {%- else -%}
    {%- generation -%}{{- ' ' ~ turn['content'] | trim ~ eos_token -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
"""

_GEMMA = """
{{- (bos_token or '') ~ align -}}
{%- for turn in chat.turns -%}
  {%- if turn['role'] == 'user' -%}
    {{- '<start_of_turn>user\\n' ~ (chat.system ~ '\\n\\n' if loop.first and chat.system else '') -}}
    {{- turn['content'] | trim ~ '<end_of_turn>' -}}
  {%- else -%}
    {{- '<start_of_turn>model\\n' -}}
    {%- generation -%}{{- turn['content'] | trim ~ '<end_of_turn>' -}}{%- endgeneration -%}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

_PHI = """
{{- align -}}
{%- if chat.system is not none -%}{{- '<|system|>\\n' ~ chat.system ~ '<|end|>\\n' -}}{%- endif -%}
{%- for turn in chat.turns -%}
  {{- '<|' ~ turn['role'] ~ '|>\\n' -}}
  {%- if turn['role'] == 'user' -%}
    {{- turn['content'] ~ '<|end|>' -}}
  {%- else -%}
    {%- generation -%}{{- turn['content'] ~ '<|end|>' -}}{%- endgeneration -%}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}
"""

_BODIES = {
    "vicuna_v1": _VICUNA_V1,
    "llama_2": _LLAMA_2,
    "plain": _PLAIN,
    "chatml": _CHATML,
    "llama_3": _LLAMA_3,
    "mistral": _MISTRAL,
    "gemma": _GEMMA,
    "phi": _PHI,
}

CHAT_TEMPLATES: dict[str, str] = {name: (_READ_MESSAGES + body).strip() for name, body in _BODIES.items()}

# What a family is known by: all strings of one row, looked for in its template first, then in its vocabulary.
_MARKS = (
    ("chatml", ("<|im_start|>", "<|im_end|>")),
    ("llama_3", ("<|start_header_id|>", "<|eot_id|>")),
    ("gemma", ("<start_of_turn>", "<end_of_turn>")),
    ("phi", ("<|user|>", "<|end|>")),
    ("phi", ("'<|'", "<|end|>")),
    ("llama_2", ("<<SYS>>", "[INST]")),
    ("mistral", ("[INST]", "[/INST]")),
    ("vicuna_v1", ("USER:", "ASSISTANT:")),
)
_STOP_TOKENS = {"chatml": "<|im_end|>", "llama_3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi": "<|end|>"}


def select_chat_template(tokenizer) -> str:
    """
    Name of the template in [`CHAT_TEMPLATES`] for a language model.

    Args:
        tokenizer: the language model's tokenizer. Its own chat template decides; without one (a base model) its
            vocabulary does. What neither tells gets `vicuna_v1`, which needs no token but EOS, and a warning unless it
            has no template of its own.

    Raises:
        ValueError: the family is unknown and the tokenizer has no EOS, so that answers could not end.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()), None)
    # a template's quotes and line breaks do not matter here
    for haystack in (own or "", tokenizer.get_vocab()):
        for name, marks in _MARKS:
            if all(mark in haystack for mark in marks):
                return name
    if tokenizer.eos_token is None:
        raise ValueError(
            f"{tokenizer.name_or_path or type(tokenizer).__name__}: no chat template fits this tokenizer, and it has "
            "no EOS token; set tokenizer.eos_token or name a template."
        )
    if own:
        logger.warning("The tokenizer's chat template is of no known family: vicuna_v1 is used instead.")
    return "vicuna_v1"


def with_suffix(template: str, suffix: str, tokenizer) -> str:
    """
    A template of this module that writes `suffix` (see [`~new_processor.infer_image_suffix`]) where the processor
    would: behind `<image>`, and behind BOS and `<align>` in front of text.
    """
    if not suffix:
        return template
    # where the format begins with a token of its own, no text stands behind BOS
    head = "" if "[INST]" in template and "[INST]" in tokenizer.get_added_vocab() else suffix
    for name, value in (("image_suffix", suffix), ("head_suffix", head)):
        template = template.replace(_SET.format(name, ""), _SET.format(name, value))
    return template


def stop_token(name: str, tokenizer) -> str:
    """
    The token that ends an answer in the template `name`, which generation has to stop at: a family's own end of turn
    or the tokenizer's EOS. For `plain`, whose captions end with a newline, it is EOS, which stage 1 never trains.
    """
    if name not in CHAT_TEMPLATES:
        raise ValueError(f"chat_template={name!r} is not one of {', '.join(CHAT_TEMPLATES)}.")
    return _STOP_TOKENS.get(name, tokenizer.eos_token)


__all__ = ["CHAT_TEMPLATES", "select_chat_template", "stop_token", "with_suffix"]
