"""Rules of the C core that a compiler does not check, and a look at what the compiler made of the micro-kernels."""
from __future__ import annotations

import ast
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest

from zquant import _core

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".c", ".h"))
LEVELS = ("ref", "avx2", "avxvnni", "avx512vnni", "amx")

# Kernels that a level leaves to the one that it builds on, with the reason.
KERNELS = re.findall(r"^\s*X\((\w+),", (CSRC / "zq_kernels.h").read_text(), flags=re.MULTILINE)
INHERITED: dict[tuple[str, str], str] = {
    **{(kernel, "avxvnni"): "256-bit VNNI is for products of integers; everything else is avx2's"
       for kernel in KERNELS if not re.match("gemm_(u8s8|s8u)", kernel)},
    **{(kernel, "amx"): "tile registers are for products of integers; everything else is avx512vnni's"
       for kernel in KERNELS if not re.match("gemm_(u8s8|s8u)|attend_tile_b8", kernel)},
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_comments(text: str) -> str:
    """C source with comments and the contents of strings blanked; line numbers stay."""

    def blank(m: re.Match[str]) -> str:
        if m[0].startswith("/"):
            return re.sub(r"[^\n]", " ", m[0])
        return m[0][0] + m[0][-1]

    return re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.DOTALL)


def offences(pattern: str, allowed: tuple[str, ...], sources: dict[str, str]) -> list[str]:
    """file:line of every match outside the allowed files and folders (prefixes)."""
    found = []
    for file, text in sources.items():
        if file.startswith(allowed):
            continue
        for m in re.finditer(pattern, text):
            found.append(f"{file}:{text.count(chr(10), 0, m.start()) + 1}: {m[0].strip()}")
    return found


CODE = {name(p): without_comments(p.read_text()) for p in SOURCES}
RAW = {name(p): p.read_text() for p in SOURCES}

PYTHON_H = r"#\s*include\s*[<\"]Python\.h"
INTRINSICS = r"\bimmintrin|\b_tile_\w+|\b_mm\d*_\w+|\b__m(128|256|512)[id]?\b"
ALLOCATION = r"(?<![\w.>])(malloc|calloc|realloc|free|posix_memalign|aligned_alloc)\s*\("
THREADS = r"\b(pthread_\w+|sched_\w+)\s*\("
UNROLLED = r"GCC\s+unroll"
FETCHES = r"\bstatic void\s+(pre)?fetch\w*\("


def test_the_sources_are_found() -> None:
    assert len(SOURCES) > 20
    assert "csrc/zq_kernels.h" in CODE


def test_only_the_bindings_include_python() -> None:
    assert offences(PYTHON_H, ("csrc/python/",), RAW) == []


def test_only_x86_uses_intrinsics() -> None:
    assert offences(INTRINSICS, ("csrc/x86/",), CODE) == []


def test_one_allocator() -> None:
    assert offences(ALLOCATION, ("csrc/memory.c",), CODE) == []


def test_one_file_knows_threads() -> None:
    """The allocator has a lock, no more."""
    assert offences(THREADS, ("csrc/parallel.c", "csrc/memory.c"), CODE) == []
    assert offences(r"\bpthread_(?!mutex_(un)?lock\b)\w+\s*\(", (), {"memory.c": CODE["csrc/memory.c"]}) == []


def test_no_libm_of_double_precision_by_accident() -> None:
    """exp(), sqrt() and the like on floats compute in double: the f suffix is part of the bit-equality promise."""
    assert offences(r"(?<![\w.>])(exp|log|pow|tanh|erf|sqrt|fabs|rint|fma|fmax|fmin)\s*\(", (), CODE) == []


def test_functions_that_only_fetch_ahead_are_inline() -> None:
    """gcc 12 finds that a function of prefetches alone has no effect, and drops the calls of it."""
    assert offences(FETCHES, (), CODE) == []
    assert sum(text.count("__builtin_prefetch") for text in CODE.values()) > 5


def test_loops_are_unrolled_for_every_compiler() -> None:
    assert offences(UNROLLED, ("csrc/zq_common.h",), RAW) == []


@pytest.mark.parametrize(("pattern", "planted"), [
    (UNROLLED, "#pragma GCC unroll 4"),
    (FETCHES, "static void\nfetch_columns(const float *x)"),
    (PYTHON_H, "#include <Python.h>\n"),
    (INTRINSICS, "x = _mm512_setzero_si512();"),
    (INTRINSICS, "__m256i v;"),
    (INTRINSICS, "_tile_zero(0);"),
    (ALLOCATION, "p = malloc(n);"),
    (ALLOCATION, "  free (p);"),
    (THREADS, "pthread_create(&t, 0, f, 0);"),
])
def test_the_rules_find_a_planted_fault(pattern: str, planted: str) -> None:
    assert len(offences(pattern, (), {"x.c": planted})) == 1
    assert offences(pattern, ("x.c",), {"x.c": planted}) == []


