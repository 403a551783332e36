"""ChatGLM3 base models: `Base`, configuration, tokenizer, chat format, weights, and layouts.

Imports the top-level modules and `storage`. A second family of bases would be a room beside it.
"""
