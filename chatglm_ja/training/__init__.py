"""Continued pretraining and fine-tuning (steps 5 and 6): LoRA plus the embeddings in full.

Imports the top-level modules, `storage`, `chatglm3` and `data`.
"""
