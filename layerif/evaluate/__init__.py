"""Evaluation of a model on a task's test rows.

A metric is one file with two functions:

- `check(settings, questions, max_positions)` refuses, before any weight is loaded, what `run` would refuse;
- `run(settings, questions, model)` measures and returns `Measured`, which holds the values by name.

To add a metric, write such a file and add it to `METRICS` in `evaluation.py`. Every metric is a fraction (0 to 1),
except perplexity and the losses, which are in nats.
"""
