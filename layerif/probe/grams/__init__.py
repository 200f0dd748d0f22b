"""One pass over a model and its samples leaves a Gram matrix per weight matrix, for all blocks at once.

`measure` is the whole; `passes` decides how (several passes where memory is short), `factors` takes the inputs and
output gradients of the linear layers, `projection` makes them smaller first, `processes` divides the work among processes
and lays out one matrix's factors, `products` multiplies them.
"""
