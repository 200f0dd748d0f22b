"""The trust report: evidence for and against what influence says about a model, a task and an estimator.

One question a file, pure arithmetic on Grams, influences and losses: `leave_out` (does predicted loss change match
retraining?), `convex` (the same where theory is exact), `stability` (do the ranks hold?), `agreement` (do estimators
agree?), `solver`, `gradients`, `mislabel`. `retrain` trains adapters; `conclusions` turns intervals into words;
`text` and `plots` show them; `diagnose` runs it all.
"""
