"""What a ChatGLM3 base model is: configuration, tokenizer, chat format, weights, and their layouts.

Imports the top-level modules and `storage`. A second family of bases would be a room beside it.
"""
