"""What the package promises about itself: public jax names, light imports."""

import pathlib
import re
import subprocess
import sys

import hire_rewrite

ROOT = pathlib.Path(hire_rewrite.__file__).parent
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
