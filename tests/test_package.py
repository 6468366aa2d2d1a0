"""What the package promises about itself: public jax names, light imports."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import hire_rewrite

ROOT = pathlib.Path(hire_rewrite.__file__).parent
PROJECT = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())
SOURCES = sorted(ROOT.rglob("*.py"))


def test_no_private_jax_names():
    assert SOURCES
    private = [path for path in SOURCES if re.search(r"jax\._src|_src\.", path.read_text())]
    assert private == []


def test_only_compat_looks_at_versions():
    asking = [
        p.name for p in SOURCES if "__version" in p.read_text() and "jax.__v" in p.read_text()
    ]
    assert set(asking) <= {"_compat.py"}


def test_what_is_packaged_runs_without_the_kernels_and_says_so_once(tmp_path):
    """Where there was no compiler: the sources and the data that pyproject.toml lists, no more."""
    packages = PROJECT["tool"]["setuptools"]["package-data"]
    listed = {path for pattern in packages["hire_rewrite"] for path in ROOT.glob(pattern)}
    for path in {*SOURCES, *listed}:
        copy = tmp_path / "hire_rewrite" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    smoke = shutil.copy(pathlib.Path(__file__).with_name("smoke.py"), tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HIRE")}
    subprocess.run(
        [sys.executable, smoke, "not-built"], check=True,
        env=environment | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def test_every_source_of_the_kernels_is_packaged():
    packages = PROJECT["tool"]["setuptools"]["package-data"]
    listed = {path for pattern in packages["hire_rewrite"] for path in ROOT.glob(pattern)}
    data = {path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    others = data - listed - set(SOURCES)
    assert {path.suffix for path in others} <= {".so"}


def dead_guards(code, floor):
    """Versions of jax that code compares with, and that are not above the oldest one supported."""
    guards = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Compare) and "__version_info__" in ast.unparse(node):
            sides = (node.left, *node.comparators)
            guards += [ast.literal_eval(side) for side in sides if isinstance(side, ast.Tuple)]
    return [guard for guard in guards if guard <= floor[: len(guard)]]


def test_no_guard_of_a_version_below_the_floor():
    (pinned,) = (d for d in PROJECT["project"]["dependencies"] if d.startswith("jax>="))
    floor = tuple(map(int, pinned.removeprefix("jax>=").split(".")))
    assert dead_guards((ROOT / "_compat.py").read_text(), floor) == []


@pytest.mark.parametrize(
    ("guard", "dead"),
    [((0, 9), True), ((0, 10), True), ((0, 10, 2), True), ((0, 10, 3), False), ((0, 11), False)],
)
@pytest.mark.parametrize("code", ["jax.__version_info__ < {}", "{} <= jax.__version_info__[:3]"])
def test_such_guards_are_found(guard, dead, code):
    assert dead_guards(code.format(guard), (0, 10, 2)) == [guard] * dead


def test_kernels_are_built_for_the_oldest_jaxlib():
    """XLA loads handlers that were built for an older one, and none for a newer one."""
    (oldest,) = (r for r in PROJECT["project"]["dependencies"] if r.startswith("jaxlib>="))
    assert oldest.replace(">=", "==") in PROJECT["build-system"]["requires"]


def test_the_changelog_names_tests_that_there_are():
    project = pathlib.Path(__file__).parents[1]
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", (project / "CHANGELOG.md").read_text())
    assert named
    for path, test in named:
        assert f"def {test}(" in (project / path).read_text(), (path, test)


def test_public_names():
    for name in hire_rewrite.__all__:
        assert getattr(hire_rewrite, name).__doc__


def test_import_pulls_in_no_extra_and_starts_no_backend():
    code = (
        "import sys, jax; before = set(sys.modules); import hire_rewrite; "
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "extras = tops & {'tqdm', 'gguf', 'tokenizers', 'pytest', 'matplotlib', 'hypothesis'}; "
        "print(sorted(extras)); "
        "jax.config.update('jax_platforms', 'no_such_platform')"  # fails if a backend has started
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_layers_do_not_import_upward():
    """`patterns` knows no pass and no op, `ops` knows no pattern and no pass."""
    forbidden = {"patterns": ("passes", "ops"), "ops": ("patterns", "passes")}
    for folder, others in forbidden.items():
        for path in (ROOT / folder).rglob("*.py"):
            for other in others:
                assert f"hire_rewrite.{other}" not in path.read_text(), path
