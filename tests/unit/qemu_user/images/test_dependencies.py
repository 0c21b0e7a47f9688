"""Which packages are chosen: priorities, dependencies, alternatives, virtual packages, what is not there."""

from __future__ import annotations

import pytest

from qemu_user.images.dependencies import alternatives, closure
from qemu_user.images.errors import ImageError


def package(name: str, **fields: str) -> dict[str, str]:
    return {"Package": name, "Priority": "optional", **{key.replace("_", "-"): value for key, value in fields.items()}}


SUITE = [
    package("base", Priority="required", Depends="libc"),
    package("shell", Essential="yes", Pre_Depends="libc (>= 2.1)"),
    package("libc", Depends="libgcc"),
    package("libgcc", Depends="libc"),
    package("daemon", Depends="base (>= 1) | other, mail-agent, lib:any"),
    package("lib", Version="1"),
    package("lib", Version="2"),
    package("small-mail", Provides="mail-agent (= 1), x-mail"),
    package("big-mail", Provides="mail-agent"),
    package("unused"),
    package("chooser", Depends="small-mail | big-mail"),
    package("broken", Depends="nowhere"),
]


def names(*wanted: str) -> list[str]:
    return [found["Package"] for found in closure(SUITE, wanted)]


def test_required_and_essential_come_by_themselves() -> None:
    assert names() == ["base", "libc", "libgcc", "shell"]


def test_a_virtual_package_is_answered_by_the_first_that_provides_it() -> None:
    assert names("daemon") == ["base", "big-mail", "daemon", "lib", "libc", "libgcc", "shell"]


def test_what_is_wanted_answers_a_choice() -> None:
    assert "big-mail" not in names("daemon", "small-mail")
    assert "small-mail" not in names("chooser", "big-mail")
    assert "small-mail" in names("chooser")


def test_the_later_paragraph_is_the_later_version() -> None:
    assert [found.get("Version") for found in closure(SUITE, ["lib"]) if found["Package"] == "lib"] == ["2"]


def test_the_order_of_the_index_does_not_matter() -> None:
    assert closure([*reversed(SUITE[:5]), *SUITE[5:]], ["daemon"]) == closure(SUITE, ["daemon"])


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ImageError, match="no package nowhere"):
        closure(SUITE, ["broken"])
    with pytest.raises(ImageError, match="no package nothing"):
        closure(SUITE, ["nothing"])


def test_relations() -> None:
    assert alternatives("a (>= 1.2~) | b:any [riscv64], c <!nocheck>,") == [["a", "b"], ["c"]]
    assert alternatives("") == []
