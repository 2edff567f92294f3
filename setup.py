"""The native memories, in C++ without Python's or torch's headers. Optional: without a compiler, torch alone runs.

A wheel is one a platform: what is built knows no version of Python, and picks its instructions when it is loaded.
"""

from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"bdist_wheel": PlatformWheel},
    ext_modules=[
        Extension(
            "hqlt.native._memories",
            ["src/hqlt/native/memories.cpp"],
            depends=glob("src/hqlt/native/*.h"),
            language="c++",
            optional=True,
            extra_compile_args=["-O2", "-g0", "-std=c++17", "-fvisibility=hidden", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
)
