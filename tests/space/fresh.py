"""The deployment check without the Hub: the folder as it would be pushed, started in a new environment of its requirements.txt alone.

    python tests/space/fresh.py --python python3.12            # some minutes; downloads 3 GB where pip has not got them yet

Every student of the package races there through gradio_client. What was installed, started and drawn goes to fresh.json beside this
file; a test compares that record with the pins, so that changed pins ask for a new one."""
from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path

from space_server import SPACE, serving

RECORD = Path(__file__).with_name("fresh.json")
ASK = "import json, importlib.metadata as m, platform, sys; print(json.dumps([platform.python_version(), {n: m.version(n) for n in sys.argv[1:]}]))"


def pins() -> dict[str, str]:
    """Version by name, as spaces/requirements.txt has them."""
    lines = [line.partition("#")[0].strip() for line in (SPACE / "requirements.txt").read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def check(python: str, folder: Path) -> dict:
    """The record. Raises AssertionError or CalledProcessError where something does not hold."""
    from gradio_client import Client

    from zoo.hub.space import assemble, lint
    space = assemble(folder / "space")
    began = time.monotonic()
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    inside = str(folder / "venv" / "bin" / "python")
    subprocess.run([inside, "-m", "pip", "install", "--quiet", "--no-compile", "-r", space / "requirements.txt"], check=True)
    installed = time.monotonic() - began
    assert subprocess.run([inside, "-c", "import zoo"], cwd=folder, capture_output=True).returncode, "the environment has the package already"
    version, versions = json.loads(subprocess.run([inside, "-c", ASK, *pins()], check=True, capture_output=True, text=True).stdout)
    assert versions == pins(), {n: (versions[n], v) for n, v in pins().items() if versions[n] != v}
    began, races = time.monotonic(), {}
    with serving("", space, space, inside) as (url, _):
        opened = time.monotonic() - began
        client = Client(url, verbose=False)
        for row in client.predict(api_name="/students"):
            what = row["classes"][7] if row["classes"] else "noto hospital"
            facts = client.predict(row["name"], what, 0, 4, api_name="/race")[2]
            assert facts["steps"] == 4 and facts["speedup"], facts
            races[row["name"]] = {k: facts[k] for k in ("teacher", "prompt", "seed", "speedup", "lanes")}
    return {"python": version, "machine": platform.machine(), "installed": versions, "lint": lint(space),
            "install_seconds": round(installed), "seconds_until_the_page_opened": round(opened),
            "started": "app.py of the assembled folder, outside the clone", "races": races}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", default="python3.12", help="of the version in the front matter (default python3.12)")
    with tempfile.TemporaryDirectory(prefix="fewstep-fresh-") as folder:
        record = check(parser.parse_args().python, Path(folder))
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{RECORD}: Python {record['python']}, {len(record['races'])} students raced")


if __name__ == "__main__":
    main()
