"""dprox imports packages for training and data sets, of which its solvers use nothing: stubs stand in for them."""

import importlib.abc
import importlib.machinery
import sys
import types

import pytest

UNUSED = ("cv2", "huggingface_hub", "munch", "termcolor", "tfpnp", "torchlight", "torchvision")


class Stub(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in UNUSED:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, StubFinder())


@pytest.fixture(autouse=True)
def dprox_left_as_it_was():
    yield
    from nablasolve.interop import dprox

    dprox.uninstall()
