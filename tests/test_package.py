"""``import hestia``: light, and the same public names whatever was imported before."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hestia


def run(script: str) -> None:
    """Run a script in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_resolves() -> None:
    for name in hestia.__all__:
        assert getattr(hestia, name) is not None and name in dir(hestia)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        hestia.quantise  # noqa: B018


def test_importing_hestia_loads_nothing_and_listing_recipes_no_training_stack() -> None:
    run(
        "import sys, hestia\n"
        "assert 'torch' not in sys.modules\n"
        "from hestia import recipes\n"
        "assert 'hestia' in recipes.names()\n"
        "heavy = {'transformers', 'datasets', 'matplotlib', 'lm_eval', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
    )


def test_the_functions_of_the_design_are_there_after_any_import() -> None:
    run(
        "import hestia.plans, hestia.planner, hestia.nn.convert, hestia.quant.quantizer\n"
        "import torch, hestia\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))\n"
        "plan = hestia.plan(model, recipe='hestia', target='hf')\n"
        "assert isinstance(plan, hestia.Plan) and isinstance(plan, hestia.plans.Plan)\n"
        "assert hestia.apply(model, plan) is model\n"
        "assert isinstance(model[0], hestia.QuantLinear)\n"
        "assert model(torch.ones(8)).shape == (8,)\n"
        "codes = hestia.freeze(model)\n"
        "assert isinstance(codes['1'], hestia.QuantizedTensor)\n"
        "w = torch.randn(4, 256, requires_grad=True)\n"
        "w_hat = hestia.fake_quantize(w, levels=[-1, 0, 1], group_size=128, scale='absmean',\n"
        "                             estimator='softmax', temperature=0.3, pressure=1.0)\n"
        "w_hat.sum().backward()\n"
        "assert w_hat.shape == w.shape and bool((w.grad != 0).any())\n"
    )


def test_the_export_package_says_what_each_of_its_files_does() -> None:
    from hestia import export

    modules = {path.stem for path in Path(export.__file__).parent.glob("*.py")} - {"__init__"}
    assert not [name for name in sorted(modules) if not re.search(rf"\b{name}\b", export.__doc__ or "")]
