"""One mechanism finds methods, passes and engines, and says in one line what is wrong with one."""

from abc import ABC, abstractmethod

import pytest

from eval.core.config import plugin_class, plugin_module, plugin_names
from eval.core.errors import UserError
from eval.engines import engine_module


class Tool(ABC):
    label: str

    @abstractmethod
    def use(self):
        """Does its work."""


GOOD = (
    "from tests.eval.test_registry import Tool\nclass Own(Tool):\n    label = 'x'\n    def use(self): pass\n"
)


@pytest.fixture
def write(tmp_path, monkeypatch, request):
    """Writes a module into a package of its own, outside of the project."""
    package = f"tools_of_{abs(hash(request.node.name))}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)

    def module(name, text):
        (tmp_path / package / f"{name}.py").write_text(text)
        return package

    return module


def kind(package, name):
    return plugin_class(package, name, "tool", Tool, {"label": str})


def test_a_folder_is_the_registry_and_a_path_reaches_outside_of_it(write):
    package = write("good", GOOD)
    assert plugin_names(package) == ["good"]
    assert kind(package, "good") is kind("eval.engines", f"{package}.good")
    assert kind(package, "good").__name__ == "Own"


def test_engines_are_found_in_their_folder_or_by_their_path(write):
    package = write("mine", "DEVICES = ('cpu',)\n")
    assert engine_module("torch").__name__ == "eval.engines.torch"
    assert engine_module(f"{package}.mine").DEVICES == ("cpu",)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "the module has 0"),
        (GOOD + "class Other(Own): pass\n", "the module has 2"),
        (GOOD.replace("label = 'x'", ""), "Own must define `label` and `use`"),
        (GOOD.replace("def use", "def used"), "Own must define `label` and `use`"),
        ("import library_that_nobody_has\n", "No module named 'library_that_nobody_has'; install what"),
        ("1 / 0\n", r"cannot be imported \(ZeroDivisionError: division by zero\); correct"),
        ("raise SystemExit(0)\n", r"cannot be imported \(SystemExit: 0\); correct"),
        ("def broken(:\n", r"cannot be imported \(SyntaxError: "),
    ],
)
def test_what_is_wrong_with_a_plug_in_is_one_line_that_keeps_the_cause(write, text, error):
    package = write("tool", text)
    with pytest.raises(UserError, match=error) as raised:
        kind(package, "tool")
    assert "\n" not in str(raised.value)


def test_an_unknown_name_is_answered_with_the_nearest(write):
    package = write("hammer", GOOD)
    with pytest.raises(UserError, match="tool: 'hamer'; did you mean 'hammer'"):
        kind(package, "hamer")
    with pytest.raises(UserError, match="is it on PYTHONPATH"):
        plugin_module(package, "nowhere.at_all", "tool")
