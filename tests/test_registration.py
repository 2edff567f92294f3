"""After `import hqlt`, transformers' Auto classes know hqlt's models, whatever is imported first."""

import subprocess
import sys

import pytest

from hqlt.model import HQLTConfig, HQLTForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    options = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 8}
    HQLTForCausalLM(HQLTConfig(**options)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import hqlt; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import hqlt",
        "import hqlt; from transformers import PreTrainedModel, AutoModelForCausalLM",
        "import hqlt; from transformers import AutoConfig, AutoModelForCausalLM",
        "import transformers, hqlt; from transformers import AutoModelForCausalLM",
        "import hqlt.model.config; from transformers import AutoModelForCausalLM",
        "import hqlt, importlib.util as i; i.find_spec('transformers'); from transformers import AutoModelForCausalLM",
    ],
)
def test_auto_classes_find_the_models(imports, folder):
    program = f"{imports}\nprint(type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__name__)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.strip() == "HQLTForCausalLM", ran.stderr


def test_transformers_has_the_architectures_of_configs():
    program = "import hqlt, transformers; print(transformers.HQLTForCausalLM is hqlt.HQLTForCausalLM)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.strip() == "True", ran.stderr


def test_import_hqlt_and_find_spec_load_nothing():
    program = (
        "import sys, hqlt, importlib.util; importlib.util.find_spec('transformers')\n"
        "print({'torch', 'transformers', 'hqlt.model'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.strip() == "set()", ran.stderr


def test_an_incompatible_transformers_stays_usable(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("old = True\n")
    for imports in ("import hqlt, transformers", "import transformers, hqlt"):
        program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {imports}; print(transformers.old)"
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert ran.stdout == "True\n", ran.stderr
        assert "UserWarning: transformers' Auto classes do not know hqlt's models: cannot import name" in ran.stderr
