"""The commands of a light install say what they need."""

from __future__ import annotations

import pytest

from layerif.app import commands

COMMANDS = [commands.layerif, commands.layerif_report, commands.layerif_store, commands.layerif_export]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_light_install_is_told_how_to_get_the_laboratory(monkeypatch, capsys, command):
    monkeypatch.setattr(commands, "find_spec", lambda name: None if name in ("hydra", "pandas") else name)
    with pytest.raises(SystemExit) as left:
        command()
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("layerif: the commands need hydra, pandas, which came without: pip install 'layerif[lab]'")


def test_the_help_is_printed_where_everything_is_there(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["layerif", "--help"])
    commands.layerif()
    assert "Usage:  layerif" in capsys.readouterr().out
