"""The demo model's tokenizer and chat template: one token per byte of UTF-8, and seven special tokens.

Owns the special tokens and how a conversation is written as text. A printable ASCII character is one token;
any other character is two to four, so that no input is lost and decoding gives the text back exactly.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, SYSTEM, USER, ASSISTANT, END, PAD, RESERVED = (
    "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>", "<|reserved|>",
)  # fmt: skip
SPECIAL_TOKENS = (BOS, SYSTEM, USER, ASSISTANT, END, PAD, RESERVED)
MAX_LENGTH_TOKENS = 512

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
    {{- '<|system|>Tools: ' ~ tools | tojson ~ '<|end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'user' if message['role'] == 'tool' else message['role'] %}
    {%- if role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception("unknown role '" ~ role ~ "': use system, user, assistant or tool") }}
    {%- endif %}
    {{- '<|' ~ role ~ '|>' ~ message['content'] }}
    {%- for call in message['tool_calls'] %}
        {{- '<tool_call>' ~ call['function'] | tojson ~ '</tool_call>' }}
    {%- endfor %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def byte_alphabet() -> list[str]:
    """The byte-level letters of the `tokenizers` library, in a fixed order, all 256 of them."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that puts <|bos|> in front of plain text; the chat template writes it itself."""
    tokens = [*SPECIAL_TOKENS, *byte_alphabet()]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, RESERVED],
        padding_side="left",
        model_max_length=MAX_LENGTH_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
