"""On PYTHONPATH, hides what is installed beside torch, Triton, numpy, pytest, ninja, pybind11 and what these need: a
machine with a GPU may have no more. With PYTEST_DISABLE_PLUGIN_AUTOLOAD=1, for pytest asks for plugins by name.
"""

import sys
import sysconfig
from importlib.machinery import PathFinder

OFFERED = {"torch", "functorch", "torchgen", "triton", "numpy", "pytest", "_pytest", "py", "ninja", "pybind11"}
OFFERED |= {"pluggy", "iniconfig", "packaging", "pygments", "exceptiongroup", "tomli"}
OFFERED |= {"filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "typing_extensions"}
OFFERED |= {"setuptools", "_distutils_hack", "pkg_resources"}
INSTALLED = tuple({sysconfig.get_path(kind) for kind in ("purelib", "platlib")})


class Offered(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        if spec is None or path is not None or name in OFFERED:
            return spec
        where = spec.origin or next(iter(spec.submodule_search_locations or [""]))
        return None if where.startswith(INSTALLED) else spec


sys.meta_path[sys.meta_path.index(PathFinder)] = Offered