def test_the_rules_do_not_find_neighbours() -> None:
    innocent = 'zq_free(p); k->free(p); /* malloc(3) */ s = "free("; // _mm_add_ps()'
    assert offences(ALLOCATION, (), {"x.c": without_comments(innocent)}) == []
    assert offences(INTRINSICS, (), {"x.c": without_comments(innocent)}) == []


def test_target_regions_are_closed() -> None:
    """After its last function nothing of a file may still be compiled for an instruction set that is not there."""
    for file, text in CODE.items():
        if file == "csrc/zq_common.h":
            continue
        depth = 0
        for word in re.findall(r"\bZQ_TARGET_(BEGIN|END)\b", text):
            depth += 1 if word == "BEGIN" else -1
            assert depth in (0, 1), f"{file}: ZQ_TARGET_BEGIN and END do not alternate"
        assert depth == 0, f"{file}: ZQ_TARGET_BEGIN without END"
        # A header may hold intrinsics without a region: it is included inside one.
        assert file.endswith(".h") or "_mm" not in text or "ZQ_TARGET_BEGIN" in text, f"{file}: no target region"


def function_lengths(text: str) -> list[int]:
    """Lines between the braces of every function (a brace alone in the first column opens one)."""
    lengths, start = [], None
    for i, line in enumerate(text.split("\n")):
        if line == "{":
            start = i
        elif line.startswith("}") and start is not None:
            lengths.append(i - start - 1)
            start = None
    return lengths


def test_functions_are_short() -> None:
    lengths = {file: function_lengths(text) for file, text in RAW.items()}
    longest = {file: max(n) for file, n in lengths.items() if n and max(n) > 120}
    assert longest == {}
    every = [n for file in lengths.values() for n in file]
    assert len(every) > 100
    assert statistics.median(every) <= 15


def test_function_lengths_are_counted() -> None:
    assert function_lengths("static int\nf(void)\n{\n    a;\n    b;\n}\nstruct s {\n    int x;\n};\n"
                            "int g(void)\n{\n}\n") == [2, 0]


@pytest.mark.parametrize("flag", ["-march=native", "-mtune=native", "-Ofast", "-ffast-math", "-funsafe-math"])
def test_no_flag_that_changes_results_or_the_cpu(flag: str) -> None:
    files = [ROOT / f for f in ("setup.py", "pyproject.toml", "Makefile", "tests/bench/native.py")]
    files += [p for p in (ROOT / ".ci").iterdir()]
    assert [name(p) for p in files if p.exists() and flag in p.read_text()] == []


def test_contraction_is_off() -> None:
    assert "-ffp-contract=off" in (ROOT / "setup.py").read_text()


# ---- the kernel list --------------------------------------------------------------------------------------
def listed_kernels() -> list[str]:
    return re.findall(r"^\s*X\((\w+),", without_comments(RAW["csrc/zq_kernels.h"]), flags=re.MULTILINE)


def test_the_list_is_what_the_module_reports() -> None:
    assert list(_core.kernels()) == listed_kernels()


@pytest.mark.parametrize("level", LEVELS[1:])
def test_every_kernel_has_a_version_at_every_level(level: str) -> None:
    if level not in _core.levels():
        pytest.skip(f"this CPU has no {level}")
    before = _core.level()
    try:
        _core.use_level(level)
        served = _core.kernels()
    finally:
        _core.use_level(before)
    lacking = {k for k, where in served.items() if where != level and (k, level) not in INHERITED}
    assert lacking == set()


def test_inherited_kernels_exist() -> None:
    assert {k for k, _ in INHERITED} <= set(listed_kernels())


# ---- what the compiler made of the micro-kernels -------------------------------------------------------
JUMP = re.compile(r"^j\w+\s+([0-9a-f]+)\b")
PRODUCT = re.compile(r"^(\{vex\} )?v(pdpbusd|pdpbusds|fn?madd\d+ps|pmaddwd|pmaddubsw)\b")
INTEGER_PRODUCT = re.compile(r"^(\{vex\} )?vp(dpbusd|maddwd|maddubsw)\b")


def functions_of(disassembly: str) -> dict[str, list[tuple[int, str]]]:
    """objdump -d output as {function: [(address, instruction)]}."""
    functions: dict[str, list[tuple[int, str]]] = {}
    current: list[tuple[int, str]] = []
    for line in disassembly.split("\n"):
        head = re.match(r"^[0-9a-f]+ <([^>]+)>:$", line)
        if head:
            current = functions.setdefault(head[1], [])
            continue
        body = re.match(r"^\s+([0-9a-f]+):\s+(.*\S)", line)
        if body:
            current.append((int(body[1], 16), body[2]))
    return functions


