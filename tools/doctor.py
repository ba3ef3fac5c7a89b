"""Can this machine run tvcompile? Prints one clear sentence when it cannot.

    python tools/doctor.py           Python and the C++ compiler
    python tools/doctor.py python    Python alone

Runs before anything is installed, perhaps under an old Python: standard library, old syntax.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile


def python_trouble():
    """The sentence that says what is wrong with this Python, or None."""
    here = "%s is Python %s.%s" % (sys.executable, sys.version_info[0], sys.version_info[1])
    choose = "choose another with `make PYTHON=/path/to/python3`"
    if sys.version_info < (3, 10):
        return "tvcompile needs Python 3.10 or newer, but " + here + "; " + choose + "."
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return here + " without the venv module: install it (Debian: python3-venv), or " + choose + "."
    include = sysconfig.get_paths()["include"]
    if not os.path.exists(os.path.join(include, "Python.h")):
        return here + " without its C headers: install them (Debian: python3-dev), or " + choose + "."
    return None


def compiler_trouble():
    """The sentence that says what is wrong with the C++ compiler, or None."""
    cxx = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    install = (
        "install one (Debian: g++, Fedora: gcc-c++, macOS: xcode-select --install), "
        "or name yours with `make CXX=/path/to/c++`."
    )
    if shutil.which(cxx.split()[0]) is None:
        return "tvcompile needs a C++ compiler, and `" + cxx + "` was not found: " + install
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "hello.cpp")
        with open(source, "w") as f:
            f.write("#include <vector>\nint main() { return std::vector<int>(1).at(0); }\n")
        command = cxx.split() + ["-std=c++17", source, "-o", os.path.join(folder, "hello")]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        return "tvcompile needs a C++ compiler, and `" + cxx + "` cannot build a small C++17 program: " + install
    return None


def main():
    trouble = python_trouble()
    if trouble is None and sys.argv[1:] != ["python"]:
        trouble = compiler_trouble()
    if trouble is not None:
        sys.stderr.write(trouble + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
