"""The compiled parts; everything else about the package is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=[
        "src/spvtpm/engine/libtpms_build.py:ffibuilder",
        "src/spvtpm/guest/crb_driver_build.py:ffibuilder",
        "src/spvtpm/processor/interfaces/direct_build.py:ffibuilder",
        "src/spvtpm/processor/worker/linux_build.py:ffibuilder",
        "src/spvtpm/wire/mailbox_build.py:ffibuilder",
    ],
)
