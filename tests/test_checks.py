"""Laws of names: a wrong one is refused with the nearest right one, and asking costs no heavy import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from layerif.checks import check_choice, did_you_mean


def test_an_unknown_choice_is_refused_with_the_allowed_and_the_nearest():
    check_choice("aggregation", "all", ("all", "positive"))
    message = r"aggregation='postive' is not allowed; allowed: all, positive \(did you mean 'positive'\?\)"
    with pytest.raises(ValueError, match=message):
        check_choice("aggregation", "postive", ("all", "positive"))


def test_only_a_near_name_is_suggested():
    assert did_you_mean("datinf", ("lissa", "datainf")) == " (did you mean 'datainf'?)"
    assert did_you_mean("wanda", ("lissa", "datainf")) == did_you_mean("wanda", ()) == ""


def test_names_import_nothing_heavy():
    code = "import sys, layerif.checks; sys.exit(bool({'torch', 'numpy', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
