"""What the first bytes of a text file show: its encoding, and whether it has one record a line.

A file that is wrong as a whole is refused at once, with its cure, instead of line by line.
"""

import codecs
from contextlib import suppress
from pathlib import Path

from chatglm_ja.errors import DataError
from chatglm_ja.source_files import TEXT_FORMATS, file_compression, file_format

# The bytes of a text file by which its encoding and form are recognized.
START_BYTES = 2**16
# The encodings that are recognized, by Python's names, and iconv's names.
ENCODINGS = {
    "cp932": "CP932", "shift_jis": "CP932", "shift_jis_2004": "CP932", "euc_jp": "EUC-JP",
    "euc_jis_2004": "EUC-JP", "iso2022_jp": "ISO-2022-JP", "gb18030": "GB18030", "gbk": "GB18030",
    "gb2312": "GB18030", "big5": "BIG5", "big5hkscs": "BIG5", "cp949": "CP949", "euc_kr": "CP949",
    "utf_16": "UTF-16", "utf_16_le": "UTF-16LE", "utf_16_be": "UTF-16BE", "utf_32": "UTF-32",
    "utf_32_le": "UTF-32LE", "utf_32_be": "UTF-32BE",
}  # fmt: skip


# The encodings of languages, the stricter one first: bytes of the other are seldom valid in it.
LANGUAGE_ENCODINGS = {
    "ja": ("euc_jp", "cp932"), "zh": ("gb18030", "big5"), "ko": ("cp949",)
}  # fmt: skip


def check_start(path: Path, language: str) -> None:
    """Raise DataError if the first bytes of a text file show that it is wrong as a whole.

    Of a short text, several encodings are possible: then one of its language is named.
    """
    if file_format(path) not in TEXT_FORMATS:
        return
    compression, start = file_compression(path), b""
    # Damage is found when the file is read.
    with suppress(*compression.error_types()), compression.open(path) as file:
        start = file.read(START_BYTES)
    if encoding := _guess_encoding(start, language):
        raise DataError(
            f"{path} looks like {encoding}, expected UTF-8: convert it with "
            f"`iconv -f {encoding} -t UTF-8`"
        )
    if file_format(path) != "jsonl":
        return
    first, _, rest = start.removeprefix(codecs.BOM_UTF8).strip().partition(b"\n")
    if first.startswith(b"[") and (first.strip() == b"[" or first[1:].lstrip().startswith(b"{")):
        raise DataError(
            f"{path} is one JSON list, expected an object on each line: give it a name that ends "
            "with .json"
        )
    if first.strip() == b"{" and rest.lstrip().startswith(b'"'):
        raise DataError(
            f"{path} has JSON objects over several lines, expected one on each line: convert it "
            "with `jq -c .`"
        )


def _guess_encoding(start: bytes, language: str) -> str | None:
    """Return iconv's name of the encoding that a file is in, from its start; None for UTF-8.

    A few bad lines do not make another encoding: most lines that are not ASCII must be bad.
    """
    is_wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start
    if is_wide:
        start = start[: len(start) // 4 * 4]
    elif b"\x1b$" not in start:
        if len(start) == START_BYTES:  # the last line may be cut inside a character
            start = start[: start.rfind(b"\n") + 1] or start
        lines = [line for line in start.split(b"\n") if not line.isascii()]
        if 2 * sum(not _decodes(line, "utf-8") for line in lines) <= len(lines):
            return None
    import charset_normalizer

    best = charset_normalizer.from_bytes(start).best()
    name = ENCODINGS.get(best.encoding) if best else None
    if name and not is_wide and not start.isascii():
        own = [e for e in LANGUAGE_ENCODINGS.get(language, ()) if _decodes(start, e)]
        if own and name not in {ENCODINGS[encoding] for encoding in own}:
            name = ENCODINGS[own[0]]
    return name if name and name.startswith("UTF") == is_wide else None


def _decodes(text: bytes, encoding: str) -> bool:
    try:
        text.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
