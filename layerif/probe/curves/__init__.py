"""Loss curves from one gradient pass: `request` asks for them, `measure` takes them, `prices` has the formulas.

`formats` asks for the curves of number formats. `text` holds the samples whose loss is watched.
"""
