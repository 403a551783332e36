"""What the seven steps share: vocabulary, checkpoint, packing, training, evaluation.

The steps import this package; it never imports a step nor `constants.py`. Every path and setting
is passed in, so each module can be used and tested on its own in any folder.
"""
