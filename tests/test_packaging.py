"""The `zoo` command, and what leaves in the wheel."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:      # Python 3.10
    import tomli as tomllib

import zoo
from zoo import cli, registry

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def command(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "zoo", *words], capture_output=True, text=True, cwd=ROOT, **options)


def test_lookups_from_the_command_line(capsys):
    cli.main(["where", "dmd"])
    assert Path(capsys.readouterr().out.strip()) == ROOT / "train_scripts" / "train_dmd.py"
    cli.main(["show", "lcm"])
    assert capsys.readouterr().out.strip() == registry.method("lcm").doc
    cli.main(["cite", "dmd"])
    assert capsys.readouterr().out.strip() == zoo.cite("dmd")
    cli.main(["methods"])
    printed = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in printed] == [m.name for m in zoo.methods()]


@pytest.mark.parametrize("words", [("train", "dmmd"), ("show", "dmmd"), ("where", "dmmd"), ("cite", "dmmd")])
def test_a_wrong_name_is_one_line_and_exit_code_2(words):
    done = command(*words)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown method 'dmmd': did you mean dmd") and done.stderr.count("\n") == 1


def test_train_runs_the_script_with_its_flags(tmp_path, monkeypatch, capsys):
    """--help, an error of the script and its exit code reach the script's own command line."""
    done = command("train", "dmd", "--teacher", "no-such-teacher", "--output_dir", str(tmp_path / "run"))
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: unknown teacher 'no-such-teacher'")
    script = tmp_path / "train_dmd.py"
    script.write_text("import sys; print(__name__, sys.argv[1:])")
    monkeypatch.setattr(registry.Method, "path", script)
    monkeypatch.setattr(sys, "argv", ["zoo"])
    cli.main(["train", "dmd", "--help", "--steps", "3"])
    assert capsys.readouterr().out == "__main__ ['--help', '--steps', '3']\n"


def test_help_of_a_script():
    done = command("train", "dmd", "--help")
    assert done.returncode == 0 and "critic" in done.stdout and "--teacher" in done.stdout


def test_constraints_pin_every_direct_dependency():
    """One exact version each; torch without a local label, so that every build of it qualifies."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {re.match(r"[\w-]+", line)[0] for line in lines}
    assert all(re.fullmatch(r"[\w-]+==[\d.]+(; python_version >= \"[\d.]+\")?", line) for line in lines)
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = {re.match(r"[\w-]+", d)[0] for group in (PROJECT["project"]["dependencies"],
                                                      *(extras[e] for e in ("metrics", "space", "browser", "logs", "deepspeed", "bench", "test")))
              for d in group} - {"fewstep"}
    assert wanted == pins


@pytest.mark.slow
def test_wheel_holds_assets_and_scripts(tmp_path):
    import zipfile
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    wheel, = tmp_path.glob("fewstep-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"zoo/_scripts/{m.script}" for m in registry.METHODS} <= names
    tracked = subprocess.run(["git", "ls-files", "zoo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert {f for f in tracked if f} <= names
    assert {n.split("/")[0] for n in names} == {"zoo", f"fewstep-{zoo.__version__}.dist-info"}
    assert sum(i.compress_size for i in zipfile.ZipFile(wheel).infolist() if "/assets/" in i.filename and "/students/" not in i.filename) <= 25e6
