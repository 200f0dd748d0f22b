"""The trust report: evidence for and against what influence says about a model, a task and an estimator.

Each file asks one question, and answers it by arithmetic on Grams, influences and losses: `leave_out` (does the
predicted loss change match retraining?), `controls` (does plain resemblance of rows predict it as well?), `convex`
(does influence where theory is exact?), `stability` (do the layers keep their ranks?), `agreement` (do the estimators
agree?), `solver` (do they solve their systems?), `gradients` (are the gradients healthy?), `mislabel` (does influence
find wrong answers?). `retrain` and `retrainings` train the adapters. `sections` gathers the figures of each section and
`report` runs all sections. `conclusions` turns figures into verdicts; `text` and `plots` show them.
"""
