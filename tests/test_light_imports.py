"""``import hestia`` loads nothing; listing the recipes needs torch alone and touches no GPU."""

import subprocess
import sys

import hestia

OTHERS = {
    "accelerate", "click", "compressed_tensors", "datasets", "gguf", "jinja2", "llama_cpp", "lm_eval", "matplotlib",
    "rich", "safetensors", "scipy", "transformers", "yaml",
}  # fmt: skip


def packages_after(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after running ``code``."""
    script = f"import sys\n{code}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_import_hestia_loads_nothing() -> None:
    loaded = packages_after("import hestia; hestia.__version__; dir(hestia)")
    assert "hestia" in loaded
    assert not loaded & {"torch", "numpy", *OTHERS}


def test_listing_the_recipes_needs_torch_alone() -> None:
    loaded = packages_after(
        "import hestia.recipes, torch\n"
        "assert 'hestia' in hestia.recipes.names()\n"
        "assert hestia.recipes.get('hestia').spec_for(1.58, 'row')\n"
        "assert not torch.cuda.is_initialized()"
    )
    assert "torch" in loaded
    assert not loaded & OTHERS


def test_every_public_name_has_a_home() -> None:
    for name in hestia.__all__:
        assert getattr(hestia, name) is not None, name


def test_the_children_that_run_engines_load_no_torch() -> None:
    loaded = packages_after("import hestia.export.llama_cpp, hestia.export.llama_session, hestia.export.mlx_engine")
    assert not loaded & {"torch", "transformers"}
