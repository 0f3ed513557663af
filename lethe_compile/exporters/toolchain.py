"""The C++ compiler that Inductor takes, looked at before the long work."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from lethe_compile.errors import LetheError, MissingPackageError

_SOURCE = "#include <locale>\nint named() { return static_cast<int>(std::locale().name().size()); }\n"
_LIBRARIES = (b"libstdc++.so", b"libc++.")  # as a shared library names those that it needs


def check_compiler() -> None:
    """Refuse what would compile packages that crash when they are loaded.

    A package with a C++ standard library of its own, linked statically, does: torch has brought another, and facets of
    locales get mixed up between the two. g++ makes such ones where it finds ``libstdc++.a`` and no ``libstdc++.so``.

    Raises:
        MissingPackageError: there is no C++ compiler.
        LetheError: it links its standard library statically, or cannot link a shared library.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if sys.platform == "win32":
        return
    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise MissingPackageError("AOTInductor needs a C++ compiler, such as g++: install one", "g++") from error
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "probe.so"
        command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
        done = subprocess.run(command, input=_SOURCE.encode(), capture_output=True, check=False)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            reason = said[-1] if said else f"it ended with {done.returncode}"
            raise LetheError(f"{compiler} does not make a shared library: {reason}")
        linked = library.read_bytes()
    if not any(name in linked for name in _LIBRARIES):
        raise LetheError(
            f"{compiler} links the C++ standard library statically, and packages with one of their own crash in torch:"
            f" `{compiler} -print-file-name=libstdc++.so` should name a file that exists, and CXX, CXXFLAGS no"
            " -static-libstdc++"
        )
