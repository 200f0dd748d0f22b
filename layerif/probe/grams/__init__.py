"""One pass over a model and its samples leaves a Gram matrix per weight matrix, for all blocks at once.

`request` asks for the Grams, and `measure` takes them. `gather` runs the passes and hands the factors of one matrix
after another to a function, as other measurements do, too. `passes` decides on the way (several passes where memory is
short), `factors` takes the inputs and output gradients of the linear layers, `projection` makes them smaller first,
`waiting` holds them until all batches are through, `processes` divides the work among processes and lays out the
factors of one matrix, and `products` multiplies them.
"""
