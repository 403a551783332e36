"""Codes of languages, as sources of a new language are to be labelled."""

import re

# The two-letter codes, a closed list: a language that had none in 2002 gets none any more.
ISO_639_1 = """
    aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de
    dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia
    id ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo
    lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl
    ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk
    tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
"""


def is_language_code(text: str) -> bool:
    """Return whether a text has the form of a language code: ja, ko, yue; not jp, JA, japanese.

    Three letters, for languages without a two-letter code, are taken as they are: ISO 639-3 has
    8,000 of them.
    """
    return text in ISO_639_1.split() or re.fullmatch("[a-z]{3}", text) is not None
