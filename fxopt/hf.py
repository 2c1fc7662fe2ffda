"""Importing this module is all that transformers needs to load what `opt.save_pretrained` wrote.

    import fxopt.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("out/")

`import fxopt` alone does not import transformers, which has no other way to learn of a method.
"""

from .emit.pretrained import FxoptConfig, FxoptQuantizer, register

__all__ = ["FxoptConfig", "FxoptQuantizer"]

register()
