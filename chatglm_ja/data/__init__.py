"""From sources of text and conversations to packed rows of token ids (step 4).

Imports the top-level modules, `storage` and `chatglm3`.
"""
