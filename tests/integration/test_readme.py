"""The Python in the README runs as it stands there."""

import re
from pathlib import Path

from safetensors.torch import load_file

README = Path(__file__).parents[2] / "README.md"


def test_the_example_in_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert "10 releases of TopAgg: PROVED" in capsys.readouterr().out
    assert names["images"].shape == (100, 1, 28, 28)
    assert load_file(tmp_path / "release" / "generator.safetensors")
    assert {path.name for path in tmp_path.iterdir()} <= {"release", "lightning_logs"}
