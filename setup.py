"""The native memories, in C++ without Python's or torch's headers. Optional: without a compiler, torch alone runs."""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "hqlt.native._memories",
            ["src/hqlt/native/memories.cpp"],
            depends=glob("src/hqlt/native/*.h"),
            language="c++",
            optional=True,
            extra_compile_args=["-O2", "-std=c++17", "-fvisibility=hidden", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ]
)
