"""Finished models in the formats of other programs: GGUF, and ChatGLM3's own layout.

Imports only `storage`, `chatglm3` and the modules at the top of the package.
"""
