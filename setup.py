"""Builds the native library in C++, which uses neither Python's nor torch's headers.

The build is optional: without a compiler, hqlt falls back to PyTorch. There is one wheel per platform, because the
library does not depend on the Python version and selects its instruction set when it is loaded.
"""

import hashlib
import re
import tomllib
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

SOURCES = sorted([*glob("src/hqlt/native/*.h"), "src/hqlt/native/memories.cpp"])
DIGEST = hashlib.sha256(
    b"".join(Path(file).read_bytes() for file in SOURCES)
).hexdigest()  # computed in the same way by hqlt.native

URL = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def readme() -> str:
    """README.md with absolute links, because a package index shows it without the repository."""
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?!http)", rf"\1{URL}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!http|#)", rf"\1{URL}/blob/main/", text)


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    cmdclass={"bdist_wheel": PlatformWheel},
    ext_modules=[
        Extension(
            "hqlt.native._memories",
            ["src/hqlt/native/memories.cpp"],
            depends=SOURCES,
            define_macros=[("HQLT_SOURCES", f'"{DIGEST}"')],
            language="c++",
            optional=True,
            extra_compile_args=["-O2", "-g0", "-std=c++17", "-fvisibility=hidden", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
)
