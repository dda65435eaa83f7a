"""Build zquant._core: one extension, C11, stable ABI (CPython 3.10 and later), OpenBLAS through pkg-config.

Environment: ZQUANT_SANITIZE=1 (ASan + UBSan), ZQUANT_DEBUG=1 (-O0 -g, asserts on), ZQUANT_WERROR=1 (CI),
CC=clang-14 as usual.
"""
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

LIMITED_API = "0x030A0000"


def on(name):
    return os.environ.get(name, "0") not in ("", "0")


def pkg_config(*args):
    try:
        return subprocess.run(["pkg-config", *args], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        sys.exit("zquant: OpenBLAS or pkg-config is missing; on Debian: apt-get install libopenblas-dev pkg-config")


class BuildExt(build_ext):
    """Flags that depend on the compiler that distutils chose; as many files at a time as this process has CPUs."""

    def build_extensions(self):
        import numpy

        version = subprocess.run([*self.compiler.compiler_so[:1], "--version"], capture_output=True, text=True).stdout
        for ext in self.extensions:
            ext.include_dirs.append(numpy.get_include())
            if "clang" not in version:
                # gcc 12 spills the accumulators of the micro-kernels on every iteration with tree-PRE (x0.45).
                ext.extra_compile_args.append("-fno-tree-pre")
                if platform.machine() in ("x86_64", "AMD64"):
                    # gcc clears and copies structs of some hundred bytes by "rep stos" and "rep movs", which take longer to
                    # start than memset() takes for all of it: a call of linear_forward has four, and takes 0.04 us less.
                    ext.extra_compile_args += [f"-m{what}-strategy=unrolled_loop:64:noalign,libcall:-1:noalign"
                                               for what in ("memset", "memcpy")]
        self.compiler.compile = side_by_side(self.compiler.compile)
        super().build_extensions()


def side_by_side(compile_files):
    """distutils' compiler.compile(sources, ...), the longest files first as they take longest."""

    def compile_all(sources, *args, **kwargs):
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            jobs = {source: pool.submit(compile_files, [source], *args, **kwargs)
                    for source in sorted(sources, key=os.path.getsize, reverse=True)}
        return [item for source in sources for item in jobs[source].result()]

    return compile_all


def core():
    compile_args = shlex.split(pkg_config("--cflags", "openblas")) + [
        "-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-fno-math-errno", "-pthread",
        "-Wall", "-Wextra", "-Wconversion",
    ]
    link_args = shlex.split(pkg_config("--libs", "openblas")) + ["-pthread", "-lm", "-ldl"]
    macros = [("Py_LIMITED_API", LIMITED_API)]
    if on("ZQUANT_WERROR"):
        compile_args.append("-Werror")
    if on("ZQUANT_DEBUG") or on("ZQUANT_SANITIZE"):
        compile_args += ["-g", "-UNDEBUG"]
    if on("ZQUANT_DEBUG"):
        compile_args.append("-O0")
    if on("ZQUANT_SANITIZE"):
        flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        compile_args += ["-O1", *flags]
        link_args += flags
    return Extension(
        "zquant._core",
        sources=sorted(glob("csrc/**/*.c", recursive=True)),
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        define_macros=macros,
        py_limited_api=True,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


setup(
    ext_modules=[core()],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
