"""The `fastmoe` command."""

import importlib.util
import subprocess
import sys

import pytest

from fastmoe import cli


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


def test_without_arguments_it_shows_its_help(capsys):
    assert cli.main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


def test_an_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["trian"])
    assert stopped.value.code == 2
    assert "train" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_has_help_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"fastmoe {name}" in capsys.readouterr().out


def test_a_missing_extra_is_named(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("tyro", "rich") else find(name))
    assert cli.main(["train"]) == 2
    assert "fastmoe train needs rich, tyro: pip install 'fastmoe[train]'" in capsys.readouterr().err


def test_importing_fastmoe_and_its_cli_imports_no_extra():
    extras = {"tyro", "rich", "matplotlib", "tensorboard"}
    code = f"import sys, fastmoe, fastmoe.cli; print(sorted({extras} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_module_runs():
    ran = subprocess.run([sys.executable, "-m", "fastmoe", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("fastmoe ")
