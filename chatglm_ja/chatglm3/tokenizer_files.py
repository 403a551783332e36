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

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chatglm_ja.chatglm3.chat_format import INPUT_PREFIX, ROLES, TOOLS_PROMPT
from chatglm_ja.chatglm3.tokenizer import FIRST_PIECES, MODEL_FILE, SPACE, SPECIAL_TOKENS
from chatglm_ja.storage.files import write_json

TOKENIZER_FILES = (MODEL_FILE, "tokenizer.json", "tokenizer_config.json")

# sop and eop occur in words (philosophy, people): they are special only as separate words.
WORD_TOKENS = [token for token in SPECIAL_TOKENS if token.isalpha()]
MARKED_TOKENS = [*FIRST_PIECES, *(token for token in SPECIAL_TOKENS if not token.isalpha())]

# The prompt of chat_format.build_prompt_ids as text. `plain` returns a message's text with a space
# inside every special token that it spells; sop and eop only where no letter or digit is next to
# them, since only there would they become the token. Tools, calls and the role `tool` are those of
# OpenAI's messages, written as chat_format writes them.
CHAT_TEMPLATE = (
    f"{{% set marked_tokens = {MARKED_TOKENS} %}}\n"
    f"{{% set word_tokens = {WORD_TOKENS} %}}\n"
    f"{{% set roles = {list(ROLES)} %}}\n"
    f"{{% set tools_prompt = {TOOLS_PROMPT!r} %}}\n"
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
{% set touched = before.isalpha() or before.isdecimal() or before == '_'
    or after.isalpha() or after.isdecimal() or after == '_' %}
{% set result.text = result.text ~ (token if touched else token[0] ~ ' ' ~ token[1:]) ~ part %}
{% endfor %}
{% endfor %}
{{ result.text }}{% endmacro %}
{% macro write(role, header, content) %}
<|{{ role }}|>{{ plain(header) }}
{% if content %} {{ plain(content) }}{% endif %}{% endmacro %}
[gMASK]sop{% if tools %}{{ write('system', '', tools_prompt ~ tools|tojson(indent=4)) }}{% endif %}
{% for message in messages %}
{% set role = 'observation' if message['role'] == 'tool' else message['role'] %}
{% set calls = message.get('tool_calls') or [] %}
{% if role not in roles %}
{{ raise_exception('role ' ~ role ~ ' does not exist: expected ' ~ roles|join(', ')) }}
{% endif %}
{% if calls|length > 1 %}
{{ raise_exception('a message makes several calls at once: ChatGLM3 makes one at a time') }}
{% endif %}
{% if message['content'] is not string and not calls %}
{{ raise_exception('a message has no content of type text') }}
{% endif %}
{% if message['content'] or not calls %}
{{ write(role, message.get('metadata') or '', message['content']) }}
{%- endif %}
{% for call in calls %}
{% set function = call.get('function') or call %}
{% set arguments = function['arguments'] or {} %}
{% if arguments is not mapping %}
{{ raise_exception('the arguments of a call are not an object') }}
{% endif %}
{% set code = namespace(text='', comma='') %}
{% for name, value in arguments.items() %}
{% set code.text = code.text ~ code.comma ~ name ~ '=' ~ '%r'|format(value) %}
{% set code.comma = ', ' %}
{% endfor %}
{{ write('assistant', function['name'], '```python\ntool_call(' ~ code.text ~ ')\n```') }}
{%- endfor %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
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


def copy_tokenizer_files(
    source: Path, target: Path, names: Sequence[str] = TOKENIZER_FILES
) -> None:
    """Copy the files that `save_tokenizer` wrote, or some of them, into a model folder."""
    for name in names:
        shutil.copyfile(source / name, target / name)


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
