"""scripts/get_pip.py: which wheel it takes from an index's page, and that a damaged one is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

PLACE = "https://index.example/simple/pip/"
A, B = "a" * 64, "b" * 64


@pytest.fixture(scope="module")
def get_pip() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "get_pip.py"
    spec = importlib.util.spec_from_file_location("get_pip", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_newest_of_a_json_page(get_pip: ModuleType) -> None:
    names = ["pip-9.0.1-py2.py3-none-any.whl", "pip-24.3.1-py3-none-any.whl", "pip-25.0b1-py3-none-any.whl", "pip-26.0.tar.gz"]
    files = [{"filename": name, "url": f"../../f/{name}", "hashes": {"sha256": A}} for name in names]
    files.append({"filename": "pip-27.0-py3-none-any.whl", "url": "x", "hashes": {"sha256": A}, "yanked": "broken"})
    found = max(get_pip.wheels(json.dumps({"files": files}), PLACE))
    assert found == ([24, 3, 1], "https://index.example/f/pip-24.3.1-py3-none-any.whl", A)


def test_newest_of_an_html_page(get_pip: ModuleType) -> None:
    page = "".join(
        f'<a href="/f/pip-{version}-py3-none-any.whl#sha256={digest}" {more}>x</a>\n'
        for version, digest, more in (("24.0", A, ""), ("25.1", B, "data-x"), ("26.0", A, "data-yanked"))
    )
    assert max(get_pip.wheels(page, PLACE)) == ([25, 1], "https://index.example/f/pip-25.1-py3-none-any.whl", B)


def test_a_damaged_wheel_is_refused(
    get_pip: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = json.dumps({"files": [{"filename": "pip-1.0-py3-none-any.whl", "url": "w", "hashes": {"sha256": A}}]})
    monkeypatch.setattr(get_pip, "fetch", lambda url, kind="": page.encode() if kind else b"not what was announced")
    assert get_pip.main() == 1
    assert "damaged" in capsys.readouterr().err


def test_an_index_that_is_away(
    get_pip: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    assert get_pip.main() == 1
    assert "cannot fetch pip from http://127.0.0.1:1/simple/pip/" in capsys.readouterr().err
