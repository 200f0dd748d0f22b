"""`layerif-report FOLDER`: the runs below a folder as one page, with the statistics that its findings rest on.

`reading` and `expected` read files, `arms` names runs, `comparisons` and `tables` make frames of them, `plots` draws
them, `sections` puts them in order, `page` renders them, and `report` does it all.
"""

from layerif.report.report import main, write_report

__all__ = ["main", "write_report"]
