"""The Python interpreters of this machine that dynquant supports."""

import subprocess
from pathlib import Path
from shutil import which

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def interpreters():
    """{version: path, or None where there is none that has its headers}, newest patch first."""
    return {version: next(_candidates(version), None) for version in VERSIONS}


def _candidates(version):
    pyenv = Path.home() / ".pyenv" / "versions"
    patches = sorted(pyenv.glob(f"{version}.*"), key=lambda path: path.name, reverse=True)
    for path in (which(f"python{version}"), *(patch / "bin" / "python" for patch in patches)):
        if path is not None and _works(path, version):
            yield str(path)


def _works(path, version):
    code = (
        "import ensurepip, sys, sysconfig, pathlib;"
        "headers = pathlib.Path(sysconfig.get_path('include'), 'Python.h');"
        "print('%d.%d' % sys.version_info[:2] if headers.exists() else 'no headers')"
    )
    done = subprocess.run([path, "-c", code], capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.strip() == version
