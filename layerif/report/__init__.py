"""`layerif-report FOLDER`: what the runs below a folder found, as one page, with the statistics it takes to say so.

`reading` and `expected` read; `arms` names; `statistics` are pure functions; `comparisons` and `tables` make frames, as
`frames` does of one record; `plots`, `text` and `page` show them; `report` does it all.
"""

from layerif.report.report import main, print_run, write

__all__ = ["main", "print_run", "write"]