def inner_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """Bodies of the innermost loops: backward jumps whose range holds no other backward jump's."""
    spans = []
    for address, text in code:
        m = JUMP.match(text)
        if m and code[0][0] <= int(m[1], 16) <= address:
            spans.append((int(m[1], 16), address))
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[text for address, text in code if lo <= address <= hi] for lo, hi in inner]


def spills(code: list[tuple[int, str]], register: str, product: re.Pattern[str] = PRODUCT) -> list[str]:
    """Stores of a vector register to the stack inside the innermost loops that multiply."""
    framed = any(text.startswith("mov") and text.endswith("%rsp,%rbp") for _, text in code)
    stack = r"\((%rsp|%rbp)" if framed else r"\((%rsp)"
    store = re.compile(rf"^v?mov\w+\s+%{register}\d+,\s*-?(0x[0-9a-f]+)?{stack}")
    return [text for loop in inner_loops(code) if any(product.match(t) for t in loop)
            for text in loop if store.match(text)]


GOOD = """
0000000000001000 <zq_gemm_x__avx512vnni>:
    1000:\tvmovaps %zmm0,0x40(%rsp)
    1008:\tvpdpbusd (%rdi),%zmm1,%zmm2
    1010:\tvmovdqu64 %zmm2,(%rsi)
    1018:\tjne    1008 <zq_gemm_x__avx512vnni+0x8>
    101a:\tret
"""


def test_a_planted_spill_is_found() -> None:
    (code,) = functions_of(GOOD).values()
    assert len(inner_loops(code)) == 1
    assert spills(code, "zmm") == []
    (code,) = functions_of(GOOD.replace("%zmm2,(%rsi)", "%zmm2,-0x80(%rsp)")).values()
    assert len(spills(code, "zmm")) == 1


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[tuple[int, str]]]:
    """functions_of() the extension that is installed here."""
    if not shutil.which("objdump"):
        pytest.skip("objdump is not installed")
    extension = Path(_core.__file__)
    if b"__asan_init" in extension.read_bytes():
        pytest.skip("a sanitizer build")
    return functions_of(subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(extension)], capture_output=True, text=True,
                                       check=True).stdout)


@pytest.mark.parametrize("kernel", ["gemm_u8s8_12x32_tile", "gemm_f32_12x32_tile"])
def test_loops_over_rows_are_unrolled(compiled: dict[str, list[tuple[int, str]]], kernel: str) -> None:
    """With any compiler: 12 rows of two vectors in one loop. Rolled up, the sums are in memory: 3.5 times the time."""
    (code,) = (code for n, code in compiled.items() if n.startswith(f"zq_{kernel}__avx512vnni"))
    assert max(sum(bool(PRODUCT.match(t)) for t in loop) for loop in inner_loops(code)) >= 24


@pytest.mark.parametrize(("level", "register", "least"), [("avx2", "ymm", 4), ("avxvnni", "ymm", 2), ("avx512vnni", "zmm", 5)])
def test_micro_kernels_keep_their_accumulators_in_registers(compiled: dict[str, list[tuple[int, str]]], level: str,
                                                            register: str, least: int) -> None:
    """gcc 12 has been seen to spill every accumulator on every step (half the speed); nothing else would show it."""
    if b"clang version" in Path(_core.__file__).read_bytes():
        pytest.skip("clang 14 spills a few, at little cost")
    products = {n: code for n, code in compiled.items()
                if any(PRODUCT.match(t) and register in t for loop in inner_loops(code) for t in loop)}
    kernels = [n for n in products if n.startswith("zq_gemm_") and n.partition(".")[0].endswith("__" + level)]
    assert len(kernels) >= least, f"found only {kernels}: have the kernels been renamed or stripped?"
    if register == "ymm":  # sixteen of them: the float sums of groups have to go through memory
        found = {n: spills(products[n], register, INTEGER_PRODUCT if "group" in n else PRODUCT) for n in kernels}
    else:
        found = {n: spills(code, register) for n, code in products.items()}
    assert {n: stores for n, stores in found.items() if stores} == {}


# ---- the stub ---------------------------------------------------------------------------------------------
def test_the_stub_lists_exactly_the_module() -> None:
    tree = ast.parse((ROOT / "zquant" / "_core.pyi").read_text())
    functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    constants = {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                 and not n.target.id.startswith("_")}
    public = {n for n in dir(_core) if not n.startswith("_")}
    assert functions == {n for n in public if callable(getattr(_core, n))}
    assert constants == {n for n in public if not callable(getattr(_core, n))}
