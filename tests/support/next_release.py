"""``python next_release.py WHEEL FOLDER``: an environment in FOLDER where vLLM's next release runs on a CPU.

The next release has no CPU build yet.  Its Python, from the wheel, is put over the CPU libraries of the build that
this interpreter has; all other packages are read where they lie.  This interpreter's environment stays as it is.
"""

from __future__ import annotations

import compileall
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

# Packages that 0.33 imports on a CPU and that the CPU build of 0.32 does not ask for.
NEW = ("orjson>=3.11.6",)


def main() -> None:
    wheel, folder = Path(sys.argv[1]), Path(sys.argv[2])
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder)
    python = folder.absolute() / "bin" / "python"
    here, site = Path(sysconfig.get_path("purelib")), _purelib(python)
    version = _unpack(wheel, here / "vllm", site)
    # As pip does: where an environment forbids Python to keep what it compiles, each process would compile it again.
    compileall.compile_dir(site / "vllm", quiet=2, workers=0)
    # Behind FOLDER's own packages; also runs the .pth files there, which have the checkout in editable mode.
    (site / "rest.pth").write_text(f"import site; site.addsitedir({str(here)!r})\n")
    _write_scripts(Path(sys.executable).parent, python)
    pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *NEW)
    subprocess.run(pip, check=True)
    print(f"vLLM {version} runs by {python}")


def _purelib(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def _unpack(wheel: Path, build: Path, site: Path) -> str:
    """The wheel's Python and ``build``'s libraries into ``site``, named as the CPU build names itself; the version."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site, [name for name in names if name.startswith("vllm/") and not name.endswith(".so")])
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        version = Parser().parsestr(archive.read(metadata).decode())["Version"] + "+cpu"
        info = site / f"vllm-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        (info / "entry_points.txt").write_bytes(archive.read(metadata.replace("METADATA", "entry_points.txt")))
    for library in build.glob("*.so"):
        (site / "vllm" / library.name).symlink_to(library)
    return version


def _write_scripts(scripts: Path, python: Path) -> None:
    """The commands beside this interpreter, each run by ``python`` where a Python runs it."""
    for script in scripts.iterdir():
        place = python.parent / script.name
        if place.exists() or place.is_symlink() or not script.is_file():
            continue
        first, end, rest = script.read_bytes().partition(b"\n")
        if first.startswith(b"#!") and b"python" in first:
            place.write_bytes(f"#!{python}".encode() + end + rest)
            place.chmod(0o755)
        else:
            place.symlink_to(script)


if __name__ == "__main__":
    main()
