"""A merged tokenizer as a folder that `AutoTokenizer.from_pretrained` loads without remote code.

    tokenizer.model        for sentencepiece, and for the pipeline itself
    tokenizer.json         the same BPE for the `tokenizers` library, with the same ids
    tokenizer_config.json  names of the special tokens, padding side, chat template

The two differ for a text that spells a special token. sentencepiece always reads it as text.
transformers turns it into the token unless `split_special_tokens=True` is passed; the chat template
therefore breaks such a spelling inside a message with a space.

Like ChatGLM3's own tokenizer, the transformers one puts [gMASK] sop before a text, unless
`add_special_tokens=False` is passed. So tools that know nothing of ChatGLM3 feed the model texts in
the form it was trained on.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chatglm_ja.chatglm3.chat_format import INPUT_PREFIX, OTHER_ROLES, ROLES, TOOLS_PROMPT
from chatglm_ja.chatglm3.tokenizer import FIRST_PIECES, MODEL_FILE, SPACE, SPECIAL_TOKENS
from chatglm_ja.messages import TEXT_PARTS
from chatglm_ja.storage.files import write_json

TOKENIZER_FILES = (MODEL_FILE, "tokenizer.json", "tokenizer_config.json")

# sop and eop occur in words (philosophy, people): they are special only as separate words.
WORD_TOKENS = [token for token in SPECIAL_TOKENS if token.isalpha()]
MARKED_TOKENS = [*FIRST_PIECES, *(token for token in SPECIAL_TOKENS if not token.isalpha())]

TEMPLATE_ROLES = {role: role for role in ROLES} | OTHER_ROLES
# What Python's repr escapes, as far as the texts of calls hold it.
ESCAPED = "\\\n\r\t\xa0\u200b\u200c\u200d\u3000\ufeff"


def _jinja_string(text: str) -> str:
    """Write a text as a string of Jinja, whose only escapes in llama.cpp are of one letter."""
    for character, letter in (("\\", "\\"), ("\n", "n"), ("\r", "r"), ("\t", "t"), ("'", "'")):
        text = text.replace(character, f"\\{letter}")
    return f"'{text}'"


_ESCAPES = ", ".join(
    f"[{_jinja_string(character)}, {_jinja_string(repr(character)[1:-1])}]" for character in ESCAPED
)

# chat_format.build_example as text; with add_generation_prompt build_prompt_ids. {% generation %}
# holds what the labels train. Tools, calls and the roles `tool` and `developer` are those of
# OpenAI's messages, written as chat_format writes them.
#
# The generation prompt goes on to the line break that ends an empty header. A model that had to
# generate it would start every answer of a server with it. If there are tools, the header may
# become the name of one, so the model generates it, as in ChatGLM3's own chat.
#
# `plain` returns a text with a space inside every special token that it spells. It leaves sop and
# eop alone beside a letter that has two cases, a digit or an underscore, where they would not
# become the token. `literal` writes a value as Python does.
#
# Only features are used that transformers, llama.cpp and the npm package @huggingface/jinja share.
# transformers finds {% generation %} outside macros only. A block of it ends with the token after
# the answer, because transformers does not mark the later bytes of a character that ends a block.
CHAT_TEMPLATE = (
    f"{{% set marked_tokens = {MARKED_TOKENS} %}}\n"
    f"{{% set word_tokens = {WORD_TOKENS} %}}\n"
    f"{{% set word_characters = {list('0123456789_')} %}}\n"
    f"{{% set roles = {TEMPLATE_ROLES} %}}\n"
    f"{{% set role_names = {', '.join(TEMPLATE_ROLES)!r} %}}\n"
    f"{{% set escapes = [{_ESCAPES}] %}}\n"
    f"{{% set tools_prompt = {_jinja_string(TOOLS_PROMPT)} %}}\n"
    f"{{% set text_parts = {list(TEXT_PARTS)} %}}\n"
    """\
{% macro plain(text) %}
{% set result = namespace(text=text) %}
{% for token in marked_tokens %}
{% set result.text = result.text.replace(token, token[0] ~ ' ' ~ token[1:]) %}
{% endfor %}
{% for token in word_tokens %}
{% set parts = result.text.split(token) %}
{% set result.text = parts[0] %}
{% for part in parts[1:] %}
{% set before = result.text[-1:] %}
{% set after = part[:1] if part or loop.last else token[0] %}
{% set touched = before|upper != before|lower or before in word_characters
    or after|upper != after|lower or after in word_characters %}
{% set result.text = result.text ~ (token if touched else token[0] ~ ' ' ~ token[1:]) ~ part %}
{% endfor %}
{% endfor %}
{{ result.text }}{% endmacro %}
{% macro literal(value) %}
{% if value is string %}
{% set result = namespace(text=value) %}
{% for pair in escapes %}
{% set result.text = result.text.replace(pair[0], pair[1]) %}
{% endfor %}
{% if "'" in value and '"' not in value %}
{{ '"' ~ result.text ~ '"' }}
{%- else %}
{{ "'" ~ result.text.replace("'", "\\\\'") ~ "'" }}
{%- endif %}
{% elif value is mapping %}
{{ '{' }}{% for name, item in value|items %}
{{ literal(name) }}: {{ literal(item) }}{{ '' if loop.last else ', ' }}
{%- endfor %}{{ '}' }}
{%- elif value is boolean %}
{{ 'True' if value else 'False' }}
{%- elif value is none %}
{{ 'None' }}
{%- elif value is iterable %}
[{% for item in value %}{{ literal(item) }}{{ '' if loop.last else ', ' }}{% endfor %}]
{%- else %}
{{ value }}
{%- endif %}
{% endmacro %}
{% macro write(turn) %}
{{ plain(turn.header) }}
{% if turn.text %} {{ plain(turn.text) }}{% endif %}{% endmacro %}
{% set chat = namespace(turns=[], text='', code='', tools=false) %}
{% if tools %}
{% set chat.tools = true %}
{% set text = tools_prompt ~ tools|tojson(indent=4) %}
{% set chat.turns = [{'role': 'system', 'header': '', 'text': text, 'trained': false}] %}
{% endif %}
{% for message in messages %}
{% if message.role not in roles %}
{{ raise_exception('role ' ~ message.role ~ ' does not exist: expected ' ~ role_names) }}
{% endif %}
{% set role = roles[message.role] %}
{% set trained = role == 'assistant' and (message.loss is not defined or message.loss) %}
{% set calls = message.tool_calls or [] %}
{% set content = '' if calls and not message.content else message.content %}
{% set chat.text = '' %}
{% if content is string %}
{% set chat.text = content %}
{% elif content is not defined or content is mapping or content is not iterable %}
{{ raise_exception('a message has no content of type text') }}
{% else %}
{% for part in content %}
{% if part is not mapping or (part.type or 'text') not in text_parts or part.text is not string %}
{{ raise_exception('a message has a part that is not text') }}
{% endif %}
{% set chat.text = chat.text ~ part.text %}
{% endfor %}
{% endif %}
{% if chat.text or not calls %}
{% set header = message.metadata if message.metadata is string else '' %}
{% set turn = {'role': role, 'header': header, 'text': chat.text, 'trained': trained} %}
{% set chat.turns = chat.turns + [turn] %}
{% endif %}
{% if calls and role != 'assistant' %}
{{ raise_exception('a message of ' ~ message.role ~ ' makes a call: only the assistant calls') }}
{% endif %}
{% if calls|length > 1 %}
{{ raise_exception('a message makes several calls at once: ChatGLM3 makes one at a time') }}
{% endif %}
{% for call in calls %}
{% set function = call.function or call %}
{% set arguments = function.arguments or {} %}
{% if arguments is not mapping %}
{{ raise_exception('the arguments of a call are not an object: parse their JSON first') }}
{% endif %}
{% set chat.code = '' %}
{% for name, value in arguments|items %}
{% set chat.code = chat.code ~ (', ' if chat.code else '') ~ name ~ '=' ~ literal(value) %}
{% endfor %}
{% set text = '```python\\ntool_call(' ~ chat.code ~ ')\\n```' %}
{% set turn = {'role': role, 'header': function.name, 'text': text, 'trained': trained} %}
{% set chat.turns = chat.turns + [turn] %}
{% endfor %}
{% endfor %}
{% for turn in chat.turns %}
{% if turn.header or turn.role == 'observation'
    or turn.role == 'system' and tools_prompt in turn.text %}
{% set chat.tools = true %}
{% endif %}
{% if loop.first %}[gMASK]sop<|{{ turn.role }}|>{% endif %}
{% if not loop.last %}
{% set next = '<|' ~ chat.turns[loop.index].role ~ '|>' %}
{% elif add_generation_prompt %}
{% set next = '<|assistant|>' if chat.tools else '<|assistant|>\\n' %}
{% elif turn.role == 'assistant' %}
{% set next = '<|observation|>' if turn.header else '</s>' %}
{% else %}
{% set next = '' %}
{% endif %}
{% if turn.trained %}{% generation %}{{ write(turn) }}{{ next }}{% endgeneration %}
{% else %}{{ write(turn) }}{{ next }}{% endif %}
{% endfor %}"""
)

# The settings of transformers' tokenizer that are not in tokenizer.json.
SETTINGS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "additional_special_tokens": list(SPECIAL_TOKENS),
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
    "chat_template": CHAT_TEMPLATE,
}


def save_tokenizer(proto: Any, folder: Path) -> None:
    """Write the three files of a merged tokenizer (ModelProto)."""
    (folder / MODEL_FILE).write_bytes(proto.SerializeToString())
    build_fast_tokenizer(proto).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **SETTINGS}
    write_json(folder / "tokenizer_config.json", config, indent=2)


def to_transformers(proto: Any) -> Any:
    """Build in memory the tokenizer that AutoTokenizer loads from the files of `save_tokenizer`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=build_fast_tokenizer(proto), **SETTINGS)


