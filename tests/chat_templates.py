"""Chat templates that behave as well-known ones do, a tokenizer that knows their special tokens, and TRL's labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_SPECIAL = re.compile(r"<\|[^|<>\n']{1,40}\|>|<[a-z_]+\|>|<\|[a-z_]+>|<(?:start|end)_of_\w+>|\[/?[A-Z_]+\]"
                      r"|<\uff5c[^\uff5c]{1,40}\uff5c>")
_MARK = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (one token a byte) in which all special tokens of the template are special."""
    special = list(dict.fromkeys(["<s>", "</s>", "<pad>", *_SPECIAL.findall(template)]))
    backend = Tokenizer(models.BPE(
        vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


def unmarked(template: str) -> str:
    """The template without marks for what the assistant writes."""
    return _MARK.sub("", template)


def shipped(name: str) -> str:
    """A template that the installed TRL ships."""
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def shipped_names() -> list[str]:
    """Names of all templates that TRL ships, but for variants with marks."""
    import trl

    return sorted(p.stem for p in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
                  if not p.stem.endswith("_training"))


def shipped_with_marks() -> list[str]:
    """Names of the templates of which TRL ships a variant with marks."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return sorted(p.stem.removesuffix("_training") for p in folder.glob("*_training.jinja"))


def trainer_labels(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Mapping[str, Any]],
                   **options: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each row as TRL's own `SFTTrainer` prepares them."""
    import tempfile

    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=512, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list([dict(r) for r in rows]),
            args=SFTConfig(output_dir=folder, report_to=[], max_length=None, use_cpu=True, bf16=False, **options))
        return [(list(r["input_ids"]), list(r["labels"])) for r in trainer.train_dataset]


# Like Qwen3: the reasoning of earlier turns is dropped, and the last turn always has a block of it.
QWEN3 = """{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{%- if loop.index0 > ns.last %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}{%- endif %}
{{- m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Like Llama-3: roles in a header, contents trimmed, one mark for the end of each turn.
LLAMA3 = """{{- bos_token }}{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{%- if m.role == 'assistant' %}{%- generation %}{{- m.content | trim + '<|eot_id|>' }}{%- endgeneration %}
{%- else %}{{- m.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# Like Gemma-3: the system message is written into the first user's; the assistant is called model.
GEMMA3 = """{{- bos_token }}{%- set ns = namespace(first='') %}
{%- if messages[0].role == 'system' %}{%- set ns.first = messages[0].content + '\\n\\n' %}{%- endif %}
{%- for m in messages %}{%- if m.role != 'system' %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{%- if m.role == 'assistant' %}{%- generation %}{{- m.content | trim + '<end_of_turn>\\n' }}{%- endgeneration %}
{%- else %}{{- ns.first + m.content | trim + '<end_of_turn>\\n' }}{%- set ns.first = '' %}{%- endif %}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

# Like GLM-4: nothing ends a turn but the role of the next one.
GLM4 = """{{- '[gMASK]<sop>' }}{%- for m in messages %}
{%- if loop.first or messages[loop.index0 - 1].role != 'assistant' %}{{- '<|' + m.role + '|>' }}{%- endif %}
{%- if m.role == 'assistant' %}{%- generation %}{{- '\\n' + m.content }}
{%- if not loop.last %}{{- '<|' + messages[loop.index0 + 1].role + '|>' }}{%- endif %}{%- endgeneration %}
{%- else %}{{- '\\n' + m.content }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}{# <|user|> <|system|> <|tool|> <|assistant|> #}"""

# Like Mistral: roles between brackets, a blank before what the assistant says, EOS after it.
MISTRAL = """{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' %}
{%- generation %}{{- ' ' + m.content + eos_token }}{%- endgeneration %}
{%- else %}{{- '[INST] ' + m.content + ' [/INST]' }}{%- endif %}{%- endfor %}"""

# Like GPT-OSS: channels, reasoning only in the last turn, another mark for the end of the last turn.
GPTOSS = """{%- for m in messages %}{{- '<|start|>' + m.role }}{%- if m.role == 'assistant' %}
{%- if loop.last and m.thinking %}{{- '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}
{%- endif %}{{- '<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else %}{{- '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

LIKE = {"qwen3": QWEN3, "llama3": LLAMA3, "gemma3": GEMMA3, "glm4": GLM4, "mistral": MISTRAL, "gptoss": GPTOSS}
