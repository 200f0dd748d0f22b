"""Rows and tokens: which ones taught, and which ones to learn from.

`rows` holds the influence of every train row on every validation row, with its tables. `tokens` splits one of these
influences over the tokens of its train row, `query` measures the influence on rows that come later, against an index,
and `page` writes it all for a reader. `selection` chooses train rows to learn from, and `token_filter` the tokens of
them that count.
"""