def make_line_encoder(proto: Any) -> Callable[[Sequence[str]], list[list[int]]]:
    """Return a function that tokenizes lines as tokenizer.json will, special tokens as text."""
    tokenizer = build_fast_tokenizer(proto)
    tokenizer.encode_special_tokens = True

    def encode(lines: Sequence[str]) -> list[list[int]]:
        encodings = tokenizer.encode_batch_fast(lines, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    return encode


def build_fast_tokenizer(proto: Any) -> Any:
    """Build a Tokenizer of the `tokenizers` library that is the same BPE as a ModelProto.

    sentencepiece merges any adjacent pair whose concatenation is a piece, best score first. The
    merge list therefore holds every split of every piece into two pieces, ordered by score.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    ranked = []
    for piece, score in scores.items():
        for left, right in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece))):
            if left in scores and right in scores:
                ranked.append((-score, vocab[left], vocab[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    prepare = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence(prepare)
    join = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*join, decoders.Strip(" ", left=1, right=0)])
    for name in (*FIRST_PIECES, *SPECIAL_TOKENS):
        token = AddedToken(name, normalized=False, single_word=name in WORD_TOKENS)
        tokenizer.add_special_tokens([token])
    prefix = " ".join(INPUT_PREFIX)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{prefix} $A",
        pair=f"{prefix} $A $B",
        special_tokens=[(token, vocab[token]) for token in INPUT_PREFIX],
    )
    return tokenizer
